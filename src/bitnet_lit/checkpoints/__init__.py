"""Models on disk have one interface here, and one file for each format."""
