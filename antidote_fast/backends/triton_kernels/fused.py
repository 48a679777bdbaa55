"""RMSNorm and SwiGLU as Llama-like models compute them, with the sums of their outputs' squares.

What a layer is about to read is squared while it is written, so that nothing reads it once more.
Sums are compensated fp32 in a program and float64 over the programs, always in one order.
"""

import torch
import triton
import triton.language as tl

from antidote_fast.backends.native import DTYPE_CODES
from antidote_fast.backends.triton_kernels import launch
from antidote_fast.backends.triton_kernels.keys import BF16, FP16, to_float
from antidote_fast.backends.triton_kernels.norms import (
    columns_inside,
    combine,
    group_columns,
    mask_operand,
    split_tokens,
)

# Chosen from the register counts of compiled kernels, not measured: no GPU has run them yet.
# RMSNorm, whose programs hold whole rows:
MAX_ROW_BYTES = 32768  # K to 16384 in 16 bits, to 8192 in fp32
NORM_VECTORS = 256  # groups of 8 columns a tile has at least, two of them a thread's
PER_PROCESSOR = 2  # programs for each processor of the GPU
COMPENSATED_WIDTH = 8192  # of wider rows what rounding loses does not fit into the registers,
PLAIN_TOKENS = 32  # so that they are summed over no more tokens than these in fp32
# SwiGLU, whose programs hold a block of columns:
VECTORS = 128  # groups of 8 columns a tile has, one a thread's
GROUPS = 32  # of them side by side at most
WARPS = 4

# Triton's interpreter truncates on the way to bf16.
BY_HAND = tl.constexpr(launch.is_interpreted(to_float))


def fits_rms_norm(x, weight):
    """Whether :func:`rms_norm` takes these."""
    width = x.shape[-1]
    short = width * x.element_size() <= MAX_ROW_BYTES
    return weight.shape == (width,) and short and _fit(x, weight)


def fits_swiglu(gate, up):
    """Whether :func:`swiglu` takes these."""
    return gate.shape == up.shape and _fit(gate, up)


