"""Export: write a model in another format, compare it with the original, and only then rename it."""
