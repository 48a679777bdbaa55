"""The m-th largest key of each row of a tile, by counting: nothing is sorted, nothing leaves the
registers.

A bracket [low, high) holds the key sought: at least m keys are >= low, fewer than m are >= high.
Each step counts against two pivots in one reduction, placed by interpolation so that they enclose
the rank; a step that narrows too little is followed by one that cuts the bracket in three. Rows of
one matrix resemble each other, so the last row's answer is the first guess: about 5 steps a row on
Gaussian weights, where halving blindly takes 31. The result does not depend on the path.
"""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels.keys import MAX_KEY, PAD

NO_GUESS = PAD
OCTAVE = tl.constexpr(1 << 23)  # in keys
NEAR = tl.constexpr(1 << 19)  # a sixteenth of an octave: how far rows of one matrix differ


@triton.jit
def first_pivots(high, guess):
    """Pivots of the first step: close round the guess, or within octaves of the maximum."""
    guessed = guess != NO_GUESS
    center = tl.where(guessed, guess, high - 2 * OCTAVE)
    reach = tl.where(guessed, NEAR, OCTAVE)
    return center - reach, center + reach


@triton.jit
def next_pivots(low, count_low, high, count_high, m, weak):
    """Pivots of a later step; ``weak`` says that the last one narrowed too little."""
    width = (high - low).to(tl.uint32, bitcast=True).to(tl.float32)
    above = (m - count_high).to(tl.float32)
    below = (count_low - m).to(tl.float32)
    per_rank = width / (above + below)
    spread = (0.5 * tl.sqrt(tl.minimum(above, below)) + 0.5) * per_rank
    far = tl.where(weak, width * 0.6667, above * per_rank + spread)
    near = tl.where(weak, width * 0.3333, above * per_rank - spread)
    first = high - tl.minimum(far, 4.2e9).to(tl.uint32).to(tl.int32, bitcast=True)
    second = high - tl.maximum(near, 0.0).to(tl.uint32).to(tl.int32, bitcast=True)
    return first, second


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
