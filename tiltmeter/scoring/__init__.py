"""Scores of what models say and know: text or log-probs in, numbers with their scorer's name out."""
