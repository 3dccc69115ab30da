"""Hyperparameter sweeps: search spaces, samplers, and trials grouped into compiled populations."""
