"""Sums of squares over tokens: the same bits on every run, as nothing is added atomically.

A program sums a block of columns over a split of the tokens; a second launch adds the splits up in
their order, and is left out where there is one. Squares are summed in fp32 over a few tokens (8
of 16 bits) and these sums in float64; the total is rounded once.
"""

import torch
import triton
import triton.language as tl

from antidote_fast.backends.native import DTYPE_CODES
from antidote_fast.backends.triton_kernels import launch
from antidote_fast.backends.triton_kernels.keys import to_float

# Chosen from the register counts of compiled kernels (no spill on sm_80 and sm_90), not measured:
# no GPU has run them yet.
RUN_BYTES = 16  # of a column, summed in fp32: a thread has 8 loads of 16 bytes in flight
GROUPS = 32  # groups of 8 columns a program at most: 512 adjacent bytes of 16-bit x
VECTORS = 128  # rows times groups of a tile: one group a thread
WARPS = 4
PER_PROCESSOR = 4  # programs for each processor of the GPU
STEPS = 8  # a split has as many tiles at least, as a second launch costs more than they do
COMBINE = {"S": 16, "C": 64}  # splits and columns of a tile; 4 warps


def accumulate_sq_norm_(sq_sum, x, token_mask):
    """sq_sum += the sum over counted tokens of ``x ** 2``; at most two launches.

    Args:
        sq_sum: (K,) fp32.
        x: (..., K) bf16, fp16 or fp32, unit stride along K. Strides of the tokens are taken as
            they are where they make two dimensions; else x is copied.
        token_mask: contiguous bool of ``x.shape[:-1]``, or None. What it excludes is not read.
    """
    if not x.numel():
        return
    width = x.shape[-1]
    dims = token_dims(x)
    if len(dims) > 2 or (len(dims) == 2 and x.numel() // width >= 1 << 31):
        x = x.reshape(-1, width)
        dims = token_dims(x)
    (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(dims)) + dims
    tokens = outer * inner
    groups = min(GROUPS, triton.next_power_of_2(triton.cdiv(width, 8)))
    rows = VECTORS // groups
    run = RUN_BYTES // x.element_size()
    blocks = triton.cdiv(width, 8 * groups)
    splits, per_split = split_tokens(tokens, blocks, run * rows, x.device)
    partial = None
    if splits > 1:
        partial = torch.empty((splits, width), dtype=torch.float64, device=x.device)
    launch.run(
        sq_norm_kernel,
        (blocks, splits),
        launch.raw(x),
        mask_operand(token_mask, x.device),
        sq_sum.detach(),
        launch.absent(x.device, torch.float64) if partial is None else partial,
        tokens,
        inner,
        outer_stride,
        inner_stride,
        width,
        per_split,
        device=x.device,
        num_warps=WARPS,
        DTYPE=DTYPE_CODES[x.dtype],
        VEC=is_vector(x, width, outer_stride, inner_stride),
        MASKED=token_mask is not None,
        NESTED=outer > 1,
        SINGLE=partial is None,
        RUN=run,
        R=rows,
        G=groups,
    )
    if partial is not None:
        combine(partial, sq_sum.detach(), add=True)


def combine(partial, sums, *, add):
    """sums (K,) fp32 = the sum over partial (splits, K), rounded once; ``add`` keeps what was."""
    splits, width = partial.shape
    launch.run(
        combine_kernel,
        (triton.cdiv(width, COMBINE["C"]),),
        partial,
        sums,
        splits,
        width,
        device=sums.device,
        num_warps=4,
        ADD=add,
        **COMBINE,
    )


def token_dims(x):
    """[(size, stride)] of x's dimensions but the last, with what is adjacent in memory merged."""
    dims = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def split_tokens(tokens, blocks, step, device):
    """(splits, tokens of each, whole steps): a function of shape and device alone."""
    wanted = max(launch.num_programs(device, PER_PROCESSOR) // blocks, 1)
    splits = min(wanted, triton.cdiv(tokens, step * STEPS))
    per_split = triton.cdiv(triton.cdiv(tokens, splits), step) * step
    return triton.cdiv(tokens, per_split), per_split


def is_vector(x, width, *strides):
    """Whether groups of 8 columns can be loaded 16 bytes at a time."""
    return x.data_ptr() % 16 == 0 and not any(n % 8 for n in (width, *strides))


def mask_operand(token_mask, device):
    """The token mask as bytes, or what stands for none."""
    if token_mask is None:
        return launch.absent(device, torch.uint8)
    return token_mask.view(torch.uint8)


@triton.jit
def group_columns(block, G: tl.constexpr):
    """Columns [G, 8] of a block of G groups."""
    return (block * G + tl.arange(0, G)[:, None]) * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def columns_inside(block, n_cols, G: tl.constexpr, VEC: tl.constexpr):
    """Which of them exist, [G, 8]; said of whole groups with VEC, or loads would not be vectors."""
    if VEC:
        group = (block * G + tl.arange(0, G)) * 8
        inside = tl.broadcast_to((group < n_cols)[:, None], (G, 8))
    else:
        inside = group_columns(block, G) < n_cols
    return inside


@triton.jit(
    do_not_specialize=["n_tokens", "inner", "outer_stride", "inner_stride", "n_cols", "per_split"]
)
def sq_norm_kernel(
    X_ptr,
    mask_ptr,
    sums_ptr,
    partial_ptr,
    n_tokens,
    inner,
    outer_stride,
    inner_stride,
    n_cols,
    per_split,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    MASKED: tl.constexpr,
    NESTED: tl.constexpr,
    SINGLE: tl.constexpr,
    RUN: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """sums += squares where SINGLE, else partial[split] = squares, of one block of columns.

    Args:
        inner: tokens of the inner of two dimensions; only read where NESTED.
        partial_ptr: (splits, K) float64.
    """
    block = tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * per_split
    count = tl.minimum(n_tokens - first, per_split).to(tl.int32)
    if VEC:
        inner_stride = inner_stride // 8 * 8  # says that it is a multiple of 8
        outer_stride = outer_stride // 8 * 8
    column = group_columns(block, G)
    exists = columns_inside(block, n_cols, G, VEC)
    place = tl.arange(0, R)
    total = tl.zeros([R, G, 8], tl.float64)
    step = 0
    while step < count:
        short = tl.zeros([R, G, 8], tl.float32)
        for i in tl.static_range(RUN):
            row = first + (step + i * R + place)
            counted = row < n_tokens
            if MASKED:
                counted = counted & (tl.load(mask_ptr + row, mask=counted, other=0) != 0)
            if NESTED:
                number = row.to(tl.int32)  # a 64-bit division is a call, with a stack
                outside = (number // inner).to(tl.int64) * outer_stride
                start = outside + (number % inner).to(tl.int64) * inner_stride
            else:
                start = row * inner_stride
            inside = counted[:, None, None] & exists[None, :, :]
            x = tl.load(X_ptr + (start[:, None, None] + column[None, :, :]), mask=inside, other=0)
            value = to_float(x, DTYPE)
            short += value * value
        total += short.to(tl.float64)
        step += RUN * R
    squares = tl.sum(total, 0)
    if SINGLE:
        before = tl.load(sums_ptr + column, mask=exists, other=0).to(tl.float64)
        tl.store(sums_ptr + column, (before + squares).to(tl.float32), mask=exists)
    else:
        start = tl.program_id(1).to(tl.int64) * n_cols
        tl.store(partial_ptr + start + column, squares, mask=exists)


@triton.jit(do_not_specialize=["n_splits", "n_cols"])
def combine_kernel(
    partial_ptr, sums_ptr, n_splits, n_cols, ADD: tl.constexpr, S: tl.constexpr, C: tl.constexpr
):
    """sums = the sum over splits of partial (splits, K), plus sums where ADD."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    exists = column < n_cols
    total = tl.zeros([S, C], tl.float64)
    step = 0
    while step < n_splits:
        split = step + tl.arange(0, S)
        start = split.to(tl.int64) * n_cols
        inside = (split < n_splits)[:, None] & exists[None, :]
        part = tl.load(partial_ptr + start[:, None] + column[None, :], mask=inside, other=0)
        total += part.to(tl.float64)
        step += S
    squares = tl.sum(total, 0)
    if ADD:
        squares += tl.load(sums_ptr + column, mask=exists, other=0).to(tl.float64)
    tl.store(sums_ptr + column, squares.to(tl.float32), mask=exists)
