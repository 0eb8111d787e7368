"""From logits to a token in one kernel, by the rules and in the order of `inference/sampling.py`.

A vocabulary is cut into stretches, one program each, and the programs of a text meet several times: each sends a few
numbers to the others, and waits for theirs (`_meet`). They are no more than the GPU's multiprocessors, and a
cooperative launch makes sure that all run at the same time. No program adds floats in an order that changes, so one
machine gives the same token for the same logits and the same random number.

Sorting 128,000 logits would take as long as a small model's step. What top_k and top_p keep is all tokens above a
threshold, so the threshold is searched: a pass over the logits adds up the probabilities (or counts the tokens) above
each of some thresholds. The next ones lie between the two where the sum passes its target, around a guess of the place,
and the closer together the more tokens the guess rests on. The search ends when no more than one token is left between
the two, or when they are closer than a millionth of the range of the logits. Tokens that lie closer are kept together,
as equal ones.

The time is that of the passes and meetings. So a program that has few logits keeps them in registers, and the last pass
of the search for top_p also says what each program has above the threshold, of which one draws the token.
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
MEETINGS: tl.constexpr = tl.constexpr(128)  # more than a launch has: 2 searches of 32 passes, and 2


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
def _meet(numbers, messages_ptr, launch, turn, PROGRAMS: tl.constexpr, ROUND: tl.constexpr):
    """Send L numbers to the other programs of a text, and return those of all: (ROUND, L), zeros behind the end.

    A message is one word of 64 bits: the number, and above it the meeting to which it belongs. A word arrives as a
    whole, so a program needs no barrier and no counter. It reads the words of all until each is of this meeting. (LL,
    NCCL's protocol for short messages, does the same.)

    Args:
        messages_ptr: int64 (2, PROGRAMS, L). Meetings take turns with the halves: when a program writes to a half
            again, all have read it.
        launch: a number that differs from that of the launch before.
        turn: the number of the meeting in this launch, less than MEETINGS.
    """
    if PROGRAMS == 1:
        return numbers[None, :]
    LENGTH: tl.constexpr = numbers.shape[0]
    i = tl.arange(0, LENGTH)
    half = messages_ptr + (turn % 2) * (PROGRAMS * LENGTH)
    meeting = ((launch & 0x7FFFFF) + 1).to(tl.int64) * MEETINGS + turn  # positive, and not the zero of new memory
    words = (meeting << 32) | (numbers.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    tl.atomic_xchg(half + tl.program_id(0) * LENGTH + i, words, sem="relaxed", scope="gpu")
    c = tl.arange(0, ROUND)[:, None]
    sent = half + c * LENGTH + i[None, :]
    is_sent = (c < PROGRAMS) & (i >= 0)[None, :]
    got = tl.load(sent, mask=is_sent, other=0, volatile=True)
    while tl.max(tl.max((is_sent & ((got >> 32) != meeting)).to(tl.int32), 1), 0) > 0:
        got = tl.load(sent, mask=is_sent, other=0, volatile=True)
    return got.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _load(logits_ptr, v, end, largest, inverse):
    """Return z of the logits v, -infinity from `end` on."""
    return (tl.load(logits_ptr + v, mask=v < end, other=float("-inf")) - largest) * inverse


@triton.jit
def _add(sums, z, thresholds, COUNT: tl.constexpr):
    """Add up what lies above each threshold; a lane has all thresholds of a logit."""
    value = tl.full(z.shape, 1.0, tl.float32) if COUNT else tl.exp(z)
    return sums + (z[None, :] >= thresholds[:, None]).to(tl.float32) * value[None, :]


@triton.jit
def _search(
    z, logits_ptr, first, end, largest, inverse, low, high, target, messages_ptr, launch, turn,
    COUNT: tl.constexpr, THRESHOLDS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCKS: tl.constexpr, PIECES: tl.constexpr,
    PROGRAMS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Find the largest threshold of z = (logit - largest) * inverse with at least `target` above it.

    Args:
        z: of the first block of this program, whose logits are first to end.
        low, high: all of the target is above low, and nothing above high.
        target: a number of tokens with COUNT, else a share of the probability above low.

    Returns:
        The threshold, what each program has above it (ROUND,), and the number of the next meeting.
    """
    i = tl.arange(0, BLOCK_V)
    k = tl.arange(0, THRESHOLDS)
    resolution = tl.maximum((high - low) * 1e-6, 1e-30)
    # Tokens below log((1 - target) / PIECES) have together less than 1 - target, and the largest alone has 1.
    bottom = low
    start = low if COUNT else tl.maximum(low, tl.log((1 - target) / PIECES))
    step = (high - start) / THRESHOLDS
    parts = tl.zeros([ROUND], tl.float32)
    above_low, above_high, closest = 3e38, 0.0, 1.0
    passes = 0
    # The limit is never reached: of two passes, one divides the distance by four or more.
    while (passes == 0) | ((high - low > resolution) & (above_low - above_high > 1.5 * closest) & (passes < 32)):
        thresholds = tl.where(k == 0, bottom, start + step * k)
        sums = tl.zeros([THRESHOLDS, BLOCK_V], tl.float32)
        if BLOCKS == 1:
            sums = _add(sums, z, thresholds, COUNT)
        else:
            for v0 in tl.range(first, end, BLOCK_V, num_stages=3):
                sums = _add(sums, _load(logits_ptr, v0 + i, end, largest, inverse), thresholds, COUNT)
        numbers = _meet(tl.sum(sums, 1), messages_ptr, launch, turn, PROGRAMS, ROUND)
        total = tl.sum(numbers, 0)
        if not COUNT:
            target = tl.where(passes == 0, target * tl.max(total, 0), target)  # the first threshold is low
        enough = total >= target
        passed = tl.sum(enough.to(tl.int32), 0)
        low = tl.max(tl.where(enough, thresholds, low), 0)
        high = tl.min(tl.where(enough, high, thresholds), 0)
        above_low = tl.min(tl.where(enough, total, above_low), 0)
        above_high = tl.max(tl.where(enough, above_high, total), 0)
        parts = tl.where(passed > 0, tl.sum(tl.where((k == passed - 1)[None, :], numbers, 0.0), 1), parts)
        # Where the target is passed, as a share of the distance, if tokens lie evenly between low and high. The place
        # strays from it by up to 0.5 / sqrt(tokens), one deviation. Behind a wrong guess all of the distance is next.
        closest = 1.0 if COUNT else tl.exp(low)  # a token between low and high has at least this
        width, between = high - low, tl.maximum(above_low - above_high, closest)
        guess = (above_low - target) / between
        if not COUNT:
            guess += guess * (1 - guess) * tl.minimum(width / 2, 1.0)
        stray = 1.25 * tl.sqrt(closest / between) + 0.1 * tl.minimum(width, 1.0)
        stray = tl.where((passed == 0) | (passed == THRESHOLDS), 1.0, stray)
        least = tl.maximum(guess - stray, 0.5 / THRESHOLDS)
        most = tl.minimum(guess + stray, 1 - 0.5 / THRESHOLDS)
        bottom = low + width * least
        start, step = bottom, width * (most - least) / (THRESHOLDS - 1)
        passes += 1
        turn += 1
    return low, parts, turn


@triton.jit
def sample(
    drawn_ptr, token_ptr, position_ptr, recent_ptr, length_ptr, uniform_ptr, count_ptr, logits_ptr, messages_ptr,
    launch_ptr, options_ptr, MESSAGES,
    V: tl.constexpr, PIECES: tl.constexpr, PROGRAMS: tl.constexpr, ROUND: tl.constexpr,
    THRESHOLDS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCKS: tl.constexpr, ROUND_BLOCKS: tl.constexpr,
    GREEDY: tl.constexpr, SEARCH_K: tl.constexpr, SEARCH_P: tl.constexpr, RING: tl.constexpr, UNIFORMS: tl.constexpr,
    ADVANCE: tl.constexpr,
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
        messages_ptr: int64 (B, MESSAGES), see `_meet`. A row belongs to a text however its logits are divided, so the
            words there are of earlier launches.
        launch_ptr: int32 (B,), counts the launches.
        BLOCKS: blocks of BLOCK_V logits of a program.
    """
    # It does not start early, nor lets it the next step, whose kernels read positions and tokens before they wait.
    c, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    logits_ptr += b * V
    messages_ptr += b * MESSAGES
    first = c * (BLOCKS * BLOCK_V)
    end = tl.minimum(first + BLOCKS * BLOCK_V, PIECES)
    i = tl.arange(0, BLOCK_V)
    k = tl.arange(0, THRESHOLDS)
    programs = tl.arange(0, ROUND)
    # Everything that is needed later is loaded now: the memory takes as long to answer as half a meeting.
    launch = tl.load(launch_ptr + b)
    count = tl.load(count_ptr + b)
    length = tl.load(length_ptr + b)
    position = tl.load(position_ptr + b)
    logits = tl.load(logits_ptr + first + i, mask=first + i < end, other=float("-inf"))
    if not GREEDY:
        inverse = tl.div_rn(1.0, tl.load(options_ptr + TEMPERATURE))
        top_k, top_p, min_p = tl.load(options_ptr + TOP_K), tl.load(options_ptr + TOP_P), tl.load(options_ptr + MIN_P)
        uniform = tl.load(uniform_ptr + b * UNIFORMS + count % UNIFORMS)

    # 1. The largest and the smallest logit, and where the first of the largest is. A NaN counts as infinite.
    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK_V], float("inf"), tl.float32)
    place = tl.zeros([BLOCK_V], tl.int32)
    for j in tl.range(BLOCKS, num_stages=3):
        v = first + j * BLOCK_V + i
        if BLOCKS > 1:
            logits = tl.load(logits_ptr + v, mask=v < end, other=float("-inf"))
        value = tl.where(logits != logits, float("inf"), logits)
        place = tl.where(value > peak, v, place)
        peak = tl.maximum(peak, value)
        bottom = tl.minimum(bottom, tl.where(v < end, value, float("inf")))
    top = tl.max(peak, 0)
    place = tl.min(tl.where(peak == top, place, PIECES - 1), 0)
    numbers = tl.where(k == 0, top, tl.where(k == 1, tl.min(bottom, 0), place.to(tl.float32)))
    numbers = _meet(numbers, messages_ptr, launch, 0, PROGRAMS, ROUND)  # places are exact: below 2**24
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
        z = (logits - largest) * inverse  # of the only block of this program, where it has one
        threshold = tl.maximum((smallest - largest) * inverse, -RANGE)
        high = -threshold * 1e-6 + 1e-30  # nothing is above 0
        if SEARCH_K:
            threshold, _, turn = _search(
                z, logits_ptr, first, end, largest, inverse, threshold, high, top_k,
                messages_ptr, launch, turn, True, THRESHOLDS, BLOCK_V, BLOCKS, PIECES, PROGRAMS, ROUND,
            )  # fmt: skip
        masses = tl.zeros([ROUND], tl.float32)
        if SEARCH_P:
            threshold, masses, turn = _search(
                z, logits_ptr, first, end, largest, inverse, threshold, high, top_p,
                messages_ptr, launch, turn, False, THRESHOLDS, BLOCK_V, BLOCKS, PIECES, PROGRAMS, ROUND,
            )  # fmt: skip
        known = SEARCH_P and min_p <= threshold  # the search has found what each program has above its threshold
        threshold = tl.maximum(threshold, min_p) if SEARCH_K or SEARCH_P else min_p

        # 3. The token where the sum of what stays passes its share. `mass` is of each block of this program, `masses`
        # are of each program.
        block = tl.arange(0, ROUND_BLOCKS)
        mass = tl.zeros([ROUND_BLOCKS], tl.float32)
        for j in tl.range(BLOCKS, num_stages=3):
            if BLOCKS > 1:
                z = _load(logits_ptr, first + j * BLOCK_V + i, end, largest, inverse)
            mass = tl.where(block == j, tl.sum(tl.where(z >= threshold, tl.exp(z), 0.0), 0), mass)
        if not known:
            numbers = _meet(tl.where(k == 0, tl.sum(mass, 0), 0.0), messages_ptr, launch, turn, PROGRAMS, ROUND)
            masses = tl.sum(numbers, 1)
            turn += 1
        masses = masses.to(tl.float64)
        target = uniform * tl.sum(masses, 0)
        # A number that rounds to the whole sum falls into the last part that keeps a token; so do blocks and tokens.
        last = tl.max(tl.where(masses > 0, programs, 0), 0)
        chosen = tl.minimum(tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0), last)
        writes = c == chosen
        before = tl.sum(tl.where(programs < c, masses, 0.0), 0)
        last = tl.max(tl.where(mass > 0, block, 0), 0)
        exact = mass.to(tl.float64)
        j = tl.minimum(tl.sum((tl.cumsum(exact, 0) + before <= target).to(tl.int32), 0), last)
        before += tl.sum(tl.where(block < j, exact, 0.0), 0)
        if BLOCKS > 1:
            z = _load(logits_ptr, first + j * BLOCK_V + i, end, largest, inverse)
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
            tl.store(position_ptr + b, tl.where(position < 0, position, position + 1))
    if c == 0:
        tl.store(launch_ptr + b, launch + 1)  # all programs have read it: each has sent a message that says so
