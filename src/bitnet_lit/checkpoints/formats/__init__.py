"""One file for each format that a model is read from or written to."""
