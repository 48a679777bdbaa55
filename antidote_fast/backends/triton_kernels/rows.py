"""Row scope: each row is read once into registers, searched there, and its dirty vectors written.

``prune_tile`` is all of it; the kernels that call it are in ``table.py``.
"""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels.keys import MAX_KEY, PAD, SIGNED, keys_of, score_of_key
from antidote_fast.backends.triton_kernels.search import top

# Bits of ``flags``.
WRITE = tl.constexpr(1)  # change the weight
SMALLEST = tl.constexpr(2)  # remove the first k: all but the last m = n - k
HAS_NORM = tl.constexpr(4)
HAS_BASE = tl.constexpr(8)
WANT_BITS = tl.constexpr(16)
WANT_THRESHOLDS = tl.constexpr(32)
# Arguments of which no value has a kernel of its own.
SIZES = ["num_rows", "num_columns", "W_row_stride", "base_row_stride", "flags"]


@triton.jit
def row_offsets(row, row_stride, VEC: tl.constexpr):
    """Where rows begin, [R, 1, 1] int64.

    With VEC strides come in groups of 8 columns, so that the compiler sees from the product that
    vectors are aligned; a hint would not survive inlining.
    """
    offsets = row.to(tl.int64)[:, None, None] * row_stride
    if VEC:
        offsets = offsets * 8
    return offsets


@triton.jit
def in_range(row, num_rows, group, num_columns, VEC: tl.constexpr):
    """Which elements of a tile [R, G, 8] are of the matrix; uniform in each vector where VEC."""
    lane = tl.arange(0, 8)[None, None, :]
    present = (row < num_rows)[:, None, None]
    if VEC:  # num_columns is a multiple of 8
        groups = present & (group * 8 < num_columns)[None, :, None]
        result = tl.broadcast_to(groups, (row.shape[0], group.shape[0], 8))
    else:
        result = present & (group[None, :, None] * 8 + lane < num_columns)
    return result


@triton.jit
def load_both(W_place, base_place, present, DELTA: tl.constexpr):
    """Bits of weights and, with DELTA, of their bases; else those of the weights twice."""
    raw = tl.load(W_place, mask=present, other=0)
    base = raw
    if DELTA:
        base = tl.load(base_place, mask=present, other=0)
    return raw, base


@triton.jit
def load_norm(NORM, column, present, has_norm):
    """fp32 norms of the columns, 1.0 where there is none."""
    norm = tl.full(column.shape, 1.0, tl.float32)
    if has_norm:
        norm = tl.load(NORM + column, mask=present, other=1.0)
    return norm


@triton.jit
def unpacked(bits):
    """Bits of groups, [R, G] int32 -> bool [R, G, 8]."""
    return ((bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1) != 0


@triton.jit
def store_bits(BITS, row, num_rows, group, num_columns, bits):
    """One byte for each group of 8 columns, little-endian."""
    place = row.to(tl.int64)[:, None] * ((num_columns + 7) // 8) + group[None, :]
    present = (row < num_rows)[:, None] & (group * 8 < num_columns)[None, :]
    tl.store(BITS + place, bits.to(tl.uint8), mask=present)


@triton.jit
def store_removed(W_row, base_row, column, bits, flags, VEC: tl.constexpr):
    """Write the removed weights of a tile; a vector without any is not written.

    The others are loaded again, which the nearest cache answers: kept in registers since the first
    load, they would cost a quarter of the rows in flight.
    """
    removed = unpacked(bits)
    touched = removed
    if VEC:
        touched = tl.broadcast_to((bits != 0)[:, :, None], removed.shape)
    base = tl.zeros(removed.shape, W_row.dtype.element_ty)
    if (flags & HAS_BASE) != 0:
        base = tl.load(base_row + column, mask=touched, other=0)
    if VEC:
        raw = tl.load(W_row + column, mask=touched, other=0)
        base = tl.where(removed, base, raw)
    tl.store(W_row + column, base, mask=touched)


@triton.jit
def store_edges(THRESHOLDS, row, num_rows, num_columns, keys, threshold, left, m, flags):
    """The score at the edge of what is removed of each row; left as it is where nothing is.

    The threshold parts the keys, but need not be one of them. ``left``: some equal to it stay.
    """
    bar = threshold[:, None, None]
    if (flags & SMALLEST) != 0:
        edge = tl.max(tl.max(tl.where(keys < bar, keys, PAD), 2), 1)
        edge = tl.where(left, threshold, edge)
        rows = tl.where(m < num_columns, num_rows, 0)
    else:
        edge = tl.min(tl.min(tl.where(keys >= bar, keys, MAX_KEY), 2), 1)
        rows = tl.where(m > 0, num_rows, 0)
    tl.store(THRESHOLDS + row, score_of_key(edge), mask=row < rows)


@triton.jit
def prune_tile(
    pointers,
    sizes,
    first_row,
    guess,
    preserve_guess,
    R: tl.constexpr,
    G: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    PRESERVED: tl.constexpr,
    VEC: tl.constexpr,
):
    """Prune R rows of up to 8 * G columns; returns the thresholds as the next rows' guesses.

    ``pointers`` and ``sizes`` are the first 6 arguments of ``table.prune_rows_kernel`` and the
    other 7.
    """
    W, BASE, NORM, PRESERVE, BITS, THRESHOLDS = pointers
    num_rows, num_columns, W_row_stride, base_row_stride, m, m_preserve, flags = sizes
    LOWEST: tl.constexpr = -0x7FFFFFFF if DTYPE == SIGNED else 0
    row = first_row + tl.arange(0, R)
    present = row < num_rows
    group = tl.arange(0, G)
    column = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = in_range(row, num_rows, group, num_columns, VEC)
    W_row = W + row_offsets(row, W_row_stride, VEC)
    base_row = BASE + row_offsets(row, base_row_stride, VEC)
    raw, base = load_both(W_row + column, base_row + column, inside, DELTA)
    in_columns = in_range(tl.zeros([1], tl.int32), 1, group, num_columns, VEC)
    norm = load_norm(NORM, column, in_columns, (flags & HAS_NORM) != 0)
    keys = tl.where(inside, keys_of(raw, base, norm, DTYPE, DELTA), PAD)

    valid = tl.where(present, num_columns, 0)
    bits, guess, left = top(keys, group, valid, tl.where(present, m, 0), guess, LOWEST)
    if (flags & WANT_THRESHOLDS) != 0:
        store_edges(THRESHOLDS, row, num_rows, num_columns, keys, guess, left, m, flags)
    if (flags & SMALLEST) != 0:
        bits = bits ^ 0xFF
    if PRESERVED:
        norm = load_norm(PRESERVE, column, in_columns, m_preserve > 0)
        keys = tl.where(inside, keys_of(raw, base, norm, DTYPE, DELTA), PAD)
        kept, preserve_guess, _ = top(
            keys, group, valid, tl.where(present, m_preserve, 0), preserve_guess, LOWEST
        )
        bits = bits & (kept ^ 0xFF)
    # Columns past the last one are never removed, whichever the direction.
    real = tl.minimum(tl.maximum(num_columns - group * 8, 0), 8)
    bits = tl.where(present[:, None], bits & ((1 << real) - 1)[None, :], 0)
    if (flags & WANT_BITS) != 0:
        store_bits(BITS, row, num_rows, group, num_columns, bits)
    if (flags & WRITE) != 0:
        store_removed(W_row, base_row, column, bits, flags, VEC)
    return guess, preserve_guess
