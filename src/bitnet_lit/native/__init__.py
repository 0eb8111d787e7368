"""C++ that trains on a CPU: it is compiled once for this machine, and runs on PyTorch's own threads.

A training step of a small model in plain PyTorch is a thousand small operations, and most of its time passes between
the matrix products: in copies, in rounding, in waiting. These functions do the same with fewer passes over memory::

    linears.py          norm, quantization and the product with one or several weight matrices
    gated_mlp.py        the whole feed-forward layer
    attention.py        rotary positions and causal attention
    loss.py             the final norm, the head and the cross-entropy
    newton_schulz.py    Muon's Newton-Schulz iterations, and its whole step

Each is tested against the plain PyTorch code that it stands for, gradients included. Integers of quantized products are
equal; floats differ by their rounding. A result is the same for any number of threads. csrc/ has the C++: start with
matmul.h. On Intel processors with AMX, float products of matrices from 128 x 128 on are computed from bfloat16 parts
with an error below 2^-16 (amx.h). Newton-Schulz iterations round to bfloat16 there, and on other processors that
multiply such numbers (rounded.h).

`build.py` compiles, also for the engine in inference/.
"""
