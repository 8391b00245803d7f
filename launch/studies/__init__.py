"""Studies of several arms and seeds: their runs trained, their claims judged."""
