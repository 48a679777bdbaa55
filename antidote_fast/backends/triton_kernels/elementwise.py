"""What needs no selection: scores, and masks applied."""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels.keys import keys_of, score_of_key
from antidote_fast.backends.triton_kernels.rows import (
    HAS_NORM,
    in_range,
    load_norm,
    row_offsets,
    store_removed,
)

_SCALARS = ["num_rows", "num_columns", "W_row_stride", "base_row_stride", "flags"]


@triton.jit(do_not_specialize=_SCALARS)
def score_kernel(
    W_ptr,
    base_ptr,
    norm_ptr,
    out_ptr,
    num_rows,
    num_columns,
    W_row_stride,
    base_row_stride,
    flags,
    R: tl.constexpr,
    G: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    VEC: tl.constexpr,
):
    """Scores of R rows and 8 * G columns a program; ``out`` (N, K) fp32 is contiguous."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    group = tl.program_id(1) * G + tl.arange(0, G)
    column = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = in_range(row, num_rows, group, num_columns, VEC)
    raw = tl.load(W_ptr + row_offsets(row, W_row_stride, VEC) + column, mask=inside, other=0)
    base = raw
    if DELTA:
        base_row = base_ptr + row_offsets(row, base_row_stride, VEC)
        base = tl.load(base_row + column, mask=inside, other=0)
    in_columns = in_range(tl.zeros([1], tl.int32), 1, group, num_columns, VEC)
    norm = load_norm(norm_ptr, column, in_columns, (flags & HAS_NORM) != 0)
    score = score_of_key(keys_of(raw, base, norm, DTYPE, DELTA))
    STEP: tl.constexpr = 8 if VEC else 1
    out_row = out_ptr + row_offsets(row, num_columns // STEP, VEC)
    tl.store(out_row + column, score, mask=inside)


@triton.jit(do_not_specialize=_SCALARS)
def apply_mask_kernel(
    W_ptr,
    base_ptr,
    bits_ptr,
    num_rows,
    num_columns,
    W_row_stride,
    base_row_stride,
    flags,
    R: tl.constexpr,
    G: tl.constexpr,
    VEC: tl.constexpr,
):
    """Remove what ``bits`` (N, ceil(K/8)), contiguous, marks; a vector without any is not read."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    group = tl.program_id(1) * G + tl.arange(0, G)
    column = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    place = row.to(tl.int64)[:, None] * ((num_columns + 7) // 8) + group[None, :]
    real = tl.minimum(tl.maximum(num_columns - group * 8, 0), 8)
    present = (row < num_rows)[:, None] & (real > 0)[None, :]
    bits = tl.load(bits_ptr + place, mask=present, other=0).to(tl.int32)
    bits = bits & ((1 << real) - 1)[None, :]
    W_row = W_ptr + row_offsets(row, W_row_stride, VEC)
    base_row = base_ptr + row_offsets(row, base_row_stride, VEC)
    store_removed(W_row, base_row, column, bits, flags, VEC)
