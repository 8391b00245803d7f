"""Sparse features of hidden states: dictionaries that are read or trained, their metrics, and steering by them (FSRL)."""
