"""Rows too long for the registers: the same search, with the row read again from the caches.

A row of 131072 bf16 weights is 256 KB: it comes from memory once, and every further count of it
from the second-level cache.
"""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels import rows, search
from antidote_fast.backends.triton_kernels.keys import MAX_KEY, PAD, SIGNED, keys_of, score_of_key


@triton.jit
def chunk_keys(row, first_group, G: tl.constexpr, DTYPE: tl.constexpr, DELTA: tl.constexpr, VEC):
    """Keys [1, G, 8] of one part of a row, PAD past its end.

    ``row``: where it and its base begin, the norms, whether there are any, and its columns.
    """
    W_row, base_row, NORM, has_norm, num_columns = row
    group = first_group + tl.arange(0, G)
    column = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    present = rows.in_range(tl.zeros([1], tl.int32), 1, group, num_columns, VEC)
    raw, base = rows.load_both(W_row + column, base_row + column, present, DELTA)
    norm = rows.load_norm(NORM, column, present, has_norm)
    return tl.where(present, keys_of(raw, base, norm, DTYPE, DELTA), PAD)


@triton.jit
def top_of_long_row(
    row, m, guess, G: tl.constexpr, DTYPE: tl.constexpr, DELTA: tl.constexpr, VEC: tl.constexpr
):
    """As ``search.search`` and ``search.tie_cut`` for one row, whose keys are made anew each time.

    Args: row: as in :func:`chunk_keys`.

    Returns:
        threshold [1], the first column whose ties are taken [1], and whether some are left [1].
    """
    LOWEST: tl.constexpr = -0x7FFFFFFF if DTYPE == SIGNED else 0
    num_columns = row[4]
    groups = tl.cdiv(num_columns, 8)
    low = tl.zeros([1], tl.int32)
    wanted = low + m
    low = tl.where(wanted == 0, MAX_KEY, LOWEST)
    high = tl.zeros_like(low) + search.TOP
    count_low = tl.where(wanted == 0, 0, num_columns)
    count_high = tl.zeros_like(low)
    weak = count_high != 0
    unknown = guess == search.NO_GUESS
    reach = tl.where(unknown, search.ROUGH, search.NEAR)
    if tl.max(unknown.to(tl.int32), 0) > 0:
        values = tl.zeros([1, G, 8], tl.float32)
        for start in range(0, groups, G):
            keys = chunk_keys(row, start, G, DTYPE, DELTA, VEC)
            values += tl.maximum(keys, 0).to(tl.float32, bitcast=True)
        guess = search.estimate(tl.sum(tl.sum(values, 2), 1), low * 0 + num_columns, wanted)
    first, second = guess - reach, guess + reach
    while tl.max(((count_low != m) & (low + 1 < high)).to(tl.int32), 0) > 0:
        first = search.inside(first, low, high)
        second = search.inside(second, low, high)
        hits = tl.zeros([1, G, 8], tl.int32)  # both counts, 16 bits each: under 2**15 parts a row
        for start in range(0, groups, G):
            keys = chunk_keys(row, start, G, DTYPE, DELTA, VEC)
            hits += (keys >= first[:, None, None]).to(tl.int32)
            hits += (keys >= second[:, None, None]).to(tl.int32) << 16
        count_first = tl.sum(tl.sum(hits & 0xFFFF, 2), 1)
        count_second = tl.sum(tl.sum(hits >> 16, 2), 1)
        low, count_low, high, count_high, slow = search.narrowed(
            low, count_low, high, count_high, first, count_first, second, count_second, m
        )
        weak = slow & (weak == 0)
        first, second, reach = search.next_pivots(
            low, count_low, high, count_high, wanted, weak, reach, LOWEST
        )
    too_many = count_low > m
    cut = tl.zeros_like(low)
    past = cut + 8 * groups
    while tl.max((too_many & (cut + 1 < past)).to(tl.int32), 0) > 0:
        middle = (cut + past) // 2
        hits = tl.zeros([1, G, 8], tl.int32)
        for start in range(0, groups, G):
            keys = chunk_keys(row, start, G, DTYPE, DELTA, VEC)
            column = (start + tl.arange(0, G))[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
            hits += ((keys == low[:, None, None]) & (column < middle[:, None, None])).to(tl.int32)
        fits = tl.sum(tl.sum(hits, 2), 1) <= count_low - m
        cut = tl.where(fits, middle, cut)
        past = tl.where(fits, past, middle)
    return low, cut, too_many


@triton.jit
def top_bits(keys, first_group, threshold, cut, G: tl.constexpr):
    """The bits [1, G] of what a threshold and a cut of its ties take."""
    lane = tl.arange(0, 8)[None, None, :]
    column = (first_group + tl.arange(0, G))[None, :, None] * 8 + lane
    bar = threshold[:, None, None]
    taken = (keys > bar) | ((keys == bar) & (column >= cut[:, None, None]))
    return tl.sum(taken.to(tl.int32) << lane, 2)


@triton.jit
def prune_long_row(
    pointers,
    sizes,
    number,
    guess,
    preserve_guess,
    G: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    PRESERVED: tl.constexpr,
    VEC: tl.constexpr,
):
    """As ``rows.prune_tile`` for one row of any length."""
    W, BASE, NORM, PRESERVE, BITS, THRESHOLDS = pointers
    num_rows, num_columns, W_row_stride, base_row_stride, m, m_preserve, flags = sizes
    has_norm = (flags & rows.HAS_NORM) != 0
    groups = tl.cdiv(num_columns, 8)
    row = number + tl.arange(0, 1)
    W_row = W + rows.row_offsets(row, W_row_stride, VEC)
    base_row = BASE + rows.row_offsets(row, base_row_stride, VEC)
    scored = W_row, base_row, NORM, has_norm, num_columns
    guess, cut, left = top_of_long_row(scored, m, guess, G, DTYPE, DELTA, VEC)
    preserved, kept_cut = (W_row, base_row, PRESERVE, m_preserve > 0, num_columns), cut
    if PRESERVED:
        preserve_guess, kept_cut, _ = top_of_long_row(
            preserved, m_preserve, preserve_guess, G, DTYPE, DELTA, VEC
        )
    smallest = (flags & rows.SMALLEST) != 0
    edge = tl.zeros_like(guess) + tl.where(smallest, PAD, MAX_KEY)
    for start in range(0, groups, G):
        keys = chunk_keys(scored, start, G, DTYPE, DELTA, VEC)
        bits = top_bits(keys, start, guess, cut, G)
        if (flags & rows.WANT_THRESHOLDS) != 0:
            bar = guess[:, None, None]
            above = tl.min(tl.min(tl.where(keys >= bar, keys, MAX_KEY), 2), 1)
            below = tl.max(tl.max(tl.where(keys < bar, keys, PAD), 2), 1)
            edge = tl.where(smallest, tl.maximum(edge, below), tl.minimum(edge, above))
        if smallest:
            bits = bits ^ 0xFF
        if PRESERVED:
            keys = chunk_keys(preserved, start, G, DTYPE, DELTA, VEC)
            bits = bits & (top_bits(keys, start, preserve_guess, kept_cut, G) ^ 0xFF)
        group = start + tl.arange(0, G)
        real = tl.minimum(tl.maximum(num_columns - group * 8, 0), 8)
        bits = bits & ((1 << real) - 1)[None, :]
        if (flags & rows.WANT_BITS) != 0:
            rows.store_bits(BITS, row, num_rows, group, num_columns, bits)
        if (flags & rows.WRITE) != 0:
            column = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
            rows.store_removed(W_row, base_row, column, bits, flags, VEC)
    if (flags & rows.WANT_THRESHOLDS) != 0:
        if smallest:
            edge = tl.where(left, guess, edge)
        removed = tl.where(smallest, num_columns - m, m)
        some = tl.where(removed > 0, num_rows, 0)
        tl.store(THRESHOLDS + row, score_of_key(edge), mask=row < some)
    return guess, preserve_guess
