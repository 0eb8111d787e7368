"""Training turns a config into a run folder with checkpoints, metrics and a model folder.

`run.py` is the whole run in order; the other modules are its parts. The network is in `bitnet_lit.model`.
"""
