"""Tensors as the integers that ``csrc`` takes: what the extensions' backends share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from antidote_fast.selection import Selection, num_pruned

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCOPE_CODES = {"row": 0, "tensor": 1, "global": 2}


def rows_of(
    weights: Sequence[Tensor],
    act_norms: Sequence[Tensor | None],
    selection: Selection,
    preserve_norms: Sequence[Tensor | None],
    base_weights: Sequence[Tensor | None],
    bits: Sequence[Tensor] | None,
    thresholds: Sequence[Tensor] | None,
) -> list[tuple[int, ...]]:
    """One tuple a weight, as ``csrc/matrix.h`` reads it; lists as ``reference.prune`` has them."""
    counts = _counts(weights, selection)
    protected = [0] * len(weights)
    if selection.n_m is None:
        pairs = zip(weights, preserve_norms, strict=True)
        compared = [w for w, norm in pairs if norm is not None]
        protected = _counts(weights, selection.preserve, compared)
    return [
        row(
            w,
            act_norms[i],
            base_weights[i],
            preserve_norms[i],
            None if bits is None else bits[i],
            None if thresholds is None else thresholds[i],
            counts[i],
            protected[i],
        )
        for i, w in enumerate(weights)
    ]


def row(
    weight: Tensor,
    act_norm: Tensor | None = None,
    base_weight: Tensor | None = None,
    preserve_norm: Tensor | None = None,
    bits: Tensor | None = None,
    thresholds: Tensor | None = None,
    k: int = 0,
    preserve_k: int = 0,
) -> tuple[int, ...]:
    """A weight and what goes with it: addresses, strides, sizes, counts."""
    return (
        weight.data_ptr(),
        weight.stride(0),
        address(base_weight),
        0 if base_weight is None else base_weight.stride(0),
        address(act_norm),
        address(preserve_norm),
        address(bits),
        address(thresholds),
        *weight.shape,
        DTYPE_CODES[weight.dtype],
        k,
        preserve_k,
    )


def signed_row(scores: Tensor, selection: Selection, bits: Tensor) -> tuple[int, ...]:
    """A matrix of scores of any sign, as :func:`row`."""
    (k,) = _counts([scores], selection)
    return row(scores, bits=bits, k=k)


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


def _counts(weights, selection, compared=None):
    """How many are selected: along a row, in the tensor, or of all that is compared."""
    if selection.scope == "row":
        return [num_pruned(w.shape[1], selection) for w in weights]
    if selection.scope == "tensor":
        return [num_pruned(w.numel(), selection) for w in weights]
    total = sum(w.numel() for w in (weights if compared is None else compared))
    return [num_pruned(total, selection)] * len(weights)
