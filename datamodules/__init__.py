"""On what a model is trained: preference records from real and synthetic sources, tokenised and laid out in batches."""
