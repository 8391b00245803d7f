"""Neighbours of DPO on the same model: other ways to the same preference, in one table."""
