"""The ground truth: every operation in plain torch, on any device, one stable sort a selection.

All other backends give these bits. The functions here check nothing: ``antidote_fast.ops`` has
validated the arguments, and allocated what is filled, before one of them is called.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from antidote_fast.backends.operand import Operand
from antidote_fast.selection import Selection, num_pruned

NAME = "reference"
DEVICE_TYPES = None  # any
CANONICAL_NAN = 0x7FC00000
INT32_MAX = 0x7FFFFFFF


def unavailable() -> None:
    """Why this backend cannot run here: never, it is plain torch."""
    return None


def pack_bits(removed: Tensor) -> Tensor:
    """Bool (N, K) -> uint8 (N, ceil(K/8)), little-endian bits, pad bits 0."""
    rows, columns = removed.shape
    padded = torch.nn.functional.pad(removed, (0, -columns % 8)).view(rows, (columns + 7) // 8, 8)
    place = 1 << torch.arange(8, dtype=torch.uint8, device=removed.device)  # no copy from the host
    return (padded.to(torch.uint8) * place).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """Uint8 (N, ceil(K/8)) -> bool (N, K)."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> place) & 1).flatten(1)[:, :columns].bool()


def accumulate_sq_norm_(sq_sum: Tensor, x: Tensor, token_mask: Tensor | None) -> None:
    """sq_sum (K,) fp32 += sum over counted rows of x (..., K) squared, summed in float64."""
    rows = x.detach()
    rows = rows.reshape(-1, x.shape[-1]) if token_mask is None else rows[token_mask.bool()]
    total = torch.zeros_like(sq_sum, dtype=torch.float64)
    for chunk in rows.split(1024):
        total += chunk.double().square().sum(dim=0)
    sq_sum.copy_(sq_sum.double() + total)


def score(weight: Tensor, act_norm: Tensor | None, base_weight: Tensor | None) -> Tensor:
    """``| |w| * n |``, or ``|w - base| * n``, in fp32 (N, K); NaN canonical."""
    value = weight.detach().float()
    if base_weight is not None:
        value = value - base_weight.detach().float()
    value = value.abs()
    if act_norm is not None:
        value = (value * act_norm.detach()).abs_()
    return _canonical(value)


def select_mask(scores: Tensor, selection: Selection, bits: Tensor) -> None:
    """Fill ``bits`` with what ``selection`` removes of a signed fp32 score matrix."""
    scores = _canonical(scores.detach() + 0.0)  # -0 becomes +0
    keys = scores.view(torch.int32)
    keys = torch.where(keys < 0, keys ^ INT32_MAX, keys)
    bits.copy_(pack_bits(selected_masks([keys], selection)[0]))


def prune(operands: Sequence[Operand], selection: Selection, *, write: bool) -> None:
    """Select on every weight of a list, then fill what was asked for.

    Args:
        operands: the weights, each with what belongs to it.
        selection: what is to go.
        write: remove from the weights in place.
    """
    keys = [_keys(o, o.act_norm, selection) for o in operands]
    removed = selected_masks(keys, selection)
    thresholds = [o.thresholds for o in operands if o.thresholds is not None]
    if thresholds:
        _fill_thresholds(thresholds, keys, removed, selection)
    protected = [i for i, o in enumerate(operands) if o.preserve_norm is not None]
    if protected:
        keys = [_keys(operands[i], operands[i].preserve_norm, selection) for i in protected]
        for i, preserved in zip(protected, selected_masks(keys, selection.preserve), strict=True):
            removed[i] &= ~preserved
    for operand, chosen in zip(operands, removed, strict=True):
        if operand.bits is not None:
            operand.bits.copy_(pack_bits(chosen))
        if write:
            _remove(operand.weight, chosen, operand.base_weight)


def apply_mask_(weight: Tensor, bits: Tensor, base_weight: Tensor | None) -> None:
    """Remove from ``weight`` what ``bits`` marks."""
    _remove(weight, unpack_bits(bits, weight.shape[1]), base_weight)


def _keys(operand, norm, selection):
    base = operand.base_weight if selection.score_delta else None
    return score(operand.weight, norm, base).view(torch.int32)


def _canonical(value):
    nan = torch.tensor(CANONICAL_NAN, dtype=torch.int32, device=value.device).view(torch.float32)
    return torch.where(value.isnan(), nan, value)


def _remove(weight, removed, base_weight):
    weight = weight.detach()
    if base_weight is None:
        weight.masked_fill_(removed, 0)
    else:  # as integers: the bits of base_weight, whatever they mean
        bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
        base = base_weight.detach().view(bits)
        weight.view(bits).copy_(torch.where(removed, base, weight.view(bits)))


def selected_masks(keys: Sequence[Tensor], selection: Selection) -> list[Tensor]:
    """Bool masks of what is removed, by integer keys in the order (key, index)."""
    if selection.scope == "row":
        return [_selected_in_rows(key, selection) for key in keys]
    flat = torch.cat([key.flatten() for key in keys]).unsqueeze(0)
    if selection.scope == "tensor":
        return [_selected_in_rows(key.reshape(1, -1), selection).view_as(key) for key in keys]
    removed = _selected_in_rows(flat, selection)[0]
    parts = removed.split([key.numel() for key in keys])
    return [part.view_as(key) for part, key in zip(parts, keys, strict=True)]


def _selected_in_rows(keys, selection):
    if selection.n_m is not None:
        return _selected_in_groups(keys, selection)
    columns = keys.shape[1]
    return _first_or_last(keys, num_pruned(columns, selection), selection.largest)


def _selected_in_groups(keys, selection):
    removed, group = selection.n_m
    rows, columns = keys.shape
    tail = columns % group
    whole = keys[:, : columns - tail].reshape(-1, group)
    selected = _first_or_last(whole, removed, selection.largest).view(rows, columns - tail)
    rest = _first_or_last(keys[:, columns - tail :], tail * removed // group, selection.largest)
    return torch.cat([selected, rest], dim=1)


def _first_or_last(keys, count, largest):
    columns = keys.shape[1]
    order = keys.sort(dim=1, stable=True).indices
    chosen = order[:, columns - count :] if largest else order[:, :count]
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, chosen, True)


def _fill_thresholds(thresholds, keys, removed, selection):
    edge = torch.amin if selection.largest else torch.amax
    outside = INT32_MAX if selection.largest else -1
    picked = [torch.where(r, k, outside) for r, k in zip(removed, keys, strict=True)]
    if selection.scope == "global":
        edges = [edge(part) for part in picked if part.numel()]
        best = edge(torch.stack(edges), 0) if edges else None
    for out, part in zip(thresholds, picked, strict=True):
        if selection.n_m is not None or part.numel() == 0:
            out.fill_(torch.nan)
            continue
        if selection.scope == "row":
            value = edge(part, dim=1)
        else:
            value = (edge(part) if selection.scope == "tensor" else best).expand(len(out))
        missing = value == outside
        out.copy_(torch.where(missing, torch.nan, value.to(torch.int32).view(torch.float32)))
