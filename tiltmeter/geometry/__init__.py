"""Numbers of hidden states."""
