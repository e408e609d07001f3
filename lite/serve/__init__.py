"""A server around one `FindingsModel`: OpenAI's protocol, films as files, and a page. All are doors to its session."""
