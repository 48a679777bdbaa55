"""Tensors as the integers that ``csrc`` takes: what the extensions' backends share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from antidote_fast.backends.operand import Operand
from antidote_fast.selection import Selection, num_pruned

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCOPE_CODES = {"row": 0, "tensor": 1, "global": 2}


def rows_of(operands: Sequence[Operand], selection: Selection) -> list[tuple[int, ...]]:
    """One tuple a weight, as ``csrc/matrix.h`` reads it."""
    total = sum(o.weight.numel() for o in operands)
    protected = sum(o.weight.numel() for o in operands if o.preserve_norm is not None)
    counts, kept = _counts(operands, selection, total), [0] * len(operands)
    if selection.n_m is None:
        kept = _counts(operands, selection.preserve, protected)
    return [row(*each) for each in zip(operands, counts, kept, strict=True)]


def row(operand: Operand, k: int = 0, preserve_k: int = 0) -> tuple[int, ...]:
    """A weight and what goes with it: addresses, strides, sizes, counts."""
    weight, base = operand.weight, operand.base_weight
    return (
        weight.data_ptr(),
        weight.stride(0),
        address(base),
        0 if base is None else base.stride(0),
        address(operand.act_norm),
        address(operand.preserve_norm),
        address(operand.bits),
        address(operand.thresholds),
        *weight.shape,
        DTYPE_CODES[weight.dtype],
        k,
        preserve_k,
    )


def plan_of(selection: Selection, *, is_signed: bool, write: bool) -> tuple[int | bool, ...]:
    """(scope, largest, score_delta, is_signed, write, removed, group)."""
    removed, group = selection.n_m or (0, 0)
    return (
        SCOPE_CODES[selection.scope],
        selection.largest,
        selection.score_delta and not is_signed,
        is_signed,
        write,
        removed,
        group,
    )


def address(tensor: Tensor | None) -> int:
    """Where its data lie; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _counts(operands, selection, compared):
    """How many are selected: along a row, in the tensor, or of all that is compared."""
    if selection.scope == "row":
        return [num_pruned(o.weight.shape[1], selection) for o in operands]
    if selection.scope == "tensor":
        return [num_pruned(o.weight.numel(), selection) for o in operands]
    return [num_pruned(compared, selection)] * len(operands)
