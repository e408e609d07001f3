"""The artifact: its manifest, opening one, and writing one."""
