"""A model at rest: one interface, and one file for each way of writing it."""
