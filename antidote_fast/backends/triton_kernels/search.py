"""The m-th largest key of each row of a tile, by counting: nothing is sorted, nothing leaves the
registers.

A bracket [low, high) holds the key sought: at least m keys are >= low, fewer than m are >= high.
Each step counts against two pivots in one reduction. The first two lie round a guess: the last
row's answer, as rows of one matrix resemble each other, or an estimate from the mean. Until both
ends of the bracket are known they move outwards; then they are placed by interpolation so that they
enclose the rank, and a step that narrows too little is followed by one that cuts the bracket in
three. That is about 5 steps a row on Gaussian weights (simulated), where halving blindly takes 31.
The result does not depend on the path.
"""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels.keys import MAX_KEY, PAD

NO_GUESS = PAD
TOP = tl.constexpr(0x7FC00001)  # above every key
NEAR = tl.constexpr(1 << 19)  # a sixteenth of an octave: how far rows of one matrix differ
ROUGH = tl.constexpr(1 << 22)  # half an octave: how far off an estimate is
FARTHEST = tl.constexpr(1 << 27)


@triton.jit
def estimate(total, num_valid, m):
    """Where the m-th largest of ``num_valid`` magnitudes with this sum lies, were they Gaussian.

    All [R]; returns keys. The quantile is that of Abramowitz and Stegun, 26.2.22.
    """
    count = tl.maximum(num_valid, 1).to(tl.float32)
    share = tl.minimum(tl.maximum(m.to(tl.float32) / count, 1e-7), 1.0)
    # The logarithm as the bits of a float have it, to a tenth: no library function, no fma.
    log2 = ((0.5 * share).to(tl.int32, bitcast=True) - 0x3F800000).to(tl.float32) / 8388608.0
    u = tl.sqrt(-1.3863 * log2)
    quantile = u - (2.30753 + 0.27061 * u) / (1.0 + 0.99229 * u + 0.04481 * u * u)
    value = total / count * 1.2533 * tl.maximum(quantile, 0.0)
    return tl.maximum(value.to(tl.int32, bitcast=True), 0)


@triton.jit
def next_pivots(low, count_low, high, count_high, m, weak, reach, LOWEST: tl.constexpr):
    """Pivots of a later step; ``weak`` says that the last one narrowed too little.

    Returns:
        The lower, the higher, and how far the ones after these reach.
    """
    width = (high - low).to(tl.uint32, bitcast=True)
    half = (width >> 1).to(tl.int32, bitcast=True)
    # Outwards from the one end that is known, never past half of what is left.
    near, far = tl.minimum(2 * reach, half >> 1), tl.minimum(8 * reach, half)
    open_above, open_below = high == TOP, low == LOWEST
    # Between both.
    width = width.to(tl.float32)
    above = (m - count_high).to(tl.float32)
    below = (count_low - m).to(tl.float32)
    per_rank = width / (above + below)
    spread = (0.5 * tl.sqrt(tl.minimum(above, below)) + 0.5) * per_rank
    down_first = tl.where(weak, width * 0.6667, above * per_rank + spread)
    down_second = tl.where(weak, width * 0.3333, above * per_rank - spread)
    first = high - tl.minimum(down_first, 4.2e9).to(tl.uint32).to(tl.int32, bitcast=True)
    second = high - tl.maximum(down_second, 0.0).to(tl.uint32).to(tl.int32, bitcast=True)
    first = tl.where(open_above, low + near, tl.where(open_below, high - far, first))
    second = tl.where(open_above, low + far, tl.where(open_below, high - near, second))
    return first, second, tl.minimum(8 * reach, FARTHEST)


@triton.jit
def inside(pivot, low, high):
    """The pivot, moved into (low, high)."""
    return tl.minimum(tl.maximum(pivot, low + 1), high - 1)


@triton.jit
def narrowed(low, count_low, high, count_high, first, count_first, second, count_second, m):
    """The bracket after counting at two pivots, and whether it narrowed too little."""
    width = (high - low).to(tl.uint32, bitcast=True)
    up = count_second >= m
    middle = count_first >= m
    new_low = tl.where(up, second, tl.where(middle, first, low))
    new_count_low = tl.where(up, count_second, tl.where(middle, count_first, count_low))
    new_high = tl.where(up, high, tl.where(middle, second, first))
    new_count_high = tl.where(up, count_high, tl.where(middle, count_second, count_first))
    left = (new_high - new_low).to(tl.uint32, bitcast=True)
    return new_low, new_count_low, new_high, new_count_high, left > (width >> 2)


@triton.jit
def count_at_two(keys, first, second):
    """How many keys of each row are >= either pivot: [R, G, 8], [R], [R] -> two of [R].

    Both counts share one reduction: a row of a tile is under 2**15 keys.
    """
    hits = tl.where(keys >= first[:, None, None], 1, 0)
    hits = tl.where(keys >= second[:, None, None], 65537, hits)  # it is the higher one
    both = tl.sum(tl.sum(hits, 2), 1)
    return both & 0xFFFF, both >> 16


