"""The native engine for CPUs."""
