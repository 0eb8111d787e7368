"""Each format that a model is read from or written to has one file here."""
