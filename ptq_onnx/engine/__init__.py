"""The simulator on PPQ: graph, executor, and node sessions that compute as the file does."""
