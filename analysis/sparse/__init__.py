"""Sparse features that a preference moves: which are used, of what kind, what is lost without them, and does DPO move the same."""
