"""n of each m consecutive columns (``n_m``): ranks within a group, or a search where m is odd."""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels import rows
from antidote_fast.backends.triton_kernels.keys import PAD, SIGNED, keys_of
from antidote_fast.backends.triton_kernels.search import NO_GUESS, top

_SCALARS = [*rows.SIZES, "m_whole", "m_tail"]


@triton.jit(do_not_specialize=_SCALARS)
def prune_small_groups_kernel(
    W_ptr,
    base_ptr,
    norm_ptr,
    bits_ptr,
    num_rows,
    num_columns,
    W_row_stride,
    base_row_stride,
    m_whole,
    m_tail,
    flags,
    B: tl.constexpr,
    M: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    VEC: tl.constexpr,
):
    """Groups of M = 2, 4, 8 or 16 columns: each key counts those of its group that come after it.

    A program takes B blocks of 8 columns (16 where M is 16) of one row. ``m_whole`` and ``m_tail``
    are how many of a group, and of a row's incomplete last group, come last in the order.
    """
    WIDTH: tl.constexpr = 16 if M == 16 else 8
    row = tl.program_id(0) + tl.arange(0, 1)
    block = tl.program_id(1) * B + tl.arange(0, B)
    part = tl.arange(0, WIDTH // M)[None, :, None]
    lane = tl.arange(0, M)[None, None, :]
    column = block[:, None, None] * WIDTH + part * M + lane
    if VEC:  # num_columns is a multiple of WIDTH
        inside = tl.broadcast_to((block * WIDTH < num_columns)[:, None, None], column.shape)
    else:
        inside = column < num_columns
    W_row = W_ptr + rows.row_offsets(row, W_row_stride, VEC)
    base_row = base_ptr + rows.row_offsets(row, base_row_stride, VEC)
    raw, base = rows.load_both(W_row + column, base_row + column, inside, DELTA)
    norm = rows.load_norm(norm_ptr, column, inside, (flags & rows.HAS_NORM) != 0)
    keys = tl.where(inside, keys_of(raw, base, norm, DTYPE, DELTA), PAD)
    rank = tl.zeros_like(keys)
    for other in tl.static_range(M):
        key = tl.max(tl.where(lane == other, keys, PAD), 2)[:, :, None]
        rank += ((key > keys) | ((key == keys) & (lane < other))).to(tl.int32)
    whole = column // M < num_columns // M
    removed = rank < tl.where(whole, m_whole, m_tail)
    if (flags & rows.SMALLEST) != 0:
        removed = removed == 0
    removed = removed & inside
    if (flags & rows.WANT_BITS) != 0:
        place = row.to(tl.int64) * ((num_columns + 7) // 8)
        for byte in tl.static_range(WIDTH // 8):
            inner = part * M + lane - 8 * byte
            mine = removed & (inner >= 0) & (inner < 8)
            bits = tl.sum(tl.sum(mine.to(tl.int32) << tl.maximum(inner, 0), 2), 1)
            number = block * (WIDTH // 8) + byte
            tl.store(bits_ptr + place + number, bits.to(tl.uint8), mask=number * 8 < num_columns)
    if (flags & rows.WRITE) != 0:
        touched = removed
        if VEC:
            any_removed = tl.max(tl.max(removed.to(tl.int32), 2), 1) > 0
            touched = tl.broadcast_to(any_removed[:, None, None], column.shape) & inside
        base = tl.zeros_like(raw)
        if (flags & rows.HAS_BASE) != 0:
            base = tl.load(base_row + column, mask=touched, other=0)
        tl.store(W_row + column, tl.where(removed, base, raw), mask=touched)


@triton.jit(do_not_specialize=[*_SCALARS, "group_size"])
def prune_groups_kernel(
    W_ptr,
    base_ptr,
    norm_ptr,
    marks_ptr,
    num_rows,
    num_columns,
    W_row_stride,
    base_row_stride,
    m_whole,
    m_tail,
    flags,
    group_size,
    R: tl.constexpr,
    G: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Groups of any size up to 8 * G: each is searched as a short row is.

    ``marks`` (N, K) uint8, contiguous, gets a 1 where a weight is removed: groups do not keep to
    bytes of a mask.
    """
    LOWEST: tl.constexpr = -0x7FFFFFFF if DTYPE == SIGNED else 0
    groups_a_row = tl.cdiv(num_columns, group_size)
    number = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row = number // groups_a_row
    start = (number % groups_a_row).to(tl.int32) * group_size
    valid = tl.where(row < num_rows, tl.minimum(num_columns - start, group_size), 0)
    group = tl.arange(0, G)
    inner = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = inner < valid[:, None, None]
    column = start[:, None, None] + inner
    W_place = W_ptr + row[:, None, None] * W_row_stride + column
    base_place = base_ptr + row[:, None, None] * base_row_stride + column
    raw, base = rows.load_both(W_place, base_place, inside, DELTA)
    norm = rows.load_norm(norm_ptr, column, inside, (flags & rows.HAS_NORM) != 0)
    keys = tl.where(inside, keys_of(raw, base, norm, DTYPE, DELTA), PAD)
    m = tl.where(valid == group_size, m_whole, tl.where(valid > 0, m_tail, 0))
    guess = tl.full([R], NO_GUESS, tl.int32)
    bits, _, _ = top(keys, group, valid, m, guess, LOWEST)
    if (flags & rows.SMALLEST) != 0:
        bits = bits ^ 0xFF
    removed = inside & rows.unpacked(bits)
    if (flags & rows.WANT_BITS) != 0:
        marks = marks_ptr + row[:, None, None] * num_columns + column
        tl.store(marks, removed.to(tl.uint8), mask=inside)
    if (flags & rows.WRITE) != 0:
        base = tl.zeros_like(raw)
        if (flags & rows.HAS_BASE) != 0:
            base = tl.load(base_place, mask=removed, other=0)
        tl.store(W_place, base, mask=removed)
