"""Sweeps over steering vectors: the engine and its tables."""
