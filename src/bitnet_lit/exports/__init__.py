"""An export writes a model in another format, compares it with the original, and only then renames it."""
