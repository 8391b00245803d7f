"""One file for each figure of the paper, and those beside them."""
