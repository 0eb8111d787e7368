"""This package handles runs on the disk: the folder of a run, sweeps of several runs, and plots of their metrics.

`folder.py` owns the run folder. It imports neither PyTorch nor Hydra, so every other package may import it.
"""
