"""Behave, not believe: how deep a change of behaviour reaches, the traces that it leaves, and what can still be read off states."""
