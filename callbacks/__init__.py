"""Watched while training: one concern a file, each usable alone."""
