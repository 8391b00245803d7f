"""A Hugging Face causal language model from outside and inside."""
