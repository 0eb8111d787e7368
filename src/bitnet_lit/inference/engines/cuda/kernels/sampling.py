"""From logits to a token, by the rules and in the order of `inference/sampling.py`.

A vocabulary is cut into blocks, one program each, and programs leave numbers to the next kernel. No kernel adds floats
in an order that changes, so one machine gives the same token for the same logits and the same random number.

Sorting 128,000 logits would take as long as a small model's step. What top_k and top_p keep is all tokens above a
threshold, so the threshold is searched: `narrow` adds up the probabilities (or counts the tokens) above each of 32
thresholds, and the next launch continues between the two where the sum passes its target. With z = (logit - largest) /
temperature, five launches find the threshold to 1 / 32**5 of the range of z, at most 1e-6. Tokens that lie closer to it
are kept together, as equal ones.
"""

import triton
import triton.language as tl

THRESHOLDS: tl.constexpr = tl.constexpr(32)
RANGE: tl.constexpr = tl.constexpr(30.0)  # exp(-30) = 1e-13: all tokens below have less probability than a float rounds
TEMPERATURE: tl.constexpr = tl.constexpr(0)  # places in `options`
TOP_K: tl.constexpr = tl.constexpr(1)
TOP_P: tl.constexpr = tl.constexpr(2)
MIN_P: tl.constexpr = tl.constexpr(3)  # its logarithm
PENALTY: tl.constexpr = tl.constexpr(4)
LAST_N: tl.constexpr = tl.constexpr(5)


@triton.jit
def penalize(logits_ptr, recent_ptr, length_ptr, options_ptr, V: tl.constexpr, RING: tl.constexpr, PDL: tl.constexpr):
    """Make recent tokens less likely, each once; one program for a text.

    Args:
        logits_ptr: float32 (B, V), changed.
        recent_ptr: int64 (B, RING): token i of a text stands at i % RING.
        length_ptr: int64 (B,): tokens of each text so far.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, RING)
    length = tl.load(length_ptr + b)
    age = (length - 1 - i) % RING  # of the token in place i: 0 is the newest; % of a negative number is negative
    age = tl.where(age < 0, age + RING, age)
    counts = (age < length) & (age.to(tl.float32) < tl.load(options_ptr + LAST_N))
    at = logits_ptr + b * V + tl.load(recent_ptr + b * RING + i, mask=counts, other=0)
    logits = tl.load(at, mask=counts, other=0.0)
    penalty = tl.load(options_ptr + PENALTY)
    tl.debug_barrier()  # every lane has read before one writes: a token may be there several times
    logits = tl.where(logits > 0, tl.fdiv(logits, penalty), logits * penalty)
    tl.store(at, tl.clamp(logits, -3.4028234663852886e38, 3.4028234663852886e38), mask=counts)


@triton.jit
def peaks(
    peak_ptr,
    where_ptr,
    logits_ptr,
    V: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """The largest and the smallest logit of each block, and where the largest is.

    Args:
        peak_ptr: float32 (B, 2, BLOCKS), out; infinite where a logit is NaN.
        where_ptr: int64 (B, BLOCKS), out.
        logits_ptr: float32 (B, V), of which the first PIECES count.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + b * V + v, mask=v < PIECES, other=float("-inf"))
    wrong = tl.max((logits != logits).to(tl.int32), 0)
    largest = tl.max(logits, 0)
    first = tl.min(tl.where(logits == largest, v, PIECES - 1), 0)
    smallest = tl.min(tl.where(v < PIECES, logits, float("inf")), 0)
    tl.store(peak_ptr + (b * 2) * BLOCKS + block, tl.where(wrong > 0, float("inf"), largest))
    tl.store(peak_ptr + (b * 2 + 1) * BLOCKS + block, smallest)
    tl.store(where_ptr + b * BLOCKS + block, first.to(tl.int64))


@triton.jit
def _largest(peak_ptr, b, BLOCKS: tl.constexpr, ROUND_BLOCKS: tl.constexpr):
    block = tl.arange(0, ROUND_BLOCKS)
    return tl.max(tl.load(peak_ptr + b * 2 * BLOCKS + block, mask=block < BLOCKS, other=float("-inf")), 0)


