"""The readings of tensor and global scope: kernels that go over all tiles, and the thresholds."""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels import cut_search as search
from antidote_fast.backends.triton_kernels import cut_table as tables
from antidote_fast.backends.triton_kernels.keys import PAD, score_of_key

# What a counting pass counts.
NEAR = tl.constexpr(0)  # into bins, the keys where the sample expects the cut
FAR = tl.constexpr(1)  # all other keys, if the cut was not there
INSIDE = tl.constexpr(2)  # single keys of the bin that holds the cut


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
        first = tl.load(state + search.BIN).to(tl.int32)
        atom = tl.load(state + search.ATOM).to(tl.int32)
        equal = key == atom
        e0 += tl.sum(equal.to(tl.int32), 1)
        last = tl.load(state + search.LAST).to(tl.int32)
        counted = (key >= first) & (key <= last) & (equal == 0) & present
        place = key & (search.SUB_BINS - 1)
        add_each(own, place, counted)
    else:
        low = tl.load(state + search.LOW).to(tl.int32)
        high = tl.load(state + search.HIGH).to(tl.int32)
        over = key > high
        reach = key >= low
        counted = reach & (over == 0)
        if PASS == NEAR:
            above += tl.sum(over.to(tl.int32), 1)
            at_least += tl.sum(reach.to(tl.int32), 1)
            if tl.load(state + search.HEAVY) != 0:
                is_low, is_high = key == low, key == high
                is_target = key == tl.load(state + search.TARGET).to(tl.int32)
                counted = counted & ((is_low | is_target | is_high) == 0)
                e0 += tl.sum(is_low.to(tl.int32), 1)
                e1 += tl.sum(is_target.to(tl.int32), 1)
                e2 += tl.sum(is_high.to(tl.int32), 1)
        else:
            counted = (counted == 0) & present
        add_each(histogram, (key >> search.SHIFT) + search.ZERO_BIN, counted)
    return above, at_least, e0, e1, e2


