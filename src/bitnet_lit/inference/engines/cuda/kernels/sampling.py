"""From logits to a token in one kernel, by the rules and in the order of `inference/sampling.py`.

A vocabulary is cut into stretches, one program each, and the programs of a text meet several times: each leaves a few
numbers, waits for the others, and reads the numbers of all. They are no more than the GPU's multiprocessors, and a
cooperative launch makes sure that all run at the same time. No program adds floats in an order that changes, so one
machine gives the same token for the same logits and the same random number.

Sorting 128,000 logits would take as long as a small model's step. What top_k and top_p keep is all tokens above a
threshold, so the threshold is searched: a pass over the logits adds up the probabilities (or counts the tokens) above
each of some thresholds. The next ones lie between the two where the sum passes its target, close to where a straight
line between the two sums passes it. The search ends when no more than one token is left between the two, or when they
are closer than a millionth of the range of the logits. Tokens that lie closer are kept together, as equal ones.
"""

import triton
import triton.language as tl

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
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
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
def _meet(numbers, shared_ptr, counter_ptr, turn, PROGRAMS: tl.constexpr, ROUND: tl.constexpr):
    """Leave L numbers to the other programs of a text, and return those of all: (ROUND, L), zeros behind the end.

    Args:
        shared_ptr: float32 (2, PROGRAMS, L). Meetings take turns with the halves: when a program writes to a half
            again, all have read it.
        counter_ptr: int32, how often programs have come to a meeting of this text.
        turn: the number of the meeting.
    """
    LENGTH: tl.constexpr = numbers.shape[0]
    i = tl.arange(0, LENGTH)
    half = shared_ptr + (turn % 2) * (PROGRAMS * LENGTH)
    tl.store(half + tl.program_id(0) * LENGTH + i, numbers)
    tl.debug_barrier()  # every lane's numbers are written before the program counts itself
    if PROGRAMS > 1:
        come = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
        while come < (turn + 1) * PROGRAMS:
            come = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
    c = tl.arange(0, ROUND)[:, None]
    return tl.load(half + c * LENGTH + i[None, :], mask=c < PROGRAMS, other=0.0, cache_modifier=".cg")


