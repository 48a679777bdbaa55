"""Tensor and global scope on the device: kernels of ``cut.py``, which says how they follow.

All tensors of the list are one sequence of tiles: a tile is ``GROUPS`` groups of 8 columns that
follow each other in flat order, across rows where rows are short, so one tile size serves every
shape. A program takes a stretch of tiles, the same one in every pass; that is what makes the order
of ties known without a count for each tile.
"""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels.keys import (
    BF16,
    CANONICAL_NAN,
    FP16,
    FP32,
    MAX_KEY,
    PAD,
    SIGNED,
    keys_of,
    score_of_key,
)

MIXED = tl.constexpr(4)  # DTYPE of a list that holds several: each tensor's own is in the table

# The table of int64 on the device: a header, a row a tensor, and a row that only ends the tiles.
TENSORS = tl.constexpr(0)
TILES = tl.constexpr(1)
TAKEN = tl.constexpr(2)  # how many of the last each selection takes: itself, then the protected
TOTAL = tl.constexpr(4)  # of how many
FLAGS = tl.constexpr(6)
HEADER = tl.constexpr(8)

FIRST = tl.constexpr(0)  # weights of the tensors before, in each of the two selections
NORM = tl.constexpr(2)  # addresses of both norms, 0 where absent
W = tl.constexpr(4)
W_STRIDE = tl.constexpr(5)  # of rows; in groups of 8 columns where VEC, as is the base's
BASE = tl.constexpr(6)
BASE_STRIDE = tl.constexpr(7)
BITS = tl.constexpr(8)
THRESHOLDS = tl.constexpr(9)
ROWS = tl.constexpr(10)
COLUMNS = tl.constexpr(11)
CODE = tl.constexpr(12)  # of the dtype
FIRST_TILE = tl.constexpr(13)
FIELDS = tl.constexpr(16)

# Flags.
WRITE = tl.constexpr(1)
SMALLEST = tl.constexpr(2)  # what the last m leave is removed
WANT_BITS = tl.constexpr(4)
WANT_EDGE = tl.constexpr(8)  # the largest key removed

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
STATE = tl.constexpr(16)

SHIFT = tl.constexpr(12)
SUB_BINS = tl.constexpr(1 << 12)
BINS = tl.constexpr(1 << 20)  # keys are signed: the upper half serves scores
ZERO_BIN = tl.constexpr(1 << 19)
SCAN = tl.constexpr(4096)  # bins at a time

# What a counting pass counts.
NEAR = tl.constexpr(0)  # into bins, the keys where the sample expects the cut
FAR = tl.constexpr(1)  # all other keys, if the cut was not there
INSIDE = tl.constexpr(2)  # single keys of the bin that holds the cut


@triton.jit
def only_if(present, condition):
    """``present & condition`` of a tile and a scalar; the interpreter gets that wrong as a mask."""
    return present & ((tl.full(present.shape, 0, tl.int32) + condition.to(tl.int32)) != 0)


@triton.jit
def pointer(address, KIND: tl.constexpr, VEC: tl.constexpr):
    """The address as a pointer; aligned to 16 bytes where VEC."""
    result = address.to(tl.pointer_type(KIND))
    if VEC:
        result = tl.multiple_of(result, 16)
    return result


@triton.jit
def load_raw(address, row, stride, column, present, code, DTYPE: tl.constexpr, VEC: tl.constexpr):
    """Bits of elements: int16 or int32 by DTYPE; int32 where MIXED."""
    offset = row.to(tl.int64) * stride
    if VEC:  # a product, so that the compiler sees the alignment; a hint is lost in inlining
        offset = offset * 8
    offset = offset + column
    if DTYPE == MIXED:
        if code == FP32:
            raw = tl.load(pointer(address, tl.int32, VEC) + offset, mask=present, other=0)
        else:
            half = tl.load(pointer(address, tl.int16, VEC) + offset, mask=present, other=0)
            raw = half.to(tl.int32)
    elif DTYPE <= FP16:
        raw = tl.load(pointer(address, tl.int16, VEC) + offset, mask=present, other=0)
    else:
        raw = tl.load(pointer(address, tl.int32, VEC) + offset, mask=present, other=0)
    return raw