def rms_norm(x, weight, eps, token_mask):
    """``weight * (x * rsqrt(mean(x ** 2) + eps))``, as ``LlamaRMSNorm`` rounds it.

    The mean and the product in the brackets are fp32, the latter rounded to x's dtype, then the
    result. Torch sums in another order: within 2 units in the last place of it for 16-bit dtypes,
    where nearly all values are the same, and within a relative 1e-6 for fp32.

    Args:
        x: (..., K) that :func:`fits_rms_norm`.
        weight: (K,) of x's dtype.
        token_mask: contiguous bool of ``x.shape[:-1]``, or None: the tokens that the sums count.

    Returns:
        (y like x, (K,) fp32 the sum over counted tokens of ``y ** 2``).
    """
    width = x.shape[-1]
    tokens = x.numel() // width
    groups = triton.next_power_of_2(width // 8)
    rows = max(NORM_VECTORS // groups, 1)
    compensated = width <= COMPENSATED_WIDTH
    wanted = launch.num_programs(x.device, PER_PROCESSOR)
    per_program = triton.cdiv(triton.cdiv(tokens, wanted), rows) * rows
    if not compensated:
        per_program = min(per_program, PLAIN_TOKENS)
    return _launched(
        rms_norm_kernel,
        (triton.cdiv(tokens, per_program),),
        (x, weight),
        token_mask,
        (eps, per_program),
        num_warps=rows * groups // 64,
        COMPENSATED=compensated,
        R=rows,
        G=groups,
    )


def swiglu(gate, up, token_mask):
    """``silu(gate) * up``, each rounded to the dtype as torch does.

    Within 2 units in the last place of torch for 16-bit dtypes, where nearly all values are the
    same; within a relative 1e-5 for fp32, as the exponential is the hardware's.

    Args:
        gate, up: (..., K) that :func:`fits_swiglu`.
        token_mask: as in :func:`rms_norm`.

    Returns:
        (y like gate, (K,) fp32 the sum over counted tokens of ``y ** 2``).
    """
    width = gate.shape[-1]
    tokens = gate.numel() // width
    groups = min(GROUPS, triton.next_power_of_2(width // 8))
    rows = VECTORS // groups
    blocks = triton.cdiv(width, 8 * groups)
    splits, per_split = split_tokens(tokens, blocks, rows, gate.device)
    return _launched(
        swiglu_kernel,
        (blocks, splits),
        (gate, up),
        token_mask,
        (per_split,),
        num_warps=WARPS,
        R=rows,
        G=groups,
    )


def _launched(kernel, grid, inputs, token_mask, numbers, **options):
    """(y, sums) of a kernel, of which a program on the last axis of the grid adds up its part."""
    x, width = inputs[0], inputs[0].shape[-1]
    y = torch.empty_like(x)
    partial = torch.empty((grid[-1], width), dtype=torch.float32, device=x.device)
    launch.run(
        kernel,
        grid,
        *map(launch.raw, (*inputs, y)),
        mask_operand(token_mask, x.device),
        partial,
        x.numel() // width,
        width,
        *numbers,
        device=x.device,
        DTYPE=DTYPE_CODES[x.dtype],
        MASKED=token_mask is not None,
        **options,
    )
    if len(partial) == 1:
        return y, partial[0]
    sums = torch.empty_like(partial[0])
    combine(partial, sums, add=False)
    return y, sums


def _fit(first, second):
    width = first.shape[-1]
    return (
        first.dtype == second.dtype
        and first.dtype in launch.RAW
        and first.device == second.device
        and first.numel() > 0
        and width % 8 == 0
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (first, second))
    )


@triton.jit
def to_raw(value, DTYPE: tl.constexpr):
    """Bits of an fp32 value rounded to nearest, ties to even; what ``to_float`` reads."""
    if DTYPE == BF16:
        if BY_HAND:
            bits = value.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            raw = tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
        else:
            raw = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    elif DTYPE == FP16:
        raw = value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        raw = value.to(tl.int32, bitcast=True)
    return raw


@triton.jit
def added(total, lost, value):
    """total + value, and what rounding lost of it: Kahan's sum."""
    part = value - lost
    following = total + part
    return following, (following - total) - part


@triton.jit(do_not_specialize=["n_tokens", "n_cols", "per_program"])
def rms_norm_kernel(
    X_ptr,
    W_ptr,
    Y_ptr,
    mask_ptr,
    partial_ptr,
    n_tokens,
    n_cols,
    eps,
    per_program,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    COMPENSATED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Y and partial[program], of the rows of one program; X and Y (tokens, K) contiguous."""
    first = tl.program_id(0).to(tl.int64) * per_program
    count = tl.minimum(n_tokens - first, per_program).to(tl.int32)
    stride = n_cols // 8 * 8  # says that it is a multiple of 8
    column = group_columns(0, G)
    exists = columns_inside(0, n_cols, G, True)
    total = tl.zeros([R, G, 8], tl.float32)
    lost = tl.zeros([R, G, 8], tl.float32)
    step = 0
    while step < count:
        place = step + tl.arange(0, R)
        row = first + place
        there = place < count
        inside = there[:, None, None] & exists[None, :, :]
        offset = row[:, None, None] * stride + column[None, :, :]
        x = to_float(tl.load(X_ptr + offset, mask=inside, other=0), DTYPE)
        mean = tl.sum(tl.sum(x * x, 2), 1) / n_cols
        scaled = to_float(to_raw(x * tl.rsqrt(mean + eps)[:, None, None], DTYPE), DTYPE)
        weight = to_float(tl.load(W_ptr + column, mask=exists, other=0), DTYPE)
        y = to_raw(scaled * weight[None, :, :], DTYPE)
        tl.store(Y_ptr + offset, y, mask=inside)
        if MASKED:
            there = there & (tl.load(mask_ptr + row, mask=there, other=0) != 0)
        value = to_float(y, DTYPE)
        square = tl.where(there[:, None, None], value * value, 0.0)
        if COMPENSATED:
            total, lost = added(total, lost, square)
        else:
            total += square
        step += R
    start = tl.program_id(0).to(tl.int64) * stride
    tl.store(partial_ptr + start + column, tl.sum(total, 0), mask=exists)


@triton.jit(do_not_specialize=["n_tokens", "n_cols", "per_split"])
def swiglu_kernel(
    GATE_ptr,
    UP_ptr,
    Y_ptr,
    mask_ptr,
    partial_ptr,
    n_tokens,
    n_cols,
    per_split,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Y and partial[split], of a block of columns; GATE, UP and Y (tokens, K) contiguous."""
    block = tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * per_split
    count = tl.minimum(n_tokens - first, per_split).to(tl.int32)
    stride = n_cols // 8 * 8  # says that it is a multiple of 8
    column = group_columns(block, G)
    exists = columns_inside(block, n_cols, G, True)
    total = tl.zeros([R, G, 8], tl.float32)
    lost = tl.zeros([R, G, 8], tl.float32)
    step = 0
    while step < count:
        place = step + tl.arange(0, R)
        row = first + place
        there = place < count
        inside = there[:, None, None] & exists[None, :, :]
        offset = row[:, None, None] * stride + column[None, :, :]
        gate = to_float(tl.load(GATE_ptr + offset, mask=inside, other=0), DTYPE)
        up = to_float(tl.load(UP_ptr + offset, mask=inside, other=0), DTYPE)
        silu = to_float(to_raw(tl.div_rn(gate, 1.0 + tl.exp(-gate)), DTYPE), DTYPE)
        y = to_raw(silu * up, DTYPE)
        tl.store(Y_ptr + offset, y, mask=inside)
        if MASKED:
            there = there & (tl.load(mask_ptr + row, mask=there, other=0) != 0)
        value = to_float(y, DTYPE)
        square = tl.where(there[:, None, None], value * value, 0.0)
        total, lost = added(total, lost, square)
        step += R
    start = tl.program_id(1).to(tl.int64) * stride
    tl.store(partial_ptr + start + column, tl.sum(total, 0), mask=exists)
