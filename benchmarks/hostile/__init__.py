"""Hostile inputs, and exports that are killed: `python -m benchmarks hostile`."""
