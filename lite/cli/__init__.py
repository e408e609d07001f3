"""The commands of `python -m lite`: one file each, and the options that they share."""
