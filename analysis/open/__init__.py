"""Runs and checkpoints, opened as data."""
