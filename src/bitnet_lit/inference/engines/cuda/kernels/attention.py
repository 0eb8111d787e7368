"""Rotary embedding, the key/value cache, and attention of one new token over the past.

Each text has a cache of its own, a tensor (layers, 2, KV heads, room, P). Kernels find it by its address, so texts can
come, go and grow while the compiled step stays the same.

`attend` divides the past among programs: one for each text, key/value head and chunk of positions. The query heads that
share a key/value head are the rows of one product. Each program leaves a maximum, a sum and a weighted mean of values,
and the last program to finish puts them together (FlashDecoding, crfm.stanford.edu/2023/10/12/flashdecoding.html), in
the order of the positions, whichever finished last.
"""

import triton
import triton.language as tl


@triton.jit
def _rotated(at, norm_ptr, cos_ptr, sin_ptr, p, inside, eps, P: tl.constexpr, QK_NORM: tl.constexpr):
    """Heads rotated by the angles of their position: `at` points to the first element of each, (..., 1)."""
    half: tl.constexpr = P // 2
    other = tl.where(p < half, p + half, p - half)  # the element that p is rotated with
    x = tl.load(at + p, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(at + other, mask=inside, other=0.0).to(tl.float32)
    if QK_NORM:
        rms = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, axis=-1, keep_dims=True), P * 1.0) + eps))
        x = x * rms * tl.load(norm_ptr + p, mask=p < P, other=0.0)
        y = y * rms * tl.load(norm_ptr + other, mask=p < P, other=0.0)
    cos = tl.load(cos_ptr + p, mask=p < P, other=0.0)
    sin = tl.load(sin_ptr + p, mask=p < P, other=0.0)
    return x * cos + tl.where(p < half, -y, y) * sin


@triton.jit
def _kept(x, HALF: tl.constexpr):
    """Elements as the cache keeps them. In float16, one beyond its range becomes its largest number, as on the CPU."""
    if HALF:
        x = (tl.clamp(x, -65504.0, 65504.0) + (x - x)).to(tl.float16)  # the sum lets infinity and NaN become NaN
    return x  # of two returns, Triton's compiler wants the same dtype


@triton.jit(do_not_specialize=["layer"])
def rotate(
    q_ptr, qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, address_ptr, room_ptr, position_ptr, layer, eps,
    H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    HALF: tl.constexpr, QK_NORM: tl.constexpr,
):  # fmt: skip
    """Rotate the queries of many tokens, and put their keys and values into the caches; a program for a token and head.

    Args:
        q_ptr: (M, H, P), out, in the dtype of the cache.
        qkv_ptr: float32 (M, (H + 2 KV) P).
        address_ptr, room_ptr: int64 (M,): the cache of each token's text, and how many positions it has.
        position_ptr: int64 (M,): where each token stands.
    """
    m, head = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = tl.float16 if HALF else tl.float32
    position = tl.load(position_ptr + m)
    p = tl.arange(0, BLOCK_P)
    at = qkv_ptr + m.to(tl.int64) * ((H + 2 * KV) * P) + head * P
    cos_at, sin_at = cos_ptr + position * P, sin_ptr + position * P
    if head < H:
        q = _rotated(at, q_norm_ptr, cos_at, sin_at, p, p < P, eps, P, QK_NORM)
        tl.store(q_ptr + (m.to(tl.int64) * H + head) * P + p, _kept(q, HALF), mask=p < P)
    else:
        cache = tl.load(address_ptr + m).to(tl.pointer_type(dtype))
        room = tl.load(room_ptr + m)
        if head < H + KV:
            k = _rotated(at, k_norm_ptr, cos_at, sin_at, p, p < P, eps, P, QK_NORM)
            tl.store(cache + ((layer * 2 * KV + head - H) * room + position) * P + p, _kept(k, HALF), mask=p < P)
        else:
            v = tl.load(at + p, mask=p < P, other=0.0)
            tl.store(cache + ((layer * 2 * KV + head - H) * room + position) * P + p, _kept(v, HALF), mask=p < P)