@triton.jit
def _between(sums_ptr, state_ptr, b, BLOCKS: tl.constexpr, ROUND_BLOCKS: tl.constexpr, options_ptr):
    """Return where the search goes on: the two thresholds, and the target.

    Args:
        sums_ptr: float32 (B, BLOCKS, THRESHOLDS) of the launch before.
        state_ptr: float32 (B, 3) of the launch before: lower and upper threshold, and the target. A negative target was
            not known yet: it is a share of all that was added up.
    """
    block = tl.arange(0, ROUND_BLOCKS)[:, None]
    i = tl.arange(0, THRESHOLDS)
    parts = tl.load(sums_ptr + (b * BLOCKS + block) * THRESHOLDS + i[None, :], mask=block < BLOCKS, other=0.0)
    sums = tl.sum(parts, 0)
    low, high, target = tl.load(state_ptr + b * 3), tl.load(state_ptr + b * 3 + 1), tl.load(state_ptr + b * 3 + 2)
    if target < 0:
        target = tl.load(options_ptr + TOP_P) * tl.max(sums, 0)
    step = (high - low) / THRESHOLDS
    passed = tl.maximum(tl.sum((sums >= target).to(tl.int32), 0) - 1, 0)
    return low + step * passed, low + step * (passed + 1), target


@triton.jit
def narrow(
    sums_ptr, state_ptr, old_sums_ptr, old_state_ptr, logits_ptr, peak_ptr, options_ptr,
    V: tl.constexpr, PIECES: tl.constexpr, BLOCKS: tl.constexpr, ROUND_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr,
    COUNT: tl.constexpr, START: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One step of the search for a threshold.

    Args:
        sums_ptr, state_ptr: out; `_between` says what they hold, and what the ones of the launch before hold.
        COUNT: whether tokens are counted (top_k), or probabilities added up (top_p).
        START: 0 for a step like the one before, 1 for the first of all, 2 for the first of top_p behind top_k.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    largest = _largest(peak_ptr, b, BLOCKS, ROUND_BLOCKS)
    temperature = tl.load(options_ptr + TEMPERATURE)
    if START == 1:
        all_blocks = tl.arange(0, ROUND_BLOCKS)
        at = peak_ptr + (b * 2 + 1) * BLOCKS + all_blocks
        smallest = tl.min(tl.load(at, mask=all_blocks < BLOCKS, other=float("inf")), 0)
        low = tl.maximum((smallest - largest) / temperature, -RANGE)
        high = -low * 1e-6 + 1e-30  # nothing is above 0
        target = tl.load(options_ptr + TOP_K) if COUNT else -1.0
    else:
        low, high, target = _between(old_sums_ptr, old_state_ptr, b, BLOCKS, ROUND_BLOCKS, options_ptr)
        if START == 2:
            high = -low * 1e-6 + 1e-30
            target = -1.0
    if block == 0:
        tl.store(state_ptr + b * 3, low)
        tl.store(state_ptr + b * 3 + 1, high)
        tl.store(state_ptr + b * 3 + 2, target)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + b * V + v, mask=v < PIECES, other=float("-inf"))
    z = (logits - largest) / temperature
    value = (z == z).to(tl.float32) if COUNT else tl.exp(z)
    step = (high - low) / THRESHOLDS
    for i in tl.static_range(THRESHOLDS):
        above = tl.sum(tl.where(z >= low + step * i, value, 0.0), 0)
        tl.store(sums_ptr + (b * BLOCKS + block) * THRESHOLDS + i, above)


