"""What changed in the weights themselves."""
