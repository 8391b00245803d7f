"""Agreements between the processes of a run: locks, signals, Slurm, one error for all."""
