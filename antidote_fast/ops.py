"""The tensor ops: each validates its arguments, picks a backend, allocates, and calls it.

N = out_features, K = in_features. A weight is (N, K) bf16, fp16 or fp32 with unit column stride and
any row stride; an activation norm is (K,) fp32, or None for plain magnitude. The score of a weight
is ``| |w| * n |`` in fp32 (with ``score_delta``: ``|w - base| * n``), the order ascending
(score, index) with NaN last. Source: Antidote, arXiv 2408.09600, eq. 1 and 2, and Wanda.

Every op takes ``backend=None``: a backend's name, else the environment variable
``ANTIDOTE_BACKEND``, else the fastest one available. All give the same bits. Refusals are
TypeError, ValueError or BackendUnavailable; nothing is written then. Values are never read, so no
call waits for a device.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antidote_fast import _check as check
from antidote_fast.backends import select
from antidote_fast.backends.operand import Operand
from antidote_fast.masks import PackedMask
from antidote_fast.selection import Selection

OrNone = Sequence[Tensor | None]


def accumulate_sq_norm_(
    sq_sum: Tensor, x: Tensor, token_mask: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Add the sum over tokens of ``x ** 2`` to ``sq_sum``, in place.

    Args:
        sq_sum: the sums so far, (K,) fp32.
        x: activations (..., K) in bf16, fp16 or fp32, with unit stride along K.
        token_mask: bool or integer of shape ``x.shape[:-1]``; a token counts where it is nonzero.
            An excluded token is not read, so NaN there does no harm.

    Returns:
        sq_sum. The sum is taken in float64 and rounded once, so every run gives the same bits.
    """
    check.vector("sq_sum", sq_sum)
    check.writable("sq_sum", sq_sum)
    token_mask = check.activation(x, token_mask, sq_sum)
    module = select(backend, sq_sum.device.type)
    if x.numel():
        module.accumulate_sq_norm_(sq_sum, x, token_mask)
        check.mark_written(sq_sum)
    return sq_sum


