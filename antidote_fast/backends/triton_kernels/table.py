"""The kernels of row scope: one matrix, or many in one launch, such as a whole adapter.

Of many, a table in device memory says where each lies; programs share out the tiles of all of them.
"""

import triton
import triton.language as tl

from antidote_fast.backends.triton_kernels.keys import FP32
from antidote_fast.backends.triton_kernels.long_rows import prune_long_row
from antidote_fast.backends.triton_kernels.rows import SIZES, prune_tile
from antidote_fast.backends.triton_kernels.search import NO_GUESS

# Columns, int64: six addresses (weight, base, norm, preserve norm, bits, thresholds), rows,
# columns, two row strides, m, m_preserve, flags, first tile, kind of row.
TABLE_WIDTH = tl.constexpr(15)
SHORT = tl.constexpr(0)
LONG = tl.constexpr(1)
IN_PARTS = tl.constexpr(2)


@triton.jit(do_not_specialize=[*SIZES, "m", "m_preserve"])
def prune_rows_kernel(
    W_ptr,
    base_ptr,
    norm_ptr,
    preserve_ptr,
    bits_ptr,
    thresholds_ptr,
    num_rows,
    num_columns,
    W_row_stride,
    base_row_stride,
    m,
    m_preserve,
    flags,
    R: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    PRESERVED: tl.constexpr,
    VEC: tl.constexpr,
):
    """One matrix, R rows at a time, or with PARTS one row in parts of 8 * G columns.

    A program takes neighbouring rows, so that each starts from the last's answer.
    """
    pointers = W_ptr, base_ptr, norm_ptr, preserve_ptr, bits_ptr, thresholds_ptr
    sizes = num_rows, num_columns, W_row_stride, base_row_stride, m, m_preserve, flags
    guess = tl.full([R], NO_GUESS, tl.int32)
    kept = guess
    tiles = tl.cdiv(num_rows, R)
    share = tl.cdiv(tiles, tl.num_programs(0))
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        if PARTS:
            guess, kept = prune_long_row(
                pointers, sizes, tile, guess, kept, G, DTYPE, DELTA, PRESERVED, VEC
            )
        else:
            guess, kept = prune_tile(
                pointers, sizes, tile * R, guess, kept, R, G, DTYPE, DELTA, PRESERVED, VEC
            )


@triton.jit
def table_entry(table_ptr, index, W_TYPE: tl.constexpr):
    """One row of the table: pointers, then sizes, as :func:`prune_rows_kernel` has them."""
    entry = table_ptr + index * TABLE_WIDTH
    W = tl.multiple_of(tl.load(entry).to(tl.pointer_type(W_TYPE)), 16)
    base = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(W_TYPE)), 16)
    norm = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(tl.float32)), 16)
    preserve = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(tl.float32)), 16)
    bits = tl.load(entry + 4).to(tl.pointer_type(tl.uint8))
    thresholds = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    num_rows = tl.load(entry + 6).to(tl.int32)
    num_columns = tl.load(entry + 7).to(tl.int32)
    W_row_stride, base_row_stride = tl.load(entry + 8), tl.load(entry + 9)
    m, m_preserve = tl.load(entry + 10).to(tl.int32), tl.load(entry + 11).to(tl.int32)
    flags = tl.load(entry + 12).to(tl.int32)
    sizes = num_rows, num_columns, W_row_stride, base_row_stride, m, m_preserve, flags
    return (W, base, norm, preserve, bits, thresholds), sizes


@triton.jit(do_not_specialize=["num_matrices", "num_tiles"])
def prune_table_kernel(
    table_ptr,
    num_matrices,
    num_tiles,
    R_SHORT: tl.constexpr,
    G_SHORT: tl.constexpr,
    VEC_SHORT: tl.constexpr,
    G_LONG: tl.constexpr,
    VEC_LONG: tl.constexpr,
    G_PARTS: tl.constexpr,
    VEC_PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    PRESERVED: tl.constexpr,
    MATRICES: tl.constexpr,
):
    """Many matrices, of rows of three lengths; each kind is absent where its G is 0.

    A program takes several short rows at once, or one long row, or one row in parts.

    The hints of alignment in ``table_entry`` hold where VEC says so, and are not used elsewhere.
    """
    W_TYPE: tl.constexpr = tl.int32 if DTYPE == FP32 else tl.int16
    ROWS: tl.constexpr = R_SHORT if G_SHORT > 0 else 1
    short_guess = tl.full([ROWS], NO_GUESS, tl.int32)
    short_preserve = short_guess
    long_guess = tl.full([1], NO_GUESS, tl.int32)
    long_preserve = long_guess
    slot = tl.arange(0, MATRICES)
    first_tiles = tl.load(
        table_ptr + slot * TABLE_WIDTH + 13, mask=slot < num_matrices, other=num_tiles
    )
    share = tl.cdiv(num_tiles, tl.num_programs(0))
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, num_tiles)):
        index = tl.sum((first_tiles <= tile).to(tl.int32), 0) - 1
        pointers, sizes = table_entry(table_ptr, index, W_TYPE)
        entry = table_ptr + index * TABLE_WIDTH
        inner = (tile - tl.load(entry + 13)).to(tl.int32)
        kind = tl.load(entry + 14)
        if G_SHORT > 0:  # noqa: SIM102 - known when compiling; the next is not
            if kind == SHORT:
                short_guess, short_preserve = prune_tile(
                    pointers,
                    sizes,
                    inner * ROWS,
                    short_guess,
                    short_preserve,
                    ROWS,
                    G_SHORT,
                    DTYPE,
                    DELTA,
                    PRESERVED,
                    VEC_SHORT,
                )
        if G_LONG > 0:  # noqa: SIM102 - known when compiling; the next is not
            if kind == LONG:
                long_guess, long_preserve = prune_tile(
                    pointers,
                    sizes,
                    inner,
                    long_guess,
                    long_preserve,
                    1,
                    G_LONG,
                    DTYPE,
                    DELTA,
                    PRESERVED,
                    VEC_LONG,
                )
        if G_PARTS > 0:  # noqa: SIM102 - known when compiling; the next is not
            if kind == IN_PARTS:
                long_guess, long_preserve = prune_long_row(
                    pointers,
                    sizes,
                    inner,
                    long_guess,
                    long_preserve,
                    G_PARTS,
                    DTYPE,
                    DELTA,
                    PRESERVED,
                    VEC_PARTS,
                )
