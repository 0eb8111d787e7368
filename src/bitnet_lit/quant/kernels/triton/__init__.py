"""Triton kernels for training on GPUs of the Hopper generation (H100, H200).

A quantized layer is a product of int8 codes with ternary codes. Tensor cores multiply int8 and FP8 twice as fast as
bfloat16, and ternary codes are exact in both. `functions.py` shows the whole computation; the other files hold one
kernel each:

    weights.py          latent weights -> codes, for the forward and for the backward product
    norm_round.py       (gate and) norm and rounding of activations, in one pass
    int8_product.py     the integer product, with the scales applied before it is stored
    rotary.py           the rotary embedding in the output of q, k and v, and its backward pass
    fp8_rows.py         output gradients -> FP8, for the gradient of the input
    norm_backward.py    the backward pass of the norm
    gated_backward.py   the backward pass of the norm and the gate
    weight_gradient.py  the gradient of the weights

softmax_gradient.py has a use in networks of any kind: it computes the losses of logits and their gradient.

`kernels.py` says what layers they compute. It is the only module here that may be imported where Triton is missing.
"""
