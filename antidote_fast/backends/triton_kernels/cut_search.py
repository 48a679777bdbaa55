"""Where a selection over whole tensors cuts: small kernels between the readings of ``cut.py``.

They work on a sample and on histograms, and leave what they find in ``state``.
"""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels import cut_table as tables
from antidote_fast.backends.triton_kernels.keys import BF16, CANONICAL_NAN, FP16, FP32, MAX_KEY, PAD

# What is known of each selection, int64.
LOW = tl.constexpr(0)  # the m-th largest is expected in [LOW, HIGH], near TARGET
TARGET = tl.constexpr(1)
HIGH = tl.constexpr(2)
HEAVY = tl.constexpr(3)  # whether many keys may equal one of these three
ABOVE = tl.constexpr(4)  # keys counted > HIGH
AT_LEAST = tl.constexpr(5)  # keys counted >= LOW
BIN = tl.constexpr(6)  # the first key of the bin that holds the m-th largest
LEFT = tl.constexpr(7)  # its rank in the bin
ATOM = tl.constexpr(8)  # the key of the bin that may be many
KEY = tl.constexpr(9)  # the m-th largest key
TIE_PROGRAM = tl.constexpr(10)  # ties are taken in this program's stretch from number SKIP on,
SKIP = tl.constexpr(11)  # in all of the stretches behind, in none before
EDGE = tl.constexpr(12)
LAST = tl.constexpr(13)  # the last key of the bin that is not yet counted as above
STATE = tl.constexpr(16)

SHIFT = tl.constexpr(12)
SUB_BINS = tl.constexpr(1 << 12)
BINS = tl.constexpr(1 << 20)  # keys are signed: the upper half serves scores
ZERO_BIN = tl.constexpr(1 << 19)
SCAN = tl.constexpr(2048)  # bins at a time


@triton.jit
def keys_at(entry, norm, row, column, present, DTYPE: tl.constexpr, DELTA: tl.constexpr, VEC):
    """Keys of single weights, each of the tensor with that entry of the table."""
    raw = tables.load_raw(
        tl.load(entry + tables.W),
        row,
        tl.load(entry + tables.W_STRIDE),
        column,
        present,
        0,
        DTYPE,
        VEC,
    )
    base = raw
    if DELTA:
        address, stride = tl.load(entry + tables.BASE), tl.load(entry + tables.BASE_STRIDE)
        base = tables.load_raw(address, row, stride, column, present, 0, DTYPE, VEC)
    return tables.load_keys(raw, base, norm, column, present, 0, DTYPE, DELTA, VEC)