@triton.jit
def search(keys, num_valid, m, guess, LOWEST: tl.constexpr):
    """A threshold for the m largest keys of each row.

    Args:
        keys: [R, G, 8] int32, PAD where there is no weight.
        num_valid: [R], keys of each row that are none; at least ``m``.
        m: [R].
        guess: [R], where the threshold may lie, or NO_GUESS.
        LOWEST: at or below every valid key, above PAD.

    Returns:
        threshold [R] and how many keys are at or above it. If that is m, they are the ones;
        otherwise the threshold is the m-th largest key and some of those equal to it are too many.
        With m = 0 nothing is at or above it.
    """
    low = tl.where(m == 0, MAX_KEY, LOWEST)
    high = tl.zeros_like(low) + TOP
    count_low = tl.where(m == 0, 0, num_valid)
    count_high = tl.zeros_like(low)
    weak = m < 0
    unknown = guess == NO_GUESS
    reach = tl.where(unknown, ROUGH, NEAR)
    if tl.max(unknown.to(tl.int32), 0) > 0:
        value = tl.maximum(keys, 0).to(tl.float32, bitcast=True)
        total = tl.sum(tl.sum(value, 2), 1)
        guess = tl.where(unknown, estimate(total, num_valid, m), guess)
    first, second = guess - reach, guess + reach
    active = (count_low != m) & (low + 1 < high)
    while tl.max(active.to(tl.int32), 0) > 0:
        first = inside(first, low, high)
        second = inside(second, low, high)
        count_first, count_second = count_at_two(keys, first, second)
        new_low, new_count_low, new_high, new_count_high, slow = narrowed(
            low, count_low, high, count_high, first, count_first, second, count_second, m
        )
        low = tl.where(active, new_low, low)
        count_low = tl.where(active, new_count_low, count_low)
        high = tl.where(active, new_high, high)
        count_high = tl.where(active, new_count_high, count_high)
        weak = slow & (weak == 0)
        active = (count_low != m) & (low + 1 < high)
        first, second, reach = next_pivots(low, count_low, high, count_high, m, weak, reach, LOWEST)
    return low, count_low


@triton.jit
def tie_cut(keys, group, threshold, too_many, surplus):
    """The first column from which ties are taken, [R], where ``surplus`` of them are too many.

    The leftmost ``surplus`` keys equal to the threshold stay; rows without ``too_many`` keep none.
    Cuts the range of columns in three a step. A column is its group's 8 and a constant lane, so
    that no register holds one a key.
    """
    lane = tl.arange(0, 8)[None, None, :]
    tied = threshold[:, None, None]
    low = tl.zeros_like(threshold)  # at most surplus ties lie left of it
    high = tl.where(too_many, 8 * group.shape[0], 1)  # more than surplus do
    while tl.max(high - low, 0) > 1:
        third = tl.maximum((high - low) // 3, 1)
        first = low + third
        second = tl.minimum(first + third, high)
        to_first = first[:, None, None] - 8 * group[None, :, None]
        to_second = second[:, None, None] - 8 * group[None, :, None]
        hits = ((keys == tied) & (lane < to_first)).to(tl.int32)
        hits += ((keys == tied) & (lane < to_second)).to(tl.int32) << 16
        both = tl.sum(tl.sum(hits, 2), 1)
        fits_first = (both & 0xFFFF) <= surplus
        fits_second = (both >> 16) <= surplus
        active = low + 1 < high
        new_low = tl.where(fits_second, second, tl.where(fits_first, first, low))
        new_high = tl.where(fits_second, high, tl.where(fits_first, second, first))
        low = tl.where(active, tl.minimum(new_low, high - 1), low)
        high = tl.where(active, new_high, high)
    return low


@triton.jit
def top(keys, group, num_valid, m, guess, LOWEST: tl.constexpr):
    """The last m of each row in the order (key, column).

    Args:
        group: [G] int32, the numbers of the groups of 8 columns; the rest as in :func:`search`.

    Returns:
        The bits of each group, [R, G] int32, the threshold [R] for the next rows to start from,
        and whether some keys equal to it were left, [R].
    """
    threshold, count = search(keys, num_valid, m, guess, LOWEST)
    lane = tl.arange(0, 8)[None, None, :]
    bar = threshold[:, None, None]
    too_many = count > m
    bits = tl.sum((keys >= bar).to(tl.int32) << lane, 2)
    if tl.max(too_many.to(tl.int32), 0) > 0:  # ties: the rightmost ones go
        cut = tie_cut(keys, group, threshold, too_many, count - m)
        left = lane < cut[:, None, None] - 8 * group[None, :, None]
        bits -= tl.sum(((keys == bar) & left).to(tl.int32) << lane, 2)
    return bits, threshold, too_many
