"""Vectors that are added to hidden states, and what they do."""
