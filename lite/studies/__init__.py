"""Studies: what is read of lists of them, and what is written of their results."""
