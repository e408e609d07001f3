"""A cohort: the studies of a source drafted into files, each exactly once, by one process or many."""
