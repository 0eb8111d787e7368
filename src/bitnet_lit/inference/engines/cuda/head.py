"""The output head goes from hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
from torch import Tensor

from bitnet_lit.inference.engines.cuda.gpu_features import early
from bitnet_lit.inference.engines.cuda.kernels.elementwise import normalise
from bitnet_lit.inference.engines.cuda.kernels.head import bounds, head_matmul, head_matvec, refine
from bitnet_lit.inference.engines.cuda.kernels.rounding import quantize_16
from bitnet_lit.inference.engines.cuda.layout import permute_bytes, quantize_rows

REFINED_AT_ONCE = 2048  # logits of a program of `bounds` and `refine`


class Head(Protocol):
    """Is the final norm and the output head."""

    def __call__(self, x: Tensor, logits: Tensor) -> None:
        """Compute logits float32 (M, V) of hidden states float32 (M, D)."""

    @property
    def nbytes(self) -> int:
        """Return how many bytes a step reads."""


@dataclass
class DenseHead:
    """Is a head in floats: its rows (V, D) in the dtype of the product, and the weight of the norm before it."""

    rows: Tensor
    norm: Tensor
    eps: float

    def __call__(self, x: Tensor, logits: Tensor) -> None:
        """See `Head`."""
        K = x.shape[1]
        normed = torch.empty(x.shape, dtype=self.rows.dtype, device=x.device)
        normalise[(len(x),)](
            normed, x, self.norm, self.eps, K=K, F=0, NORM=True, ACT="", BLOCK_K=triton.next_power_of_2(K), num_warps=8
        )
        if self.rows.dtype == torch.float32:
            torch.mm(normed, self.rows.T, out=logits)
        else:
            torch.mm(normed, self.rows.T, out_dtype=torch.float32, out=logits)

    @property
    def nbytes(self) -> int:
        """See `Head`."""
        return self.rows.nbytes


@dataclass
class Int8Head:
    """Is a head in int8, with exact logits for every token that could be the likeliest (kernels/head.py).

    Attributes:
        codes: int8 (V, KB), in the order of `layout.permute_bytes`.
        scale: float32 (V,).
        rows: the head as it is stored, (V, D).
        norm: the weight of the norm before it.
        pieces: the first rows are those of tokens; a padded vocabulary has more.
    """

    codes: Tensor
    scale: Tensor
    rows: Tensor
    norm: Tensor
    eps: float
    pieces: int

    @classmethod
    def from_rows(cls, rows: Tensor, norm: Tensor, eps: float, pieces: int) -> Int8Head:
        """Round the rows of a head (V, D)."""
        parts = [quantize_rows(part) for part in rows.split(2**14)]  # a large head is not copied whole
        codes = torch.cat([permute_bytes(part) for part, _ in parts])
        return cls(codes, torch.cat([scale for _, scale in parts]), rows, norm, eps, pieces)

    def __call__(self, x: Tensor, logits: Tensor) -> None:
        """See `Head`."""
        (M, K), V, KB = x.shape, len(self.scale), self.codes.shape[1]
        T = KB // 16
        block_t = triton.next_power_of_2(T)
        length = torch.empty(M, dtype=torch.float32, device=x.device)
        pdl = early(x.device)
        words = torch.empty(2 * M, 4 * T, dtype=torch.int32, device=x.device)
        x_scale = torch.empty(M, dtype=torch.float32, device=x.device)
        quantize_16[(M,)](
            words, x_scale, length, x, self.norm, M, self.eps,
            K=K, T=T, NORM=True, BLOCK_T=block_t, num_warps=max(1, min(8, block_t // 32)), **pdl,
        )  # fmt: skip
        if M == 1:
            block_v = 16
            head_matvec[(triton.cdiv(V, block_v),)](
                logits, words, x_scale, self.codes.view(torch.int32), self.scale,
                V=V, T=T, BLOCK_V=block_v, BLOCK_T=min(128, 4 * block_t), num_warps=4, **pdl,
            )  # fmt: skip
        else:
            block_m = min(64, max(16, triton.next_power_of_2(M)))
            head_matmul[(triton.cdiv(V, 64), triton.cdiv(M, block_m))](
                logits, words.view(torch.int8), x_scale, self.codes, self.scale, M, M,
                V=V, KB=KB, BLOCK_M=block_m, BLOCK_V=64, BLOCK_K=128, num_warps=4, num_stages=3, **pdl,
            )  # fmt: skip
        blocks = triton.cdiv(V, REFINED_AT_ONCE)
        bound = torch.empty(M, blocks, dtype=torch.float32, device=x.device)
        shape = {"V": V, "BLOCKS": blocks, "BLOCK_V": REFINED_AT_ONCE, "num_warps": 4}
        bounds[(blocks, M)](bound, logits, length, self.scale, PIECES=self.pieces, **shape, **pdl)
        refine[(blocks, M)](
            logits, bound, length, self.scale, x, self.norm, self.rows, self.eps,
            K=K, NORM=True, ROUND_BLOCKS=triton.next_power_of_2(blocks), BLOCK_K=triton.next_power_of_2(K),
            **shape, **pdl,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """See `Head`; the exact rows of a few tokens are not counted."""
        return self.codes.nbytes
