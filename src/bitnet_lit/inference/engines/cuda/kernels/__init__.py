"""Triton kernels of the CUDA engine. Importing a module of this folder imports triton.

words.py         four bytes in a word: what the GPU has instructions for
rounding.py      RMSNorm and rounding of one token to 8 or 16 bits
ternary.py       2-bit weights times 8-bit tokens: matrix-vector for one token, matrix-matrix for several
head.py          the output head in int8, and exact logits for the tokens that could be the likeliest
attention.py     rotary embedding, the key/value cache, attention of one new token over the past
sampling.py      from logits to a token
elementwise.py   the embedding, and norms of the dense twin

Axis letters: M tokens, N outputs, K inputs, T words of a plane (see `..layout`), H heads, G query heads of a key/value
head, P head_dim, C positions of a chunk, V vocabulary.

A kernel with PDL (programmatic dependent launch, from Hopper on) may start while the kernel before it still runs, and
loads its weights meanwhile. It waits (`gdc_wait`) before it reads what that kernel wrote and before it writes anything.
Behind its wait it lets the next one start (`gdc_launch_dependents`): earlier, three kernels would share the GPU.
"""
