"""Many quantizations: a matrix of cells, each a folder, run by Ray and taken up where it ended."""