@triton.jit
def store_raw(address, row, stride, column, raw, touched, code, DTYPE, VEC: tl.constexpr):
    """The way back of :func:`load_raw`."""
    offset = row.to(tl.int64) * stride
    if VEC:
        offset = offset * 8
    offset = offset + column
    if DTYPE == MIXED:
        if code == FP32:
            tl.store(pointer(address, tl.int32, VEC) + offset, raw, mask=touched)
        else:
            half = raw.to(tl.int16)
            tl.store(pointer(address, tl.int16, VEC) + offset, half, mask=touched)
    elif DTYPE <= FP16:
        tl.store(pointer(address, tl.int16, VEC) + offset, raw, mask=touched)
    else:
        tl.store(pointer(address, tl.int32, VEC) + offset, raw, mask=touched)


@triton.jit
def load_keys(raw, base, address, column, present, code, DTYPE: tl.constexpr, DELTA, VEC):
    """Keys by the norm at ``address`` (1.0 where it is 0); PAD where nothing is present."""
    if DTYPE == SIGNED:
        key = keys_of(raw, base, 1.0, DTYPE, DELTA)
    else:
        norms = pointer(address, tl.float32, VEC)
        some = only_if(present, address != 0)
        norm = tl.load(norms + column, mask=some, other=1.0)
        if DTYPE == MIXED:
            if code == FP32:
                key = keys_of(raw, base, norm, FP32, DELTA)
            else:
                short, short_base = raw.to(tl.int16), base.to(tl.int16)
                if code == BF16:
                    key = keys_of(short, short_base, norm, BF16, DELTA)
                else:
                    key = keys_of(short, short_base, norm, FP16, DELTA)
        else:
            key = keys_of(raw, base, norm, DTYPE, DELTA)
    return tl.where(present, key, PAD)


@triton.jit
def last_not_above(table, tensors, field, value):
    """The last tensor whose ``field`` is <= value; of one value or a tile of them."""
    low = value.to(tl.int32) * 0
    high = low + tensors.to(tl.int32)
    steps = tensors
    while steps > 0:
        middle = (low + high) // 2
        begin = tl.load(table + HEADER + middle.to(tl.int64) * FIELDS + field)
        low = tl.where(begin <= value, middle, low)
        high = tl.where(begin <= value, high, middle)
        steps = steps // 2
    return low


@triton.jit
def stretch(table):
    """The tiles of this program, [first, last)."""
    tiles = tl.load(table + TILES).to(tl.int32)
    program = tl.program_id(0)
    share, rest = tiles // tl.num_programs(0), tiles % tl.num_programs(0)
    first = program * share + tl.minimum(program, rest)
    return first, first + share + (program < rest).to(tl.int32)


