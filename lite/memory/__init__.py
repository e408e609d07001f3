"""Memory: what is counted from shapes, what a plan makes of it, and what a process has taken."""
