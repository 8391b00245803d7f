"""Changes of the weights themselves."""
