"""The embedding of tokens, and norms of the dense twin."""

import triton
import triton.language as tl

from bitnet_lit.inference.engines.cuda.kernels.rounding import load_weighted


@triton.jit
def embed(x_ptr, token_ptr, table_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr):
    """x[m] = table[token[m]] in float32; tokens are int64 (M,)."""
    m = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.load(token_ptr + m)
    row = tl.load(table_ptr + token * K + k, mask=k < K, other=0.0)
    tl.store(x_ptr + m.to(tl.int64) * K + k, row.to(tl.float32), mask=k < K)


@triton.jit
def normalise(
    y_ptr, x_ptr, norm_ptr, eps,
    K: tl.constexpr, F: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = norm(x) in the dtype of y, (M, K); with ACT, norm(act(x[:, :F]) * x[:, F:])."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    stride: tl.constexpr = 2 * F if ACT != "" else K
    x, weighted = load_weighted(x_ptr + m * stride, norm_ptr, k, k < K, F, NORM, ACT)
    if NORM:
        weighted *= tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 0), K * 1.0) + eps))
    tl.store(y_ptr + m * K + k, weighted.to(y_ptr.dtype.element_ty), mask=k < K)
