"""The page, and what all its figures share."""