@triton.jit(do_not_specialize=["layer", "chunk"])
def attend(
    y_ptr, qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, address_ptr, room_ptr, position_ptr,
    partial_ptr, counter_ptr, layer, chunk, scale, eps,
    H: tl.constexpr, KV: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
    HALF: tl.constexpr, QK_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one new token of each text over its past and itself; its key and value are put into the cache.

    Args:
        y_ptr: float32 (B, H P), out. Not written where the position is negative: no text stands in that row.
        qkv_ptr: float32 (B, (H + 2 KV) P).
        address_ptr, room_ptr, position_ptr: int64 (B,): see `rotate`. A head has programs for all positions.
        partial_ptr: float32 (B, KV, programs of a head, G, BLOCK_P + 2), for what programs leave to each other.
        counter_ptr: int32 (B, KV), zeros before and after.
        chunk: positions of a program, a multiple of BLOCK_C, which are read at once.
    """
    b, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // KV
    dtype: tl.constexpr = tl.float16 if HALF else tl.float32
    # What earlier steps wrote can be read before the kernel before this one has ended: the past, and where the text is.
    position = tl.load(position_ptr + b)
    room = tl.load(room_ptr + b)
    cache = tl.multiple_of(tl.load(address_ptr + b).to(tl.pointer_type(dtype)), 16)  # torch aligns memory to more
    keys = cache + (layer * 2 * KV + kv) * room * P
    values = keys + KV * room * P
    first = (split * chunk).to(tl.int64)
    stop = tl.minimum(first + chunk, position)
    p = tl.arange(0, BLOCK_P)
    g = tl.arange(0, BLOCK_G)
    # A block is loaded before the one in front of it is used, and the first before the wait.
    c = first + tl.arange(0, BLOCK_C)
    there = (c < stop)[:, None] & (p < P)[None, :]
    k = tl.load(keys + c[:, None] * P + p[None, :], mask=there, other=0.0)
    v = tl.load(values + c[:, None] * P + p[None, :], mask=there, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if first <= position:
        token = qkv_ptr + b * ((H + 2 * KV) * P)
        cos_at, sin_at = cos_ptr + position * P, sin_ptr + position * P
        inside = (g < G)[:, None] & (p < P)[None, :]
        q_at = token + (kv * G + g)[:, None] * P
        q = _rotated(q_at, q_norm_ptr, cos_at, sin_at, p[None, :], inside, eps, P, QK_NORM) * scale
        # The new token's key and value come from here: the cache does not have them yet.
        k_new = _rotated(token + (H + kv) * P, k_norm_ptr, cos_at, sin_at, p, p < P, eps, P, QK_NORM)
        k_new = _kept(k_new, HALF)
        v_new = _kept(tl.load(token + (H + KV + kv) * P + p, mask=p < P, other=0.0), HALF)
        has_new = (first + chunk > position).to(tl.float32)
        if first + chunk > position:
            tl.store(keys + position * P + p, k_new, mask=p < P)
            tl.store(values + position * P + p, v_new, mask=p < P)
        new_score = tl.sum(q * k_new.to(tl.float32)[None, :], 1)
        largest = tl.where(has_new > 0, new_score, -1e30)  # finite: a difference of infinities is no number
        weight = tl.zeros([BLOCK_G], tl.float32) + has_new
        mean = tl.zeros([BLOCK_G, BLOCK_P], tl.float32) + has_new * v_new.to(tl.float32)[None, :]
        q = _kept(q, HALF)
        while first < stop:
            next_c = c + BLOCK_C
            there = (next_c < stop)[:, None] & (p < P)[None, :]
            next_k = tl.load(keys + next_c[:, None] * P + p[None, :], mask=there, other=0.0)
            next_v = tl.load(values + next_c[:, None] * P + p[None, :], mask=there, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            score = tl.where((c < stop)[None, :], score, float("-inf"))
            larger = tl.maximum(largest, tl.max(score, 1))
            old = tl.exp(largest - larger)
            share = tl.exp(score - larger[:, None])
            weight = weight * old + tl.sum(share, 1)
            mean = mean * old[:, None] + tl.dot(share.to(dtype), v, input_precision="ieee")
            largest, k, v, c = larger, next_k, next_v, next_c
            first += BLOCK_C
        y_at = y_ptr + b * (H * P) + (kv * G + g)[:, None] * P + p[None, :]
        live = position // chunk + 1
        if live == 1:
            tl.store(y_at, mean / weight[:, None], mask=inside)
        else:
            WIDTH: tl.constexpr = BLOCK_P + 2
            here = partial_ptr + (b.to(tl.int64) * KV + kv) * (tl.num_programs(2) * G * WIDTH)
            part_at = here + (split * G + g) * WIDTH
            tl.store(part_at[:, None] + p[None, :], mean, mask=inside)
            tl.store(part_at + BLOCK_P, largest, mask=g < G)
            tl.store(part_at + BLOCK_P + 1, weight, mask=g < G)
            tl.debug_barrier()  # every lane's part is written before the program counts itself
            done = tl.atomic_add(counter_ptr + b * KV + kv, 1, sem="acq_rel", scope="gpu")
            if done == live - 1:
                largest = tl.full([BLOCK_G], -1e30, tl.float32)  # finite: a difference of infinities is no number
                weight = tl.zeros([BLOCK_G], tl.float32)
                mean = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
                s = 0
                while s < live:
                    for i in tl.static_range(4):  # loads of four parts are on their way at once
                        part_at = here + ((s + i) * G + g) * WIDTH
                        is_part = (g < G) & (s + i < live)
                        part = tl.load(
                            part_at[:, None] + p[None, :], mask=is_part[:, None], other=0.0, cache_modifier=".cg"
                        )
                        top = tl.load(part_at + BLOCK_P, mask=is_part, other=float("-inf"), cache_modifier=".cg")
                        part_weight = tl.load(part_at + BLOCK_P + 1, mask=is_part, other=0.0, cache_modifier=".cg")
                        larger = tl.maximum(largest, top)
                        old, new = tl.exp(largest - larger), tl.exp(top - larger)
                        weight = weight * old + part_weight * new
                        mean = mean * old[:, None] + part * new[:, None]
                        largest = larger
                    s += 4
                tl.store(y_at, mean / weight[:, None], mask=inside)
                tl.store(counter_ptr + b * KV + kv, 0)
