"""The data that a model is trained on: preference records from real and synthetic sources, tokenised and laid out in batches."""
