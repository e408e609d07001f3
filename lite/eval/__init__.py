"""What a text, or a distribution, is worth beside another one."""
