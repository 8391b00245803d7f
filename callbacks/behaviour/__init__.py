"""Callbacks about what the model says and prefers while it trains."""
