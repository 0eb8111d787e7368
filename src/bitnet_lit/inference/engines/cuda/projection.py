"""A projection is a linear layer of the step, with the norm before it and what comes behind it.

`TernaryProjection` runs codes of 2 bits on rounded tokens. `DenseProjection`, for a model that is not quantized,
multiplies bfloat16 by cuBLAS. Both are called in the same way, and results are allocated by torch: inside a CUDA graph
its allocator gives every replay the same memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bitnet_lit.inference.engines.cuda.gpu_features import early, loads_ahead
from bitnet_lit.inference.engines.cuda.kernels.elementwise import normalise
from bitnet_lit.inference.engines.cuda.kernels.rounding import quantize
from bitnet_lit.inference.engines.cuda.kernels.ternary import matmul, matvec
from bitnet_lit.inference.engines.cuda.layout import pack_words


class Projection(Protocol):
    """A Projection is a linear layer as the layers of the network call it."""

    def __call__(self, x: Tensor, norm: Tensor | None, *, act: str = "", add_to: Tensor | None = None) -> Tensor:
        """Return y = W norm(x).

        Args:
            x: float32 (M, K); with `act`, (M, 2 K), and its input is act(x[:, :K]) * x[:, K:].
            norm: the weight of the norm, float32 (K,); None where there is no norm.
            add_to: float32 (M, N) that the product is added to, and the result then.
        """

    def gated(self, x: Tensor, norm: Tensor | None, act: str) -> tuple[Tensor, str]:
        """Return what the two halves of W give, and what `act` the layer behind it is called with."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of the matrix."""