@triton.jit
def finish(histogram, own, state, above, at_least, e0, e1, e2, PASS: tl.constexpr):
    """Add to memory what a program counted in registers."""
    if PASS == NEAR:
        tl.atomic_add(state + search.ABOVE, tl.sum(above.to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(state + search.AT_LEAST, tl.sum(at_least.to(tl.int64), 0), sem="relaxed")
        if tl.load(state + search.HEAVY) != 0:
            low, target = tl.load(state + search.LOW), tl.load(state + search.TARGET)
            high = tl.load(state + search.HIGH)
            zero = histogram + search.ZERO_BIN
            lows, highs = tl.sum(e0.to(tl.int64), 0), tl.sum(e2.to(tl.int64), 0)
            tl.atomic_add(zero + (low >> search.SHIFT), lows, sem="relaxed")
            if target != low:
                targets = tl.sum(e1.to(tl.int64), 0)
                tl.atomic_add(zero + (target >> search.SHIFT), targets, sem="relaxed")
            if (high != low) & (high != target):
                tl.atomic_add(zero + (high >> search.SHIFT), highs, sem="relaxed")
    elif PASS == INSIDE:
        place = tl.load(state + search.ATOM) & (search.SUB_BINS - 1)
        tl.atomic_add(own + place, tl.sum(e0, 0), sem="relaxed")


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
        own_counts: [selections, programs, search.SUB_BINS] int32, added to where INSIDE.
        PRESERVED: whether there is a second selection, among the tensors with a preserve norm.
    """
    state2 = state + search.STATE
    histogram2 = histograms + search.BINS
    own = own_counts + tl.program_id(0).to(tl.int64) * search.SUB_BINS
    own2 = own + tl.num_programs(0).to(tl.int64) * search.SUB_BINS
    tile, last = tables.stretch(table)
    if PASS == FAR:
        again = search.missed(table, state, 0)
        if PRESERVED:
            again2 = search.missed(table, state2, 1)
            last = tl.where(again | again2, last, tile)
        else:
            last = tl.where(again, last, tile)
    above = tl.full([GROUPS], 0, tl.int32)
    at_least, e0, e1, e2 = above, above, above, above
    above2, at_least2, f0, f1, f2 = above, above, above, above, above
    tensor = tables.last_not_above(
        table, tl.load(table + tables.TENSORS), tables.FIRST_TILE, tile.to(tl.int64)
    )
    while tile < last:
        groups, left, row, group, end = tables.tensor_at(table, tensor, tile, last, GROUPS)
        entry = tables.entry_of(table, tensor)
        columns, code, W_address, W_stride, base_address, base_stride, norm, preserve = (
            tables.operands_of(entry)
        )
        while tile < end:
            rows, column, present = tables.tile_at(row, group, groups, left, columns, GROUPS, VEC)
            raw = tables.load_raw(W_address, rows, W_stride, column, present, code, DTYPE, VEC)
            base = raw
            if DELTA:
                base = tables.load_raw(
                    base_address, rows, base_stride, column, present, code, DTYPE, VEC
                )
            key = tables.load_keys(raw, base, norm, column, present, code, DTYPE, DELTA, VEC)
            some = present
            if PASS == FAR:
                some = tables.only_if(some, again)
            above, at_least, e0, e1, e2 = tally(
                key, some, histograms, own, state, above, at_least, e0, e1, e2, PASS
            )
            if PRESERVED:
                some = tables.only_if(present, preserve != 0)
                key = tables.load_keys(raw, base, preserve, column, some, code, DTYPE, DELTA, VEC)
                if PASS == FAR:
                    some = tables.only_if(some, again2)
                above2, at_least2, f0, f1, f2 = tally(
                    key, some, histogram2, own2, state2, above2, at_least2, f0, f1, f2, PASS
                )
            tile += 1
            left -= GROUPS
            row, group = tables.next_place(row, group, groups, GROUPS)
        tensor += 1
    finish(histograms, own, state, above, at_least, e0, e1, e2, PASS)
    if PRESERVED:
        finish(histogram2, own2, state2, above2, at_least2, f0, f1, f2, PASS)


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
    """Which of a tile are among the last m, packed; ``seen`` counts ties of the tables.stretch."""
    threshold = tl.load(state + search.KEY).to(tl.int32)
    tie_program = tl.load(state + search.TIE_PROGRAM).to(tl.int32)
    program = tl.program_id(0)
    taken = packed(key >= tl.where(program > tie_program, threshold, threshold + 1))
    if program == tie_program:
        ties = packed(key == threshold)
        numbers = tl.sum((key == threshold).to(tl.int32), 1)
        number = tl.sum(numbers, 0)
        wanted = (
            tl.load(state + search.SKIP).to(tl.int32) - seen
        )  # so many of the tile's are not taken
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
    state2 = state + search.STATE
    flags = tl.load(table + tables.FLAGS)
    turn = tl.where((flags & tables.SMALLEST) != 0, 0xFF, 0)
    tile, last = tables.stretch(table)
    seen, seen2 = tile * 0, tile * 0
    edge = tl.full([GROUPS], PAD, tl.int32)
    tensor = tables.last_not_above(
        table, tl.load(table + tables.TENSORS), tables.FIRST_TILE, tile.to(tl.int64)
    )
    while tile < last:
        groups, left, row, group, end = tables.tensor_at(table, tensor, tile, last, GROUPS)
        entry = tables.entry_of(table, tensor)
        columns, code, W_address, W_stride, base_address, base_stride, norm, preserve = (
            tables.operands_of(entry)
        )
        while tile < end:
            rows, column, present = tables.tile_at(row, group, groups, left, columns, GROUPS, VEC)
            raw = tables.load_raw(W_address, rows, W_stride, column, present, code, DTYPE, VEC)
            base = raw
            if DELTA:
                base = tables.load_raw(
                    base_address, rows, base_stride, column, present, code, DTYPE, VEC
                )
            key = tables.load_keys(raw, base, norm, column, present, code, DTYPE, DELTA, VEC)
            removed, seen = taken_of(key, state, seen)
            removed = (removed ^ turn) & packed(present)
            if (flags & tables.WANT_EDGE) != 0:
                edge = tl.maximum(edge, tl.max(tl.where(unpacked(removed), key, PAD), 1))
            if PRESERVED:
                some = tables.only_if(present, preserve != 0)
                key = tables.load_keys(raw, base, preserve, column, some, code, DTYPE, DELTA, VEC)
                kept, seen2 = taken_of(key, state2, seen2)
                removed = removed & (kept ^ 0xFF)
            if (flags & tables.WANT_BITS) != 0:
                bits = tl.load(entry + tables.BITS).to(tl.pointer_type(tl.uint8))
                number = row * groups + group + tl.arange(0, GROUPS)
                inside = tl.arange(0, GROUPS) < left
                tl.store(bits + number, removed.to(tl.uint8), mask=inside)
            if (flags & tables.WRITE) != 0:
                marked = unpacked(removed)
                touched = marked
                if VEC:
                    touched = tl.broadcast_to((removed != 0)[:, None], marked.shape)
                if not DELTA:
                    base_address, base_stride = (
                        tl.load(entry + tables.BASE),
                        tl.load(entry + tables.BASE_STRIDE),
                    )
                    some = tables.only_if(touched, base_address != 0)
                    base = tables.load_raw(
                        base_address, rows, base_stride, column, some, code, DTYPE, VEC
                    )
                raw = tl.where(marked, base, raw)
                tables.store_raw(W_address, rows, W_stride, column, raw, touched, code, DTYPE, VEC)
            tile += 1
            left -= GROUPS
            row, group = tables.next_place(row, group, groups, GROUPS)
        tensor += 1
    if (flags & tables.WANT_EDGE) != 0:
        tl.atomic_max(state + search.EDGE, tl.max(edge, 0).to(tl.int64), sem="relaxed")


@triton.jit
def cut_edge_kernel(table, state, BLOCK_SIZE: tl.constexpr):
    """Fill the thresholds of a tensor with the score at the edge of what is removed."""
    entry = tables.entry_of(table, tl.program_id(0))
    thresholds = tl.load(entry + tables.THRESHOLDS).to(tl.pointer_type(tl.float32))
    rows = tl.load(entry + tables.ROWS)
    smallest = (tl.load(table + tables.FLAGS) & tables.SMALLEST) != 0
    edge = tl.where(smallest, tl.load(state + search.EDGE), tl.load(state + search.KEY)).to(
        tl.int32
    )
    row = tl.arange(0, BLOCK_SIZE).to(tl.int64)
    value = score_of_key(tl.full([BLOCK_SIZE], 0, tl.int32) + edge)
    begin = rows * 0
    while begin < rows:
        tl.store(thresholds + begin + row, value, mask=begin + row < rows)
        begin += BLOCK_SIZE
