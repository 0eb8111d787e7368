"""Four bytes in a word of 32 bits: what the GPU has instructions for, and Triton no operations.

Triton's interpreter (TRITON_INTERPRET=1) knows no instructions of the GPU, so each has a few lines that compute the
same.
"""

import triton
import triton.language as tl

NATIVE: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether the kernels are compiled."""


@triton.jit
def _emulated_dot4(codes, word, total):
    for b in tl.static_range(4):
        total += ((codes << (24 - 8 * b)) >> 24) * ((word << (24 - 8 * b)) >> 24)
    return total


@triton.jit
def dot4(w, x, total):
    """total + the products of four signed bytes."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    return _emulated_dot4(w, x, total)


@triton.jit
def dot16(w, x0, x1, x2, x3, total):
    """total + the products of 16 codes + 1 in each word of w with 16 codes of a token; all int32, one shape."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 c;
            and.b32 c, $1, 0x03030303;
            dp4a.s32.s32 $0, c, $2, $6;
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
            "=&r,r,r,r,r,r,r",
            [w, x0, x1, x2, x3, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    total = _emulated_dot4(w & 0x03030303, x0, total)
    total = _emulated_dot4((w >> 2) & 0x03030303, x1, total)
    total = _emulated_dot4((w >> 4) & 0x03030303, x2, total)
    return _emulated_dot4((w >> 6) & 0x03030303, x3, total)


@triton.jit
def pack4(a, b, c, d):
    """The low bytes of four int32 in a word, that of a lowest."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high;
            prmt.b32 low, $1, $2, 0x0040;
            prmt.b32 high, $3, $4, 0x0040;
            prmt.b32 $0, low, high, 0x5410;
            }
            """,
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24


@triton.jit
def unpack(w, PLANE: tl.constexpr):
    """Return codes + 1 of one plane from bytes of four codes, int8."""
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