@dataclass
class TernaryProjection:
    """Has 2-bit codes, and one scale for each row.

    Attributes:
        words: int32 (N, T), see layout.py.
        scale: float32 (N,).
        bias: float32 (N,), or None.
        inputs: K.
        limit: the largest code of an activation, 127 for 8 bits.
        eps: of the norms.
        counter: zeros, in which programs of `matmul` count themselves; one for each 64 rows.
    """

    words: Tensor
    scale: Tensor
    bias: Tensor | None
    inputs: int
    limit: int
    eps: float
    counter: Tensor

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, bias: Tensor | None, limit: int, eps: float) -> TernaryProjection:
        """Pack codes int8 (N, K) with scales float32 (N,), all on one device."""
        counter = torch.zeros(triton.cdiv(len(codes), 64), dtype=torch.int32, device=codes.device)
        return cls(pack_words(codes), scale.contiguous(), bias, codes.shape[1], limit, eps, counter)

    def __call__(self, x: Tensor, norm: Tensor | None, *, act: str = "", add_to: Tensor | None = None) -> Tensor:
        """See `Projection`; `act` is always part of the product before."""
        assert not act
        return self._product(x, norm, "", add_to)

    def gated(self, x: Tensor, norm: Tensor | None, act: str) -> tuple[Tensor, str]:
        """See `Projection`. The activation is part of the product."""
        return self._product(x, norm, act, None), ""

    def _product(self, x: Tensor, norm: Tensor | None, act: str, add_to: Tensor | None) -> Tensor:
        M, N = len(x), len(self.scale) // (2 if act else 1)
        y = torch.empty(M, N, dtype=torch.float32, device=x.device) if add_to is None else add_to
        (self._matvec if M == 1 else self._matmul)(y, x, norm, act, add_to is not None)
        return y

    def _matvec(self, y: Tensor, x: Tensor, norm: Tensor | None, act: str, add: bool) -> None:
        N, T = y.shape[1], self.words.shape[1]
        blocks = matvec_blocks(T)
        matvec[(triton.cdiv(N, blocks["BLOCK_N"]),)](
            y, x, x if norm is None else norm, self.words, self.scale, self.scale if self.bias is None else self.bias,
            self.eps, N=N, K=self.inputs, T=T, LIMIT=self.limit, NORM=norm is not None, BIAS=self.bias is not None,
            RESIDUAL=add, ACT=act, **blocks, **early(x.device),
        )  # fmt: skip

    def _matmul(self, y: Tensor, x: Tensor, norm: Tensor | None, act: str, add: bool) -> None:
        (M, N), T = y.shape, self.words.shape[1]
        words = torch.empty(M, 4 * T, dtype=torch.int32, device=x.device)
        x_scale = torch.empty(M, dtype=torch.float32, device=x.device)
        x_sum = torch.empty(M, dtype=torch.int32, device=x.device)
        block_t = triton.next_power_of_2(T)
        quantize[(M,)](
            words, x_scale, x_sum, x, x if norm is None else norm, self.eps,
            K=self.inputs, T=T, LIMIT=self.limit, NORM=norm is not None,
            BLOCK_T=block_t, num_warps=max(1, min(block_t // 32, max(4, block_t // 128))), **early(x.device),
        )  # fmt: skip
        blocks = matmul_blocks(M, N, 4 * T, bool(act), x.device)
        grid = (triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(M, blocks["BLOCK_M"]), blocks["SPLITS"])
        tiles = math.prod(grid) * (2 if act else 1) * blocks["BLOCK_N"] * blocks["BLOCK_M"]
        partial = torch.empty(tiles if blocks["SPLITS"] > 1 else 1, dtype=torch.int32, device=x.device)
        matmul[grid](
            y, words.view(torch.int8), x_scale, x_sum, self.words.view(torch.int8), self.scale,
            self.scale if self.bias is None else self.bias, partial, self.counter, M,
            N=N, K4=4 * T, BIAS=self.bias is not None, RESIDUAL=add, ACT=act, **blocks, **early(x.device),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """See `Projection`."""
        return self.words.nbytes


def matvec_blocks(T: int) -> dict[str, Any]:
    """Return the rows of a program of `matvec`, how it divides the words of a row, and its warps.

    The numbers are the fastest of those that were measured on an H200.
    """
    first = 1 << (T.bit_length() - 1)
    rest = triton.next_power_of_2(T - first) if first < T else 0
    if rest == first:
        first, rest = 2 * first, 0
    return {"BLOCK_N": 4, "BLOCK_A": first, "BLOCK_B": rest, "num_warps": 2 if T <= 512 else 8}


def matmul_blocks(M: int, N: int, K4: int, gated: bool, device: torch.device) -> dict[str, Any]:
    """Return the tile of a program of `matmul`, among how many programs inputs are divided, warps, and loads ahead."""
    stages = loads_ahead(device)
    if M > 64:
        tile = {"BLOCK_M": 128, "BLOCK_N": 64 if gated else 128, "BLOCK_J": 64}
        return {**tile, "SPLITS": 1, "num_warps": 8, "num_stages": stages}
    # 64 outputs of a program are what the tensor cores take at once. About 132 programs occupy an H100.
    block_j = 128 if K4 % 128 == 0 else 64
    splits = max(1, min(132 // triton.cdiv(N, 64), K4 // block_j, 4))
    tile = {"BLOCK_M": max(16, triton.next_power_of_2(M)), "BLOCK_N": 64, "BLOCK_J": block_j}
    return {**tile, "SPLITS": splits, "num_warps": 4, "num_stages": stages}


@dataclass
class DenseProjection:
    """Is a matrix in bfloat16, (N, K), for a model that is not quantized."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor, norm: Tensor | None, *, act: str = "", add_to: Tensor | None = None) -> Tensor:
        """See `Projection`. Without `add_to` the result is bfloat16."""
        K = self.weight.shape[1]
        normed = torch.empty(len(x), K, dtype=self.weight.dtype, device=x.device)
        block_k = triton.next_power_of_2(K)
        normalise[(len(x),)](
            normed, x, x if norm is None else norm, self.eps,
            K=K, F=K if act else 0, NORM=norm is not None, ACT=act, BLOCK_K=block_k,
            num_warps=max(1, min(8, block_k // 256)),
        )  # fmt: skip
        y = F.linear(normed, self.weight, self.bias)
        return y if add_to is None else add_to.add_(y)

    def gated(self, x: Tensor, norm: Tensor | None, act: str) -> tuple[Tensor, str]:
        """See `Projection`."""
        return self(x, norm), act

    @property
    def nbytes(self) -> int:
        """See `Projection`."""
        return self.weight.nbytes
