"""The engines: what turns prompts and image features into tokens."""
