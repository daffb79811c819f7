"""Many quantizations: the matrix, its file, single cells, and what kills a run."""
