"""The session: one owner of the cache, and everything that is asked of it."""
