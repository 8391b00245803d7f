"""What several processes of a run agree on: locks, signals, Slurm, one error for all."""
