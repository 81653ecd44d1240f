"""Data sets, metrics and the sequential run."""
