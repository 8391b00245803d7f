"""Loggers of a run's numbers: metrics.csv and Weights & Biases."""