@triton.jit
def _search(
    logits_ptr, first, end, largest, inverse, low, high, target, shared_ptr, counter_ptr, turn,
    COUNT: tl.constexpr, THRESHOLDS: tl.constexpr, BLOCK_V: tl.constexpr, PROGRAMS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Find the largest threshold of z = (logit - largest) * inverse with at least `target` above it.

    Args:
        first, end: the logits of this program.
        low, high: all of the target is above low, and nothing above high.
        target: a number of tokens with COUNT, else a share of the probability above low.

    Returns:
        The threshold, and the number of the next meeting.
    """
    k = tl.arange(0, THRESHOLDS)
    resolution = (high - low) * 1e-6
    start, step = low, (high - low) / THRESHOLDS
    above_low, above_high, closest = 0.0, 0.0, 1.0
    passes = 0
    # The limit is never reached: of two passes, one divides the distance by nine or more.
    while (passes == 0) | ((high - low > resolution) & (above_low - above_high > 1.5 * closest) & (passes < 32)):
        thresholds = start + step * k
        sums = tl.zeros([THRESHOLDS, BLOCK_V], tl.float32)  # a lane has all thresholds of a logit
        for v0 in tl.range(first, end, BLOCK_V, num_stages=3):
            v = v0 + tl.arange(0, BLOCK_V)
            z = (tl.load(logits_ptr + v, mask=v < end, other=float("-inf")) - largest) * inverse
            value = tl.full([BLOCK_V], 1.0, tl.float32) if COUNT else tl.exp(z)
            sums += tl.where(z[None, :] >= thresholds[:, None], value[None, :], 0.0)
        total = tl.sum(_meet(tl.sum(sums, 1), shared_ptr, counter_ptr, turn, PROGRAMS, ROUND), 0)
        if not COUNT:
            target = tl.where(passes == 0, target * tl.max(total, 0), target)  # the first threshold is low
        passed = tl.sum((total >= target).to(tl.int32), 0)
        if passed > 0:
            above_low = tl.sum(tl.where(k == passed - 1, total, 0.0), 0)
            low = start + step * (passed - 1)
        if passed < THRESHOLDS:
            above_high = tl.sum(tl.where(k == passed, total, 0.0), 0)
            high = start + step * passed
        width = high - low
        if (passed > 0) & (passed < THRESHOLDS):
            estimate = low + width * ((above_low - target) / tl.maximum(above_low - above_high, 1e-30))
            span = 4 * width / THRESHOLDS
            start = tl.minimum(tl.maximum(estimate - span / 2, low), high - span)
            step = span / (THRESHOLDS - 1)
        else:  # a line was no good guess
            start, step = low + width / (THRESHOLDS + 1), width / (THRESHOLDS + 1)
        closest = 1.0 if COUNT else tl.exp(low)  # a token between low and high has at least this
        passes += 1
        turn += 1
    return low, turn


@triton.jit
def sample(
    drawn_ptr, token_ptr, position_ptr, recent_ptr, length_ptr, uniform_ptr, count_ptr, logits_ptr, shared_ptr,
    counter_ptr, options_ptr,
    V: tl.constexpr, PIECES: tl.constexpr, PROGRAMS: tl.constexpr, ROUND: tl.constexpr, THRESHOLDS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr, ROUND_BLOCKS: tl.constexpr, GREEDY: tl.constexpr, SEARCH_K: tl.constexpr,
    SEARCH_P: tl.constexpr, RING: tl.constexpr, UNIFORMS: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    """Draw a token of each text, and make everything ready for the next step; PROGRAMS programs for a text.

    Args:
        drawn_ptr: int64 (UNIFORMS, B), out, in the row of the random number: the token; -1 where the largest logit is
            not finite. It is memory of the host.
        token_ptr: int64 (B,), out: what the next step reads, never beyond the vocabulary.
        position_ptr: int64 (B,): where that token will stand, one more than before if ADVANCE; negative ones stay.
        recent_ptr, length_ptr: see `penalize`; the token is added.
        uniform_ptr: float64 (B, UNIFORMS): random numbers in [0, 1).
        count_ptr: int64 (B,): how many of them a text has used.
        logits_ptr: float32 (B, V), of which the first PIECES count.
        shared_ptr: float32 (B, 2, PROGRAMS, THRESHOLDS), see `_meet`.
        counter_ptr: int32 (B,), zeros before and after.
        BLOCKS: blocks of BLOCK_V logits of a program.
    """
    # It does not start early, nor lets it the next step, whose kernels read positions and tokens before they wait.
    c, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    logits_ptr += b * V
    shared_ptr += b * (2 * PROGRAMS * THRESHOLDS)
    counter_ptr += b
    first = c * (BLOCKS * BLOCK_V)
    end = tl.minimum(first + BLOCKS * BLOCK_V, PIECES)
    i = tl.arange(0, BLOCK_V)
    k = tl.arange(0, THRESHOLDS)
    programs = tl.arange(0, ROUND)
    count = tl.load(count_ptr + b)
    length = tl.load(length_ptr + b)

    # 1. The largest and the smallest logit, and where the first of the largest is. A NaN counts as infinite.
    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK_V], float("inf"), tl.float32)
    place = tl.zeros([BLOCK_V], tl.int32)
    for v0 in tl.range(first, end, BLOCK_V, num_stages=3):
        v = v0 + i
        logits = tl.load(logits_ptr + v, mask=v < end, other=float("-inf"))
        logits = tl.where(logits != logits, float("inf"), logits)
        place = tl.where(logits > peak, v, place)
        peak = tl.maximum(peak, logits)
        bottom = tl.minimum(bottom, tl.where(v < end, logits, float("inf")))
    top = tl.max(peak, 0)
    place = tl.min(tl.where(peak == top, place, PIECES - 1), 0)
    numbers = tl.where(k == 0, top, tl.where(k == 1, tl.min(bottom, 0), place.to(tl.float32)))
    numbers = _meet(numbers, shared_ptr, counter_ptr, 0, PROGRAMS, ROUND)  # places are exact: below 2**24
    here = (programs < PROGRAMS)[:, None]
    largest = tl.max(tl.max(tl.where(here & (k == 0)[None, :], numbers, float("-inf")), 1), 0)
    smallest = tl.min(tl.min(tl.where(here & (k == 1)[None, :], numbers, float("inf")), 1), 0)
    turn = 1

    writes = c == 0
    if GREEDY:
        tops = tl.max(tl.where(k[None, :] == 0, numbers, float("-inf")), 1)
        places = tl.max(tl.where(k[None, :] == 2, numbers, 0.0), 1)
        token = tl.min(tl.where((tops == largest) & (programs < PROGRAMS), places, PIECES - 1.0), 0).to(tl.int64)
    else:
        # 2. The threshold of what stays.
        inverse = tl.div_rn(1.0, tl.load(options_ptr + TEMPERATURE))
        threshold = tl.maximum((smallest - largest) * inverse, -RANGE)
        high = -threshold * 1e-6 + 1e-30  # nothing is above 0
        if SEARCH_K:
            threshold, turn = _search(
                logits_ptr, first, end, largest, inverse, threshold, high, tl.load(options_ptr + TOP_K),
                shared_ptr, counter_ptr, turn, True, THRESHOLDS, BLOCK_V, PROGRAMS, ROUND,
            )  # fmt: skip
        if SEARCH_P:
            threshold, turn = _search(
                logits_ptr, first, end, largest, inverse, threshold, high, tl.load(options_ptr + TOP_P),
                shared_ptr, counter_ptr, turn, False, THRESHOLDS, BLOCK_V, PROGRAMS, ROUND,
            )  # fmt: skip
        if SEARCH_K or SEARCH_P:
            threshold = tl.maximum(threshold, tl.load(options_ptr + MIN_P))
        else:
            threshold = tl.load(options_ptr + MIN_P)

        # 3. The token where the sum of what stays passes its share. `mass` is of each block of this program.
        block = tl.arange(0, ROUND_BLOCKS)
        mass = tl.zeros([ROUND_BLOCKS], tl.float32)
        for j in tl.range(BLOCKS, num_stages=3):
            v = first + j * BLOCK_V + i
            z = (tl.load(logits_ptr + v, mask=v < end, other=float("-inf")) - largest) * inverse
            mass = tl.where(block == j, tl.sum(tl.where(z >= threshold, tl.exp(z), 0.0), 0), mass)
        numbers = tl.where(k == 0, tl.sum(mass, 0), 0.0)
        masses = tl.sum(_meet(numbers, shared_ptr, counter_ptr, turn, PROGRAMS, ROUND), 1).to(tl.float64)
        target = tl.load(uniform_ptr + b * UNIFORMS + count % UNIFORMS) * tl.sum(masses, 0)
        # A number that rounds to the whole sum falls into the last part that keeps a token; so do blocks and tokens.
        last = tl.max(tl.where(masses > 0, programs, 0), 0)
        chosen = tl.minimum(tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0), last)
        writes = c == chosen
        before = tl.sum(tl.where(programs < c, masses, 0.0), 0)
        last = tl.max(tl.where(mass > 0, block, 0), 0)
        exact = mass.to(tl.float64)
        j = tl.minimum(tl.sum((tl.cumsum(exact, 0) + before <= target).to(tl.int32), 0), last)
        before += tl.sum(tl.where(block < j, exact, 0.0), 0)
        v = first + j * BLOCK_V + i
        z = (tl.load(logits_ptr + v, mask=v < end, other=float("-inf")) - largest) * inverse
        share = tl.where(z >= threshold, tl.exp(z), 0.0).to(tl.float64)
        passed = tl.sum((tl.cumsum(share, 0) + before <= target).to(tl.int32), 0)
        token = (first + j * BLOCK_V + tl.minimum(passed, tl.max(tl.where(share > 0, i, 0), 0))).to(tl.int64)

    if writes:
        token = tl.minimum(tl.maximum(token, 0), PIECES - 1)
        finite = (largest < float("inf")) & (largest > float("-inf"))
        tl.store(drawn_ptr + count % UNIFORMS * tl.num_programs(1) + b, tl.where(finite, token, -1))
        tl.store(token_ptr + b, token)
        tl.store(recent_ptr + b * RING + length % RING, token)
        tl.store(length_ptr + b, length + 1)
        tl.store(count_ptr + b, count + 1)
        if ADVANCE:
            position = tl.load(position_ptr + b)
            tl.store(position_ptr + b, tl.where(position < 0, position, position + 1))
    if PROGRAMS > 1:
        meetings = turn if GREEDY else turn + 1
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == (meetings + 1) * PROGRAMS - 1:
            tl.store(counter_ptr, 0)  # nobody waits any more
