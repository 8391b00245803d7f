"""tiltmeter: the pure science of the instrument, usable from any trainer (no lightning, hydra or wandb in here)."""
