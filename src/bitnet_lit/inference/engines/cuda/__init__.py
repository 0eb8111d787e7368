"""The engine for NVIDIA GPUs, in reading order:

engine.py            texts in, logits or tokens out
drawing.py           texts that the GPU goes on with by itself
step.py              a decode step as a CUDA graph
network.py           a step as a sequence of kernels
projection.py, head.py    its matrices
kernels/             the kernels, in Triton
layout.py            how weights lie in memory
cache.py             the keys and values of a text
sampling.py          from logits to a token
supported_models.py  which models and machines it can run

Triton comes with PyTorch for CUDA. It is imported when the engine is made, and not before.
"""
