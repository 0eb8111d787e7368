"""Kernels compute quantized layers faster than the definition in bit_linear.py, with the same integers.

`choose.py` says which kernels compute a layer, and why others do not. Each folder or module beside it holds the kernels
for one kind of device. They are imported when a layer is first called there, so nothing here needs Triton or a compiler
to be installed.
"""
