"""Hidden states of pairs: where they are read, and what keeps them."""
