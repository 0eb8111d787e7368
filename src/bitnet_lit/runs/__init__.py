"""Runs on the disk: the folder of one run, sweeps of several, and pictures of what they measured.

`folder.py` owns the run folder. It imports neither PyTorch nor Hydra, so every other room may ask it.
"""