@triton.jit
def tensor_at(table, tensor, tile, last, GROUPS: tl.constexpr):
    """Of the tensor in which ``tile`` lies: where the tile begins, and where its tiles end.

    Returns (groups a row, groups left from the tile on, its row, its group in the row, end).
    """
    entry = table + HEADER + tensor * FIELDS
    groups = ((tl.load(entry + COLUMNS) + 7) // 8).to(tl.int32)
    number = tile - tl.load(entry + FIRST_TILE).to(tl.int32)
    left = tl.load(entry + ROWS) * groups - number.to(tl.int64) * GROUPS
    end = tl.minimum(last, tl.load(entry + FIELDS + FIRST_TILE).to(tl.int32))
    # In 32 bits, for up to 2^24 tiles: a division of 64 bits is a call, and takes a stack.
    rest = (number * (GROUPS % groups)).to(tl.uint32, bitcast=True)
    over = rest // groups.to(tl.uint32, bitcast=True)
    group = (rest - over * groups.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
    row = number.to(tl.int64) * (GROUPS // groups) + over.to(tl.int64)
    return groups, left, row, group, end


@triton.jit
def next_place(row, group, groups, GROUPS: tl.constexpr):
    """Where the next tile begins: no division that a loop would repeat."""
    group += GROUPS % groups
    over = group >= groups
    return row + GROUPS // groups + over.to(tl.int32), tl.where(over, group - groups, group)


@triton.jit
def tile_at(row, group, groups, left, columns, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Rows [GROUPS, 1], columns and which are of the tensor [GROUPS, 8], of a tile."""
    ahead = group + tl.arange(0, GROUPS)
    rows = (ahead.to(tl.float32) * (1.0 / groups.to(tl.float32))).to(tl.int32)
    rows -= (rows * groups > ahead).to(tl.int32)  # the product is not exact
    rows += (rows * groups + groups <= ahead).to(tl.int32)
    first = ((ahead - rows * groups) * 8)[:, None]
    column = first + tl.arange(0, 8)[None, :]
    present = (tl.arange(0, GROUPS) < left)[:, None]
    present = tl.broadcast_to(present, (GROUPS, 8)) if VEC else present & (column < columns)
    return (row + rows)[:, None], column, present


@triton.jit
def keys_at(entry, norm, row, column, present, DTYPE: tl.constexpr, DELTA: tl.constexpr, VEC):
    """Keys of single weights, each of the tensor with that entry of the table."""
    raw = load_raw(
        tl.load(entry + W), row, tl.load(entry + W_STRIDE), column, present, 0, DTYPE, VEC
    )
    base = raw
    if DELTA:
        address, stride = tl.load(entry + BASE), tl.load(entry + BASE_STRIDE)
        base = load_raw(address, row, stride, column, present, 0, DTYPE, VEC)
    return load_keys(raw, base, norm, column, present, 0, DTYPE, DELTA, VEC)


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
    total = tl.load(table + TOTAL + which)
    size = tl.minimum(total, SAMPLE)
    number = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    present = number < size
    begin = number * total // tl.maximum(size, 1)
    end = (number + 1) * total // tl.maximum(size, 1)
    mixed = number.to(tl.uint32) * 2654435761
    mixed = (mixed ^ (mixed >> 15)) * 2246822519
    mixed = ((mixed ^ (mixed >> 13)) * 3266489917) >> 1
    place = begin + mixed.to(tl.int64) % tl.maximum(end - begin, 1)

    tensors = tl.load(table + TENSORS)
    tensor = last_not_above(table, tensors, FIRST + which, place).to(tl.int64)
    entry = table + HEADER + tensor * FIELDS
    columns = tl.load(entry + COLUMNS)
    place -= tl.load(entry + FIRST + which)
    row = place // columns
    column = place - row * columns
    norm = tl.load(entry + NORM + which)
    if DTYPE == MIXED:
        code = tl.load(entry + CODE)
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
    total = tl.load(table + TOTAL + which)
    taken = tl.load(table + TAKEN + which)
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
def add_each(counters, place, counted):
    """Add 1 to the counters at each counted place of a tile.

    Lane by lane: the compiler would rearrange a tile through shared memory for an atomic, though
    nothing about its addresses is contiguous.
    """
    lane = tl.arange(0, 8)[None, :]
    one = tl.full([place.shape[0]], 1, counters.dtype.element_ty)
    for i in tl.static_range(8):
        places = tl.sum(tl.where(lane == i, place, 0), 1)
        some = tl.sum((counted & (lane == i)).to(tl.int32), 1) != 0
        tl.atomic_add(counters + places, one, mask=some, sem="relaxed")


@triton.jit
def tally(key, present, histogram, own, state, above, at_least, e0, e1, e2, PASS: tl.constexpr):
    """Count a tile: some keys one by one, in memory; the rest, and what may be many, in registers.

    The counts in registers are by group, [GROUPS] int32: ``above``, ``at_least`` the bracket, and
    ``e0``, ``e1``, ``e2`` equal to the keys that may be many.
    """
    if PASS == INSIDE:
        first = tl.load(state + BIN).to(tl.int32)
        atom = tl.load(state + ATOM).to(tl.int32)
        equal = key == atom
        e0 += tl.sum(equal.to(tl.int32), 1)
        counted = ((key >> SHIFT) == (first >> SHIFT)) & (equal == 0) & present
        place = key & (SUB_BINS - 1)
        add_each(own, place, counted)
    else:
        low = tl.load(state + LOW).to(tl.int32)
        high = tl.load(state + HIGH).to(tl.int32)
        over = key > high
        reach = key >= low
        counted = reach & (over == 0)
        if PASS == NEAR:
            above += tl.sum(over.to(tl.int32), 1)
            at_least += tl.sum(reach.to(tl.int32), 1)
            if tl.load(state + HEAVY) != 0:
                is_low, is_high = key == low, key == high
                is_target = key == tl.load(state + TARGET).to(tl.int32)
                counted = counted & ((is_low | is_target | is_high) == 0)
                e0 += tl.sum(is_low.to(tl.int32), 1)
                e1 += tl.sum(is_target.to(tl.int32), 1)
                e2 += tl.sum(is_high.to(tl.int32), 1)
        else:
            counted = (counted == 0) & present
        add_each(histogram, (key >> SHIFT) + ZERO_BIN, counted)
    return above, at_least, e0, e1, e2


@triton.jit
def finish(histogram, own, state, above, at_least, e0, e1, e2, PASS: tl.constexpr):
    """Add to memory what a program counted in registers."""
    if PASS == NEAR:
        tl.atomic_add(state + ABOVE, tl.sum(above.to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(state + AT_LEAST, tl.sum(at_least.to(tl.int64), 0), sem="relaxed")
        if tl.load(state + HEAVY) != 0:
            low, target = tl.load(state + LOW), tl.load(state + TARGET)
            high = tl.load(state + HIGH)
            zero = histogram + ZERO_BIN
            lows, highs = tl.sum(e0.to(tl.int64), 0), tl.sum(e2.to(tl.int64), 0)
            tl.atomic_add(zero + (low >> SHIFT), lows, sem="relaxed")
            if target != low:
                targets = tl.sum(e1.to(tl.int64), 0)
                tl.atomic_add(zero + (target >> SHIFT), targets, sem="relaxed")
            if (high != low) & (high != target):
                tl.atomic_add(zero + (high >> SHIFT), highs, sem="relaxed")
    elif PASS == INSIDE:
        place = tl.load(state + ATOM) & (SUB_BINS - 1)
        tl.atomic_add(own + place, tl.sum(e0, 0), sem="relaxed")


@triton.jit
def missed(table, state, which):
    """Whether the m-th largest key is outside the bracket of the sample."""
    taken = tl.load(table + TAKEN + which)
    above, at_least = tl.load(state + ABOVE), tl.load(state + AT_LEAST)
    return (taken > 0) & ((taken <= above) | (taken > at_least))


@triton.jit
def cut_count_kernel(
    table,
    state,
    histograms,
    own_counts,
    PASS: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    PRESERVED: tl.constexpr,
    VEC: tl.constexpr,
):
    """One reading of all tensors that counts keys; see ``PASS``.

    Args:
        state, histograms: one for each of the two selections.
        own_counts: [selections, programs, SUB_BINS] int32, added to where INSIDE.
        PRESERVED: whether there is a second selection, among the tensors with a preserve norm.
    """
    state2 = state + STATE
    histogram2 = histograms + BINS
    own = own_counts + tl.program_id(0).to(tl.int64) * SUB_BINS
    own2 = own + tl.num_programs(0).to(tl.int64) * SUB_BINS
    tile, last = stretch(table)
    if PASS == FAR:
        again = missed(table, state, 0)
        if PRESERVED:
            again2 = missed(table, state2, 1)
            last = tl.where(again | again2, last, tile)
        else:
            last = tl.where(again, last, tile)
    above = tl.full([GROUPS], 0, tl.int32)
    at_least, e0, e1, e2 = above, above, above, above
    above2, at_least2, f0, f1, f2 = above, above, above, above, above
    tensor = last_not_above(table, tl.load(table + TENSORS), FIRST_TILE, tile.to(tl.int64))
    tensor = tensor.to(tl.int64)
    while tile < last:
        groups, left, row, group, end = tensor_at(table, tensor, tile, last, GROUPS)
        entry = table + HEADER + tensor * FIELDS
        columns = tl.load(entry + COLUMNS)
        code = tl.load(entry + CODE)
        W_address = tl.load(entry + W)
        W_stride = tl.load(entry + W_STRIDE)
        base_address = tl.load(entry + BASE)
        base_stride = tl.load(entry + BASE_STRIDE)
        norm = tl.load(entry + NORM)
        preserve = tl.load(entry + NORM + 1)
        while tile < end:
            rows, column, present = tile_at(row, group, groups, left, columns, GROUPS, VEC)
            raw = load_raw(W_address, rows, W_stride, column, present, code, DTYPE, VEC)
            base = raw
            if DELTA:
                base = load_raw(base_address, rows, base_stride, column, present, code, DTYPE, VEC)
            key = load_keys(raw, base, norm, column, present, code, DTYPE, DELTA, VEC)
            some = present
            if PASS == FAR:
                some = only_if(some, again)
            above, at_least, e0, e1, e2 = tally(
                key, some, histograms, own, state, above, at_least, e0, e1, e2, PASS
            )
            if PRESERVED:
                some = only_if(present, preserve != 0)
                key = load_keys(raw, base, preserve, column, some, code, DTYPE, DELTA, VEC)
                if PASS == FAR:
                    some = only_if(some, again2)
                above2, at_least2, f0, f1, f2 = tally(
                    key, some, histogram2, own2, state2, above2, at_least2, f0, f1, f2, PASS
                )
            tile += 1
            left -= GROUPS
            row, group = next_place(row, group, groups, GROUPS)
        tensor += 1
    finish(histograms, own, state, above, at_least, e0, e1, e2, PASS)
    if PRESERVED:
        finish(histogram2, own2, state2, above2, at_least2, f0, f1, f2, PASS)


@triton.jit
def cut_bin_kernel(table, state, histograms):
    """Find the bin of the m-th largest key, from the top of the bracket, or of all bins."""
    which = tl.program_id(0)
    state += which * STATE
    histogram = histograms + which.to(tl.int64) * BINS
    left = tl.load(table + TAKEN + which)
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
    if tl.load(table + TAKEN + which) > 0:
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


@triton.jit
def packed(marked):
    """Bool [GROUPS, 8] -> [GROUPS] int32, as a mask's bytes: an eighth of the registers."""
    return tl.sum(marked.to(tl.int32) << tl.arange(0, 8)[None, :], 1)


@triton.jit
def unpacked(bits):
    """The way back of :func:`packed`."""
    return ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def taken_of(key, state, seen):
    """Which of a tile are among the last m, packed; ``seen`` counts ties of the stretch."""
    threshold = tl.load(state + KEY).to(tl.int32)
    tie_program = tl.load(state + TIE_PROGRAM).to(tl.int32)
    program = tl.program_id(0)
    taken = packed(key >= tl.where(program > tie_program, threshold, threshold + 1))
    if program == tie_program:
        ties = packed(key == threshold)
        numbers = tl.sum((key == threshold).to(tl.int32), 1)
        number = tl.sum(numbers, 0)
        wanted = tl.load(state + SKIP).to(tl.int32) - seen  # so many of the tile's are not taken
        if wanted < number:
            skipped = wanted - tl.cumsum(numbers, 0) + numbers
            for i in tl.static_range(8):
                ties = tl.where(skipped > i, ties & (ties - 1), ties)
            taken = taken | ties
        seen += number
    return taken, seen


@triton.jit
def cut_apply_kernel(
    table,
    state,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    PRESERVED: tl.constexpr,
    VEC: tl.constexpr,
):
    """The last reading: mark and remove. A vector in which nothing is removed is not written."""
    state2 = state + STATE
    flags = tl.load(table + FLAGS)
    turn = tl.where((flags & SMALLEST) != 0, 0xFF, 0)
    tile, last = stretch(table)
    seen, seen2 = tile * 0, tile * 0
    edge = tl.full([GROUPS], PAD, tl.int32)
    tensor = last_not_above(table, tl.load(table + TENSORS), FIRST_TILE, tile.to(tl.int64))
    tensor = tensor.to(tl.int64)
    while tile < last:
        groups, left, row, group, end = tensor_at(table, tensor, tile, last, GROUPS)
        entry = table + HEADER + tensor * FIELDS
        columns = tl.load(entry + COLUMNS)
        code = tl.load(entry + CODE)
        W_address = tl.load(entry + W)
        W_stride = tl.load(entry + W_STRIDE)
        base_address = tl.load(entry + BASE)
        base_stride = tl.load(entry + BASE_STRIDE)
        norm = tl.load(entry + NORM)
        preserve = tl.load(entry + NORM + 1)
        while tile < end:
            rows, column, present = tile_at(row, group, groups, left, columns, GROUPS, VEC)
            raw = load_raw(W_address, rows, W_stride, column, present, code, DTYPE, VEC)
            base = raw
            if DELTA:
                base = load_raw(base_address, rows, base_stride, column, present, code, DTYPE, VEC)
            key = load_keys(raw, base, norm, column, present, code, DTYPE, DELTA, VEC)
            removed, seen = taken_of(key, state, seen)
            removed = (removed ^ turn) & packed(present)
            if (flags & WANT_EDGE) != 0:
                edge = tl.maximum(edge, tl.max(tl.where(unpacked(removed), key, PAD), 1))
            if PRESERVED:
                some = only_if(present, preserve != 0)
                key = load_keys(raw, base, preserve, column, some, code, DTYPE, DELTA, VEC)
                kept, seen2 = taken_of(key, state2, seen2)
                removed = removed & (kept ^ 0xFF)
            if (flags & WANT_BITS) != 0:
                bits = tl.load(entry + BITS).to(tl.pointer_type(tl.uint8))
                number = row * groups + group + tl.arange(0, GROUPS)
                inside = tl.arange(0, GROUPS) < left
                tl.store(bits + number, removed.to(tl.uint8), mask=inside)
            if (flags & WRITE) != 0:
                marked = unpacked(removed)
                touched = marked
                if VEC:
                    touched = tl.broadcast_to((removed != 0)[:, None], marked.shape)
                if not DELTA:
                    base_address, base_stride = tl.load(entry + BASE), tl.load(entry + BASE_STRIDE)
                    some = only_if(touched, base_address != 0)
                    base = load_raw(base_address, rows, base_stride, column, some, code, DTYPE, VEC)
                raw = tl.where(marked, base, raw)
                store_raw(W_address, rows, W_stride, column, raw, touched, code, DTYPE, VEC)
            tile += 1
            left -= GROUPS
            row, group = next_place(row, group, groups, GROUPS)
        tensor += 1
    if (flags & WANT_EDGE) != 0:
        tl.atomic_max(state + EDGE, tl.max(edge, 0).to(tl.int64), sem="relaxed")


@triton.jit
def cut_edge_kernel(table, state, BLOCK_SIZE: tl.constexpr):
    """Fill the thresholds of a tensor with the score at the edge of what is removed."""
    entry = table + HEADER + tl.program_id(0).to(tl.int64) * FIELDS
    thresholds = tl.load(entry + THRESHOLDS).to(tl.pointer_type(tl.float32))
    rows = tl.load(entry + ROWS)
    smallest = (tl.load(table + FLAGS) & SMALLEST) != 0
    edge = tl.where(smallest, tl.load(state + EDGE), tl.load(state + KEY)).to(tl.int32)
    row = tl.arange(0, BLOCK_SIZE).to(tl.int64)
    value = score_of_key(tl.full([BLOCK_SIZE], 0, tl.int32) + edge)
    begin = rows * 0
    while begin < rows:
        tl.store(thresholds + begin + row, value, mask=begin + row < rows)
        begin += BLOCK_SIZE
