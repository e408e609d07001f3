"""Retrieval: films and reports as vectors of one space, and an index of them that is searched whole."""
