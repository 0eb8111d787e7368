"""Kernels compute quantized layers faster than the definition in bit_linear.py, with the same integers.

`choose.py` says which kernels compute a layer, and why others do not; `interface.py` says what kernels are. Each folder
beside them holds the kernels for one kind of device. Kernels are imported when a layer is first called there, so
nothing here needs Triton or a compiler to be installed.
"""
