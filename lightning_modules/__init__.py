"""What is trained: supervised fine-tuning and direct preference optimisation, as Lightning modules around tiltmeter's functions."""
