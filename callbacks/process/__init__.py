"""Callbacks that keep a training process whole: signals, preemption, random numbers, agreement, progress."""