def score(
    weight: Tensor,
    act_norm: Tensor | None = None,
    *,
    base_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the score of every weight, as the module's text defines it.

    Args:
        weight: a matrix (N, K).
        act_norm: the activation norm (K,) fp32; None scores by plain magnitude.
        base_weight: a matrix like weight; with it ``|weight - base_weight|`` is scored.

    Returns:
        The scores, (N, K) fp32; each NaN has the bits 0x7FC00000.
    """
    check.matrix("weight", weight)
    if act_norm is not None:
        check.vector("act_norm", act_norm, like=weight)
    check.base(weight, base_weight)
    module = select(backend, weight.device.type)
    return module.score(weight, act_norm, base_weight)


def select_mask(score: Tensor, selection: Selection, *, backend: str | None = None) -> PackedMask:
    """Return the mask of what ``selection`` removes, judged by any matrix of scores.

    Scores are compared with their signs: -0 equals +0, and NaN comes last.

    Args:
        score: the scores, (N, K) fp32.
        selection: a Selection of row or tensor scope, or with n_m.

    Returns:
        A PackedMask of shape (N, K).
    """
    check.matrix("score", score, dtypes=(torch.float32,))
    check.selection(selection, one_weight=True)
    module = select(backend, score.device.type)
    bits = _empty_bits(score)
    if score.numel():
        module.select_mask(score, selection, bits)
    return PackedMask(bits, score.shape)


def prune_mask(
    weight: Tensor,
    act_norm: Tensor | None,
    selection: Selection,
    *,
    preserve_norm: Tensor | None = None,
    base_weight: Tensor | None = None,
    backend: str | None = None,
) -> PackedMask:
    """Return the mask that :func:`prune_` would apply, and leave the weight as it is.

    The arguments are those of :func:`prune_`; ``base_weight`` matters with ``score_delta`` only.

    Returns:
        A PackedMask of shape (N, K).
    """
    operand = Operand(weight, act_norm, preserve_norm, base_weight)
    return _prune([operand], selection, backend, write=False)[0]


def prune_(
    weight: Tensor,
    act_norm: Tensor | None,
    selection: Selection,
    *,
    preserve_norm: Tensor | None = None,
    base_weight: Tensor | None = None,
    return_mask: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, PackedMask]:
    """Score a weight, select what goes, and remove that, in one pass and in place.

    Args:
        weight: a matrix (N, K).
        act_norm: the activation norm (K,) fp32; None scores by plain magnitude.
        selection: a Selection of row or tensor scope, or with n_m.
        preserve_norm: a second norm (K,) fp32; weights that rank in the top ``preserve_ratio`` by
            it are kept.
        base_weight: a matrix like weight; removed weights take its bits instead of +0.
        return_mask: also return the PackedMask of what was removed.

    Returns:
        weight, or (weight, mask).
    """
    operand = Operand(weight, act_norm, preserve_norm, base_weight)
    masks = _prune([operand], selection, backend, want_masks=return_mask)
    return (weight, masks[0]) if return_mask else weight


def apply_mask_(
    weight: Tensor,
    mask: PackedMask,
    *,
    base_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Remove from a weight, in place, what a mask marks.

    Args:
        weight: a matrix (N, K).
        mask: a PackedMask of the same shape, on the same device.
        base_weight: a matrix like weight; removed weights take its bits instead of +0.

    Returns:
        weight.
    """
    check.matrix("weight", weight)
    check.writable("weight", weight)
    check.mask(mask, weight)
    check.base(weight, base_weight)
    check.no_overlap([("weight", weight)], check.named(base_weight=base_weight, mask=mask.bits))
    module = select(backend, weight.device.type)
    if weight.numel():
        module.apply_mask_(weight, mask.bits.contiguous(), base_weight)
        check.mark_written(weight)
    return weight


def prune_many_(
    weights: Sequence[Tensor],
    act_norms: OrNone,
    selection: Selection,
    *,
    preserve_norms: OrNone | None = None,
    base_weights: OrNone | None = None,
    return_mask: bool = False,
    backend: str | None = None,
) -> Sequence[Tensor] | tuple[Sequence[Tensor], list[PackedMask]]:
    """Prune a list of weights in one call, each as :func:`prune_` does.

    ``scope="global"`` compares the scores of the whole list. Everything is validated before the
    first write.

    Args:
        weights: a list of matrices (N_i, K_i) on one device; none is there twice, none overlap.
        act_norms: a list of norms (K_i,) fp32; None in it scores by plain magnitude.
        selection: a Selection of any scope.
        preserve_norms: a list of norms (K_i,) fp32; None in it, or for all, preserves nothing.
        base_weights: a list like weights, or None; an entry may be None without ``score_delta``.
        return_mask: also return the list of PackedMasks.

    Returns:
        weights, or (weights, masks).
    """
    operands = _operands(weights, act_norms, preserve_norms, base_weights)
    masks = _prune(operands, selection, backend, many=True, want_masks=return_mask)
    return (weights, masks) if return_mask else weights


def prune_with_report_(
    weights: Sequence[Tensor],
    act_norms: OrNone,
    selection: Selection,
    *,
    preserve_norms: OrNone | None = None,
    base_weights: OrNone | None = None,
    write: bool = True,
    backend: str | None = None,
) -> tuple[list[PackedMask], list[float]]:
    """Prune a list as :func:`prune_many_` does, and also say where the selection's edge lies.

    With ``write=False`` the weights are left as they are, and :func:`apply_mask_` may follow.

    Returns:
        (masks, thresholds): one PackedMask and one float for each weight. The threshold is the
        smallest score selected (``largest=False``: the largest); NaN where nothing was, or with
        n_m.
    """
    operands = _operands(weights, act_norms, preserve_norms, base_weights)
    masks = _prune(operands, selection, backend, many=True, write=write, want_thresholds=True)
    thresholds = [o.thresholds for o in operands if o.thresholds is not None]
    return masks, _edges(thresholds, selection.largest)


def prune_linear_(
    weight: Tensor,
    x: Tensor,
    selection: Selection,
    *,
    token_mask: Tensor | None = None,
    preserve_norm: Tensor | None = None,
    base_weight: Tensor | None = None,
    return_mask: bool = False,
    return_norm: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor | PackedMask, ...]:
    """Prune one linear layer by one batch of its input: norms, scores, selection and removal.

    Args:
        weight: a matrix (N, K).
        x: the layer's input, (..., K).
        token_mask: which tokens count, as in :func:`accumulate_sq_norm_`.
        selection: as in :func:`prune_`; so are preserve_norm, base_weight and return_mask.
        return_norm: also return the norm that was used, ``sqrt(sum of x ** 2)``, (K,) fp32.

    Returns:
        weight, or a tuple of weight, then the mask and the norm where asked for.
    """
    check.selection(selection, one_weight=True)
    check.matrix("weight", weight)
    check.writable("weight", weight)
    norm = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
    token_mask = check.activation(x, token_mask, norm)
    check.no_overlap([("weight", weight)], check.named(x=x, token_mask=token_mask))
    operand = Operand(weight, norm, preserve_norm, base_weight)
    check.prune_operands(
        [operand], selection, write=True
    )  # all refusals come before the norms' work
    module = select(backend, weight.device.type)
    if return_mask:
        operand.bits = _empty_bits(weight)
    at_once = weight.numel() > 0 and hasattr(module, "prune_linear")
    if not (at_once and module.prune_linear(operand, x, token_mask, selection)):
        if x.numel():
            module.accumulate_sq_norm_(norm, x, token_mask)
        norm.sqrt_()
        if weight.numel():
            module.prune([operand], selection, write=True)
    if weight.numel():
        check.mark_written(weight)
    masks = () if operand.bits is None else (PackedMask(operand.bits, weight.shape),)
    outputs = (weight, *masks, norm) if return_norm else (weight, *masks)
    return outputs if len(outputs) > 1 else weight


def _operands(
    weights: Any, act_norms: Any, preserve_norms: Any, base_weights: Any
) -> list[Operand]:
    """What a many-call prunes; a list that is left out is None for each weight."""
    lists = {"act_norms": act_norms, "preserve_norms": preserve_norms, "base_weights": base_weights}
    return [Operand(*each) for each in check.aligned(weights, **lists)]


def _prune(
    operands: Sequence[Operand],
    selection: Selection,
    backend: str | None,
    *,
    write: bool = True,
    want_masks: bool = True,
    want_thresholds: bool = False,
    many: bool = False,
) -> list[PackedMask]:
    """Check and prune; fill what is wanted and return the masks, if they are."""
    check.selection(selection, one_weight=not many)
    check.prune_operands(operands, selection, write=write, many=many)
    module = select(backend, operands[0].weight.device.type if operands else "cpu")
    weights = [operand.weight for operand in operands]
    for operand in operands:
        weight = operand.weight
        if want_masks:
            operand.bits = _empty_bits(weight)
        if want_thresholds:
            operand.thresholds = weight.new_full((len(weight),), torch.nan, dtype=torch.float32)
    if any(weight.numel() for weight in weights):
        module.prune(operands, selection, write=write)
        if write:
            check.mark_written(*weights)
    return [PackedMask(o.bits, o.weight.shape) for o in operands if o.bits is not None]


def _empty_bits(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return torch.zeros((rows, (columns + 7) // 8), dtype=torch.uint8, device=weight.device)


def _edges(thresholds: Sequence[Tensor], largest: bool) -> list[float]:
    """One float a list of rows' thresholds; the device is waited for once."""
    if not thresholds:
        return []
    far = torch.inf if largest else -torch.inf
    if thresholds[0].device.type == "cpu":  # hundreds of small ones: a sixth of the time
        least = np.fmin if largest else np.fmax  # both pass over NaN
        return [float(least.reduce(rows.numpy(), initial=np.nan)) for rows in thresholds]
    edges = []
    for rows in thresholds:
        present = ~rows.isnan()  # absent: nothing selected, or its edge is NaN in every row
        padded = torch.nn.functional.pad(torch.where(present, rows, far), (0, 1), value=far)
        edge = padded.amin() if largest else padded.amax()
        edges.append(torch.where(present.any(), edge, torch.nan))
    return torch.stack(edges).tolist()
