"""The engine that computes with torch and this project's kernels."""
