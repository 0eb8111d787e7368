"""The product of int8 activation codes and int8 weight codes, with the scales applied before it is stored.

::

    y[m, n] = sum over k of x_codes[m, k] * weight_codes[n, k], as int32, * (x_scale[m] * weight_scale[n])

The integer sum is exact, so it equals the reference's. The tensor cores of the Hopper generation multiply int8 twice as
fast as bfloat16.

The kernel is persistent: one program for each multiprocessor computes tile after tile, so the stores of a tile overlap
with the loads of the next one. Tiles are loaded and stored by the tensor memory accelerator (TMA), which fills what
lies outside a matrix with zeros. It needs rows that start at multiples of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bitnet_lit.quant.kernels.triton.launch import multiprocessors, on_device_of, operator
from bitnet_lit.quant.kernels.triton.rotary import rotate_rows


@triton.jit
def _int8_product(
    x_tiles,
    weight_tiles,
    y_tiles,
    x_scale_ptr,
    weight_scale_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        # Tiles run down a band of GROUP row tiles before they move right: programs that run at the same time then
        # share rows and columns in the L2 cache.
        band = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - band * GROUP, GROUP)
        within = tile % (GROUP * tiles_n)
        row = (band * GROUP + within % height) * BLOCK_M
        column = (within // height) * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            x_codes = x_tiles.load([row, step * BLOCK_K])
            weight_codes = weight_tiles.load([column, step * BLOCK_K])
            total = tl.dot(x_codes, weight_codes.T, total, out_dtype=tl.int32)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        x_scale = tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + columns, mask=columns < N, other=0.0)
        y = total.to(tl.float32) * (x_scale[:, None] * weight_scale[None, :])
        y_tiles.store([row, column], y.to(y_tiles.dtype))


def _tile(rows: int, columns: int, dtype: torch.dtype, programs: int) -> tuple[int, int]:
    """Return the rows and columns of a tile, the faster ones (H100, 16384 and 32768 rows).

    Tiles of float32 are smaller, because a tile and its three stages of loads must fit into the 227 KiB of shared
    memory of a multiprocessor. A small result has smaller ones, too, where large ones would leave programs idle.
    """
    small = 128, 128
    if dtype == torch.float32:
        return small
    large = (256, 128) if columns <= 2048 else (128, 256)

    def turns(tile: tuple[int, int]) -> int:
        return -(-(-(-rows // tile[0]) * -(-columns // tile[1])) // programs)

    return small if turns(small) * 1.2 < turns(large) * 2 else large  # a small tile takes a little more than half


def _int8_product_fake(
    x_codes: Tensor,
    weight_codes: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotated_heads: int = 0,
) -> Tensor:
    return x_codes.new_empty((x_codes.shape[0], weight_codes.shape[0]), dtype=dtype)


@operator(_int8_product_fake)
def int8_product(
    x_codes: Tensor,
    weight_codes: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotated_heads: int = 0,
) -> Tensor:
    """Multiply codes and apply both scales, and to some outputs the rotary embedding.

    Args:
        x_codes: int8 (M, K), contiguous; K is a multiple of 16.
        weight_codes: int8 (N, K), contiguous; N is a multiple of 16.
        x_scale: float32 (M, 1).
        weight_scale: float32 (N,).
        dtype: of the result: float32, bfloat16 or float16.
        cos, sin: (T, head_dim), contiguous, where heads are rotated; row m is the token at position m modulo T.
        rotated_heads: how many heads at the start of a row are rotated.

    Returns:
        (M, N).
    """
    (rows, inputs), columns = x_codes.shape, weight_codes.shape[0]
    y = x_codes.new_empty((rows, columns), dtype=dtype)
    programs = multiprocessors(x_codes.device)
    block_m, block_n = _tile(rows, columns, dtype, programs)
    block_k = 128 if inputs > 64 else 64
    with on_device_of(x_codes):
        _int8_product[(programs,)](
            TensorDescriptor.from_tensor(x_codes, [block_m, block_k]),
            TensorDescriptor.from_tensor(weight_codes, [block_n, block_k]),
            TensorDescriptor.from_tensor(y, [block_m, block_n]),
            x_scale,
            weight_scale,
            rows,
            columns,
            inputs,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP=8,
            PROGRAMS=programs,
            num_warps=8,
            num_stages=3,
        )
    if cos is not None and sin is not None:
        rotate_rows(y, cos, sin, rotated_heads)
    return y