@triton.jit
def keep(
    mass_ptr, threshold_ptr, old_sums_ptr, old_state_ptr, logits_ptr, peak_ptr, options_ptr,
    V: tl.constexpr, PIECES: tl.constexpr, BLOCKS: tl.constexpr, ROUND_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr,
    SEARCHED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The probability that each block keeps, and the threshold of all.

    Args:
        mass_ptr: float32 (B, BLOCKS), out.
        threshold_ptr: float32 (B,), out.
        SEARCHED: whether `narrow` ran before.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    largest = _largest(peak_ptr, b, BLOCKS, ROUND_BLOCKS)
    temperature = tl.load(options_ptr + TEMPERATURE)
    threshold = tl.load(options_ptr + MIN_P)
    if SEARCHED:
        low, _, _ = _between(old_sums_ptr, old_state_ptr, b, BLOCKS, ROUND_BLOCKS, options_ptr)
        threshold = tl.maximum(threshold, low)
    if block == 0:
        tl.store(threshold_ptr + b, threshold)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    z = (tl.load(logits_ptr + b * V + v, mask=v < PIECES, other=float("-inf")) - largest) / temperature
    tl.store(mass_ptr + b * BLOCKS + block, tl.sum(tl.where(z >= threshold, tl.exp(z), 0.0), 0))


@triton.jit
def draw(
    drawn_ptr, token_ptr, position_ptr, recent_ptr, length_ptr, uniform_ptr, count_ptr,
    mass_ptr, threshold_ptr, logits_ptr, peak_ptr, where_ptr, options_ptr,
    V: tl.constexpr, PIECES: tl.constexpr, BLOCKS: tl.constexpr, ROUND_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr,
    GREEDY: tl.constexpr, RING: tl.constexpr, UNIFORMS: tl.constexpr, ADVANCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw a token of each text, and make everything ready for the next step; one program for a text.

    Args:
        drawn_ptr: int64 (B,), out: the token; -1 where the largest logit is not finite.
        token_ptr: int64 (B,), out: what the next step reads, never beyond the vocabulary.
        position_ptr: int64 (B,): where that token will stand, one more than before if ADVANCE; negative ones stay.
        recent_ptr, length_ptr: see `penalize`; the token is added.
        uniform_ptr: float64 (B, UNIFORMS): random numbers in [0, 1).
        count_ptr: int64 (B,): how many of them a text has used.
    """
    # No early start for the next step: its kernels read positions and tokens before they wait.
    if PDL:
        tl.extra.cuda.gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, ROUND_BLOCKS)
    inside = block < BLOCKS
    all_peaks = tl.load(peak_ptr + b * 2 * BLOCKS + block, mask=inside, other=float("-inf"))
    largest = tl.max(all_peaks, 0)
    count = tl.load(count_ptr + b)
    tl.store(count_ptr + b, count + 1)
    if GREEDY:
        chosen = tl.min(tl.where(all_peaks == largest, block, BLOCKS - 1), 0)
        token = tl.load(where_ptr + b * BLOCKS + chosen)
    else:
        mass = tl.load(mass_ptr + b * BLOCKS + block, mask=inside, other=0.0).to(tl.float64)
        sums = tl.cumsum(mass, 0)
        target = tl.load(uniform_ptr + b * UNIFORMS + count % UNIFORMS) * tl.sum(mass, 0)
        # A number that rounds to the whole sum falls into the last block that keeps a token.
        last = tl.max(tl.where(mass > 0, block, 0), 0)
        chosen = tl.minimum(tl.sum((sums <= target).to(tl.int32), 0), last)
        before = tl.sum(tl.where(block < chosen, mass, 0.0), 0)
        i = tl.arange(0, BLOCK_V)
        v = chosen * BLOCK_V + i
        logits = tl.load(logits_ptr + b * V + v, mask=v < PIECES, other=float("-inf"))
        z = (logits - largest) / tl.load(options_ptr + TEMPERATURE)
        share = tl.where(z >= tl.load(threshold_ptr + b), tl.exp(z), 0.0).to(tl.float64)
        passed = tl.sum((tl.cumsum(share, 0) + before <= target).to(tl.int32), 0)
        token = (chosen * BLOCK_V + tl.minimum(passed, tl.max(tl.where(share > 0, i, 0), 0))).to(tl.int64)
    token = tl.minimum(tl.maximum(token, 0), PIECES - 1)
    finite = (largest < float("inf")) & (largest > float("-inf"))
    tl.store(drawn_ptr + b, tl.where(finite, token, -1))
    tl.store(token_ptr + b, token)
    length = tl.load(length_ptr + b)
    tl.store(recent_ptr + b * RING + length % RING, token)
    tl.store(length_ptr + b, length + 1)
    if ADVANCE:
        position = tl.load(position_ptr + b)
        tl.store(position_ptr + b, tl.where(position < 0, position, position + 1))
