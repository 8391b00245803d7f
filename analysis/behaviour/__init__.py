"""Behaviour: completions of two models, scored and put into words."""
