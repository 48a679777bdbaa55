"""What needs no selection: scores, and masks applied."""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels import rows
from antidote_fast.backends.triton_kernels.keys import keys_of, score_of_key


@triton.jit(do_not_specialize=rows.SIZES)
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
    inside = rows.in_range(row, num_rows, group, num_columns, VEC)
    W_row = W_ptr + rows.row_offsets(row, W_row_stride, VEC)
    base_row = base_ptr + rows.row_offsets(row, base_row_stride, VEC)
    raw, base = rows.load_both(W_row + column, base_row + column, inside, DELTA)
    in_columns = rows.in_range(tl.zeros([1], tl.int32), 1, group, num_columns, VEC)
    norm = rows.load_norm(norm_ptr, column, in_columns, (flags & rows.HAS_NORM) != 0)
    score = score_of_key(keys_of(raw, base, norm, DTYPE, DELTA))
    STEP: tl.constexpr = 8 if VEC else 1
    out_row = out_ptr + rows.row_offsets(row, num_columns // STEP, VEC)
    tl.store(out_row + column, score, mask=inside)


@triton.jit(do_not_specialize=rows.SIZES)
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
    W_row = W_ptr + rows.row_offsets(row, W_row_stride, VEC)
    base_row = base_ptr + rows.row_offsets(row, base_row_stride, VEC)
    rows.store_removed(W_row, base_row, column, bits, flags, VEC)
