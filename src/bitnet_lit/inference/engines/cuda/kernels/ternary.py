"""2-bit weights times 8-bit tokens.

The weights are words of 16 codes (`..layout`): the bits 2c of byte b hold code + 1. `word >> 2c & 0x03030303` is four
codes + 1 as bytes, in the order of the bytes of plane c of a token. Their products are added up as integers, which is
exact in any order, and the sum of the token's codes is subtracted once: sum((code + 1) x) - sum(x) = sum(code x).

`matvec` reads each weight once for one token, and multiplies four bytes in one instruction (dp4a). It computes the norm
and the rounding of the token itself, in every program: that is a few thousand numbers from the second-level cache, and
one launch less. `matmul` takes tokens that `rounding.quantize` has rounded, and multiplies on the tensor cores.
"""

import triton
import triton.language as tl

from bitnet_lit.inference.engines.cuda.kernels.rounding import activation, code_word, scales_of

NATIVE: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether the kernels are compiled. Triton's interpreter (TRITON_INTERPRET=1) knows no instructions of the GPU."""


@triton.jit
def _emulated_dot4(codes, word):
    """Compute what the instruction dp4a computes, for Triton's interpreter."""
    total = tl.zeros(codes.shape, tl.int32)
    for b in tl.static_range(4):
        total += ((codes >> (8 * b)) & 255) * ((word << (24 - 8 * b)) >> 24)
    return total


@triton.jit
def dot16(w, x0, x1, x2, x3):
    """The products of 16 codes + 1 in each word of w with 16 codes of a token, added up; all int32, one shape."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 c;
            and.b32 c, $1, 0x03030303;
            dp4a.s32.s32 $0, c, $2, 0;
            shr.u32 c, $1, 2;
            and.b32 c, c, 0x03030303;
            dp4a.s32.s32 $0, c, $3, $0;
            shr.u32 c, $1, 4;
            and.b32 c, c, 0x03030303;
            dp4a.s32.s32 $0, c, $4, $0;
            shr.u32 c, $1, 6;
            and.b32 c, c, 0x03030303;
            dp4a.s32.s32 $0, c, $5, $0;
            }
            """,
            "=&r,r,r,r,r,r",
            [w, x0, x1, x2, x3],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    total = _emulated_dot4(w & 0x03030303, x0)
    total += _emulated_dot4((w >> 2) & 0x03030303, x1)
    total += _emulated_dot4((w >> 4) & 0x03030303, x2)
    return total + _emulated_dot4((w >> 6) & 0x03030303, x3)


@triton.jit
def _product(w, w2, x_ptr, norm_ptr, factor, K, T, START, NORM: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """The products of words START to START + BLOCK of each row, for both halves of a gated layer; int32 (BLOCK_N,)."""
    x0, sum0 = code_word(x_ptr, norm_ptr, K, T, 0, factor, NORM, "", 0, START, BLOCK)
    x1, sum1 = code_word(x_ptr, norm_ptr, K, T, 0, factor, NORM, "", 1, START, BLOCK)
    x2, sum2 = code_word(x_ptr, norm_ptr, K, T, 0, factor, NORM, "", 2, START, BLOCK)
    x3, sum3 = code_word(x_ptr, norm_ptr, K, T, 0, factor, NORM, "", 3, START, BLOCK)
    total = tl.sum(sum0 + sum1 + sum2 + sum3, 0)
    x0 = tl.broadcast_to(x0[None, :], w.shape)
    x1 = tl.broadcast_to(x1[None, :], w.shape)
    x2 = tl.broadcast_to(x2[None, :], w.shape)
    x3 = tl.broadcast_to(x3[None, :], w.shape)
    product = tl.sum(dot16(w, x0, x1, x2, x3), 1) - total
    if ACT != "":
        return product, tl.sum(dot16(w2, x0, x1, x2, x3), 1) - total
    return product, product


@triton.jit
def matvec(
    y_ptr, x_ptr, norm_ptr, codes_ptr, scale_ptr, bias_ptr, eps,
    N: tl.constexpr, K: tl.constexpr, T: tl.constexpr, LIMIT: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = W quantize(norm(x)) for one token.

    Args:
        y_ptr: float32 (N,), out. With RESIDUAL, the product is added to it.
        x_ptr: float32 (K,).
        codes_ptr: int32 (N, T); with ACT (2 N, T), and y = act(W[:N] x) * (W[N:] x).
        scale_ptr: float32, one for each row of codes.
        BLOCK_A, BLOCK_B: words of a row that are multiplied at once: the first part of it, and the rest where there is
            one. Both are powers of two, as blocks are; one block for all words would be half empty for many sizes.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_A)
    at = codes_ptr + n[:, None] * T + t[None, :]
    inside = (n < N)[:, None] & (t < T)[None, :]
    w = tl.load(at, mask=inside, other=0)  # before the wait: weights do not depend on the kernel before
    w2 = tl.load(at + N * T, mask=inside, other=0) if ACT != "" else w
    if BLOCK_B > 0:
        t = BLOCK_A + tl.arange(0, BLOCK_B)
        at = codes_ptr + n[:, None] * T + t[None, :]
        inside = (n < N)[:, None] & (t < T)[None, :]
        rest = tl.load(at, mask=inside, other=0)
        rest2 = tl.load(at + N * T, mask=inside, other=0) if ACT != "" else rest
    if PDL:
        tl.extra.cuda.gdc_wait()
    factor, scale, _ = scales_of(x_ptr, norm_ptr, K, T, 0, eps, LIMIT, NORM, "", BLOCK_T)
    product, product2 = _product(w, w2, x_ptr, norm_ptr, factor, K, T, 0, NORM, ACT, BLOCK_A)
    if BLOCK_B > 0:
        more, more2 = _product(rest, rest2, x_ptr, norm_ptr, factor, K, T, BLOCK_A, NORM, ACT, BLOCK_B)
        product += more
        product2 += more2
    y = product.to(tl.float32) * (scale * tl.load(scale_ptr + n, mask=n < N, other=0.0))
    if ACT != "":
        y2 = product2.to(tl.float32) * (scale * tl.load(scale_ptr + N + n, mask=n < N, other=0.0))
        y = activation(y, ACT) * y2
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    if RESIDUAL:
        y += tl.load(y_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + n, y, mask=n < N)


@triton.jit
def unpack(w, PLANE: tl.constexpr):
    """Codes + 1 of one plane from bytes of four codes; int8."""
    if NATIVE:
        if PLANE == 0:
            return tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0x03030303;", "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4
            )
        elif PLANE == 1:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 c; shr.u32 c, $1, 2; and.b32 $0, c, 0x03030303; }",
                "=r,r",
                [w],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        elif PLANE == 2:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 c; shr.u32 c, $1, 4; and.b32 $0, c, 0x03030303; }",
                "=r,r",
                [w],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 c; shr.u32 c, $1, 6; and.b32 $0, c, 0x03030303; }",
                "=r,r",
                [w],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
    return ((w >> (2 * PLANE)) & 3).to(tl.int8)


