"""A pair of responses, from token ids to its loss."""