@triton.jit
def cut_sample_kernel(
    table,
    sample,
    SAMPLE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """The key of one weight of each of SAMPLE equal stretches, or of all where they are fewer.

    GROUPED is what VEC is elsewhere; nothing here loads vectors. Where in its stretch is hashed,
    not random: the same on every run, and never a column.
    """
    which = tl.program_id(1)
    total = tl.load(table + tables.TOTAL + which)
    size = tl.minimum(total, SAMPLE)
    number = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    present = number < size
    begin = number * total // tl.maximum(size, 1)
    end = (number + 1) * total // tl.maximum(size, 1)
    mixed = number.to(tl.uint32) * 2654435761
    mixed = (mixed ^ (mixed >> 15)) * 2246822519
    mixed = ((mixed ^ (mixed >> 13)) * 3266489917) >> 1
    place = begin + mixed.to(tl.int64) % tl.maximum(end - begin, 1)

    tensors = tl.load(table + tables.TENSORS)
    tensor = tables.last_not_above(table, tensors, tables.FIRST + which, place)
    entry = tables.entry_of(table, tensor)
    columns = tl.load(entry + tables.COLUMNS)
    place -= tl.load(entry + tables.FIRST + which)
    row = place // columns
    column = place - row * columns
    norm = tl.load(entry + tables.NORM + which)
    if DTYPE == tables.MIXED:
        code = tl.load(entry + tables.CODE)
        key = keys_at(entry, norm, row, column, present & (code == BF16), BF16, DELTA, GROUPED)
        other = keys_at(entry, norm, row, column, present & (code == FP16), FP16, DELTA, GROUPED)
        key = tl.maximum(key, other)
        other = keys_at(entry, norm, row, column, present & (code == FP32), FP32, DELTA, GROUPED)
        key = tl.maximum(key, other)
    else:
        key = keys_at(entry, norm, row, column, present, DTYPE, DELTA, GROUPED)
    tl.store(sample + which * SAMPLE + number, key, mask=present)


@triton.jit
def cut_bracket_kernel(table, state, sample, margin, SAMPLE: tl.constexpr):
    """Bracket the m-th largest key by the sample.

    Args: margin: how far the ends are from the rank expected, in standard deviations.
    """
    which = tl.program_id(0)
    state += which * STATE
    total = tl.load(table + tables.TOTAL + which)
    taken = tl.load(table + tables.TAKEN + which)
    size = tl.minimum(total, SAMPLE)
    number = tl.arange(0, SAMPLE)
    key = tl.load(sample + which * SAMPLE + number, mask=number < size, other=PAD)
    rank = (taken * size + total - 1) // tl.maximum(total, 1)
    share = rank.to(tl.float32) / tl.maximum(size, 1).to(tl.float32)
    reach = margin * tl.sqrt(size.to(tl.float32) * share * tl.maximum(1.0 - share, 0.0))
    reach = tl.where(size == total, 0, tl.maximum(reach.to(tl.int64) + 3, 0))
    end = tl.arange(0, 4)  # the bracket's low end, the target, its high end twice
    ranks = rank + tl.where(end == LOW, reach, tl.where(end == TARGET, 0, -reach))
    found = tl.full([4], -(1 << 31), tl.int64)
    step = tl.full([], 1 << 31, tl.int64)
    while step > 0:  # from the top bit down: the largest key that so many reach
        reached = key[None, :] >= (found + step).to(tl.int32)[:, None]
        found += tl.where(tl.sum(reached.to(tl.int32), 1) >= ranks, step, 0)
        step = step >> 1
    equal = key[None, :] == found.to(tl.int32)[:, None]
    ties = tl.max(tl.sum(equal.to(tl.int32), 1), 0)
    found = tl.where(ranks > size, PAD + 1, found)
    found = tl.where(ranks < 1, CANONICAL_NAN, found)
    found = tl.where(taken > 0, found, MAX_KEY)
    tl.store(state + end, found, mask=end <= HIGH)
    tl.store(state + HEAVY, ((ties > 2) | (size == total)).to(tl.int64))
    tl.store(state + KEY, MAX_KEY - 1)  # what holds where nothing is taken
    tl.store(state + TIE_PROGRAM, MAX_KEY)


@triton.jit
def missed(table, state, which):
    """Whether the m-th largest key is outside the bracket of the sample."""
    taken = tl.load(table + tables.TAKEN + which)
    above, at_least = tl.load(state + ABOVE), tl.load(state + AT_LEAST)
    return (taken > 0) & ((taken <= above) | (taken > at_least))


@triton.jit
def cut_bin_kernel(table, state, histograms):
    """Find the bin of the m-th largest key, from the top of the bracket, or of all bins."""
    which = tl.program_id(0)
    state += which * STATE
    histogram = histograms + which.to(tl.int64) * BINS
    left = tl.load(table + tables.TAKEN + which)
    if left > 0:
        far = missed(table, state, which)
        low, high = tl.load(state + LOW), tl.load(state + HIGH)
        left = tl.where(far, left, left - tl.load(state + ABOVE))
        lowest = tl.where(far, 0, (low >> SHIFT) + ZERO_BIN)
        end = tl.where(far, BINS, (high >> SHIFT) + ZERO_BIN + 1)
        found = end * 0 - 1
        while (found < 0) & (end > lowest):
            bins = end - SCAN + tl.arange(0, SCAN)
            counts = tl.load(histogram + bins, mask=bins >= lowest, other=0)
            total = tl.sum(counts, 0)
            if total >= left:
                found, left = last_holding(bins, counts, left)
            else:
                left -= total
            end -= SCAN
        first = (found - ZERO_BIN) << SHIFT
        atom = first
        for i in tl.static_range(3):  # the order of LOW, TARGET, HIGH; TARGET is the likeliest
            likely = tl.load(state + (i + 2) % 3)
            atom = tl.where((likely >> SHIFT) == (first >> SHIFT), likely, atom)
        tl.store(state + BIN, first)
        last = first + SUB_BINS - 1
        tl.store(state + LAST, tl.where(far, last, tl.minimum(last, high)))
        tl.store(state + LEFT, left)
        tl.store(state + ATOM, atom)


@triton.jit
def last_holding(place, counts, rank):
    """The place that holds the rank-th from the end of a tile of counts, and its rank there."""
    behind = tl.cumsum(counts, 0, reverse=True)
    found = tl.max(tl.where(behind >= rank, place, -1), 0)
    return found, rank - tl.sum(tl.where(place > found, counts, 0), 0)


@triton.jit(do_not_specialize=["programs"])
def cut_sum_kernel(own_counts, sub_bins, programs, R: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """sub_bins [selections, SUB_BINS] int64 = the sum of own_counts over programs."""
    which = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    total = tl.full([R, BLOCK_SIZE], 0, tl.int64)
    begin = 0
    while begin < programs:
        program = begin + tl.arange(0, R)
        place = (which * programs + program)[:, None] * SUB_BINS + column[None, :]
        inside = tl.broadcast_to((program < programs)[:, None], (R, BLOCK_SIZE))
        total += tl.load(own_counts + place, mask=inside, other=0).to(tl.int64)
        begin += R
    tl.store(sub_bins + which * SUB_BINS + column, tl.sum(total, 0))


@triton.jit(do_not_specialize=["programs"])
def cut_key_kernel(table, state, sub_bins, own_counts, programs, PROGRAMS: tl.constexpr):
    """Find the m-th largest key, and from which tie on they are taken.

    Args: PROGRAMS: the programs of the counting passes, rounded up to a power of two.
    """
    which = tl.program_id(0)
    state += which * STATE
    if tl.load(table + tables.TAKEN + which) > 0:
        place = tl.arange(0, SUB_BINS).to(tl.int64)
        counts = tl.load(sub_bins + which * SUB_BINS + place)
        sub_bin, ties = last_holding(place, counts, tl.load(state + LEFT))
        program = tl.arange(0, PROGRAMS).to(tl.int64)
        own = own_counts + (which * programs + program) * SUB_BINS + sub_bin
        counts = tl.load(own, mask=program < programs, other=0).to(tl.int64)
        tie_program, ties = last_holding(program, counts, ties)
        tl.store(state + KEY, tl.load(state + BIN) + sub_bin)
        tl.store(state + TIE_PROGRAM, tie_program)
        tl.store(state + SKIP, tl.sum(tl.where(program == tie_program, counts, 0), 0) - ties)