@triton.jit
def prefetch(at):
    """Bring what pointers point to into the second-level cache, while the kernel before still runs."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _store(
    y_ptr, total, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, n, m, M, N, BIAS: tl.constexpr, RESIDUAL: tl.constexpr
):
    """Apply the scales to sums of products (outputs, tokens), and store them."""
    total -= tl.load(x_sum_ptr + m, mask=m < M, other=0)[None, :]
    x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    w_scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    y = total.to(tl.float32) * (x_scale[None, :] * w_scale[:, None])
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    y_at = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    if RESIDUAL:
        y += tl.load(y_at, mask=inside, other=0.0)
    tl.store(y_at, y, mask=inside)


@triton.jit(do_not_specialize=["M"])
def matmul(
    y_ptr, x_ptr, x_scale_ptr, x_sum_ptr, codes_ptr, scale_ptr, bias_ptr, partial_ptr, counter_ptr, M,
    N: tl.constexpr, K4: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = x W^T for several rounded tokens.

    With SPLITS the inputs are divided among programs, so that a matrix of few outputs occupies the whole GPU. Each
    leaves its sums, and the last one to finish adds them up: integers, so the order does not matter.

    Args:
        y_ptr: float32 (M, N), out. With RESIDUAL, the product is added to it.
        x_ptr: int8 (M, 4 K4), in the order of the planes.
        x_scale_ptr, x_sum_ptr: of the tokens, as `quantize` leaves them.
        codes_ptr: int8 (N, K4): four codes in each byte. K4 is a multiple of BLOCK_J.
        partial_ptr: int32, a tile for each program, for what programs leave to each other.
        counter_ptr: int32, one for each block of outputs, zeros before and after; with SPLITS, tokens are one block.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block, split = tl.program_id(0), tl.program_id(2)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_J)
    PART: tl.constexpr = triton.cdiv(K4 // BLOCK_J, SPLITS) * BLOCK_J
    # Rows beyond the end read row 0 again: their products are not stored.
    w_at = codes_ptr + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K4 + j[None, :]
    x_at = x_ptr + tl.where(m < M, m, 0)[None, :].to(tl.int64) * (4 * K4) + j[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    if PDL:
        line = tl.arange(0, triton.next_power_of_2(triton.cdiv(PART, 128)))[None, :] * 128
        row = codes_ptr + tl.where(n < N, n, 0)[:, None].to(tl.int64) * K4
        prefetch(row + tl.minimum(split * PART + line, K4 - 1))
        tl.extra.cuda.gdc_wait()
    for j0 in range(split * PART, min(K4, (split + 1) * PART), BLOCK_J):
        w = tl.load(w_at + j0)
        total = tl.dot(unpack(w, 0), tl.load(x_at + j0), total, out_dtype=tl.int32)
        total = tl.dot(unpack(w, 1), tl.load(x_at + K4 + j0), total, out_dtype=tl.int32)
        total = tl.dot(unpack(w, 2), tl.load(x_at + 2 * K4 + j0), total, out_dtype=tl.int32)
        total = tl.dot(unpack(w, 3), tl.load(x_at + 3 * K4 + j0), total, out_dtype=tl.int32)
    if SPLITS == 1:
        _store(y_ptr, total, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, n, m, M, N, BIAS, RESIDUAL)
    else:
        tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        here = partial_ptr + block * (SPLITS * BLOCK_N * BLOCK_M) + tile
        tl.store(here + split * (BLOCK_N * BLOCK_M), total)
        tl.debug_barrier()  # every lane's sums are written before the program counts itself
        done = tl.atomic_add(counter_ptr + block, 1, sem="acq_rel", scope="gpu")
        if done == SPLITS - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for i in tl.static_range(SPLITS):
                total += tl.load(here + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            _store(y_ptr, total, x_scale_ptr, x_sum_ptr, scale_ptr, bias_ptr, n, m, M, N, BIAS, RESIDUAL)
            tl.store(counter_ptr + block, 0)
