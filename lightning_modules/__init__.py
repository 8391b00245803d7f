"""Lightning modules around tiltmeter's functions: supervised fine-tuning and direct preference optimisation."""
