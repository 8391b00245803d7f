"""Where a run's numbers go: metrics.csv and Weights & Biases."""
