"""What the tensor ops refuse: one line that names the argument, its value and what is accepted.

Only shapes, dtypes, strides and addresses are looked at; values are never read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from antidote_fast.backends.operand import Operand
from antidote_fast.masks import PackedMask
from antidote_fast.selection import Selection

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
MASK_DTYPES = (torch.bool, *(getattr(torch, name) for name in _INTEGERS))


def tensor(name: str, value: Any, dtypes: Sequence[torch.dtype]) -> None:
    """A plain, strided, materialised tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}={_show(value)}: must be a torch.Tensor")
    if type(value) not in (Tensor, torch.nn.Parameter):
        hint = "; pass .to_local()" if hasattr(value, "to_local") else ""
        raise TypeError(f"{name} is a {type(value).__name__}: must be a plain torch.Tensor{hint}")
    if value.is_quantized:
        raise TypeError(f"{name} is quantised ({value.dtype}): must be {_names(dtypes)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: must be strided (dense)")
    if value.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: must hold data")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}.dtype={value.dtype}: must be {_names(dtypes)}")
    if value.is_neg():
        raise ValueError(
            f"{name} is a lazily negated view: must be materialised; use .resolve_neg()"
        )


def matrix(name: str, value: Tensor, dtypes: Sequence[torch.dtype] = WEIGHT_DTYPES) -> None:
    """(N, K), unit column stride, rows that do not overlap."""
    tensor(name, value, dtypes)
    if value.dim() != 2:
        raise ValueError(f"{name}.shape={tuple(value.shape)}: must be (out_features, in_features)")
    rows, columns = value.shape
    row_stride, column_stride = value.stride()
    if columns > 1 and value.numel() and column_stride != 1:
        raise ValueError(f"{name}.stride()={value.stride()}: the column stride must be 1")
    if rows > 1 and row_stride < columns:
        raise ValueError(f"{name}.stride()={value.stride()}: rows must not overlap or be expanded")


def vector(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """(K,) fp32, contiguous; K and device as ``like`` (a weight)."""
    tensor(name, value, (torch.float32,))
    expected = "(in_features,)" if like is None else f"({like.shape[1]},)"
    if value.dim() != 1 or (like is not None and value.shape[0] != like.shape[1]):
        raise ValueError(f"{name}.shape={tuple(value.shape)}: must be {expected}")
    if value.numel() > 1 and value.stride(0) != 1:
        raise ValueError(f"{name}.stride()={value.stride()}: must be (1,)")
    if like is not None:
        same_device(name, value, like)


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    """On the device of ``like``."""
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}: must be on {like.device}")


def base(weight: Tensor, base_weight: Tensor | None, name: str = "base_weight") -> None:
    """None, or like ``weight`` in shape, dtype and device."""
    if base_weight is None:
        return
    matrix(name, base_weight)
    if base_weight.shape != weight.shape or base_weight.dtype != weight.dtype:
        raise ValueError(
            f"{name} is {base_weight.dtype} {tuple(base_weight.shape)}: must be "
            f"{weight.dtype} {tuple(weight.shape)}, as the weight"
        )
    same_device(name, base_weight, weight)


def activation(x: Tensor, token_mask: Tensor | None, sq_sum: Tensor) -> Tensor | None:
    """x (..., K) with unit stride along K; returns the token mask as contiguous bool, or None."""
    tensor("x", x, WEIGHT_DTYPES)
    width = sq_sum.shape[0]
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"x.shape={tuple(x.shape)}: must be (..., {width})")
    if width > 1 and x.numel() and x.stride(-1) != 1:
        raise ValueError(f"x.stride()={x.stride()}: the stride along in_features must be 1")
    reach = width  # each dimension must step past all that the faster ones cover
    for stride, size in sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size > 1 and x.numel():
            if stride < reach:
                raise ValueError(f"x.stride()={x.stride()}: must not overlap or be expanded")
            reach += stride * (size - 1)
    same_device("x", x, sq_sum)
    no_overlap([("sq_sum", sq_sum)], named(x=x))
    if token_mask is None:
        return None
    tensor("token_mask", token_mask, MASK_DTYPES)
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask.shape={tuple(token_mask.shape)}: must be {tuple(x.shape[:-1])}, "
            "the shape of x without in_features"
        )
    same_device("token_mask", token_mask, sq_sum)
    return (token_mask != 0).contiguous()


def writable(name: str, value: Tensor) -> None:
    """No leaf that requires grad, nor a view of one, while grad is recorded; as in torch."""
    if not torch.is_grad_enabled() or not value.requires_grad:
        return
    source = value._base if value._is_view() else value
    if source is not None and source.is_leaf:
        raise ValueError(
            f"{name} is a leaf that requires grad: call under torch.no_grad(), or pass .detach()"
        )


def mark_written(*tensors: Tensor) -> None:
    """Tell autograd that native code wrote to these."""
    for value in tensors:
        if not value.is_inference():
            torch.autograd.graph.increment_version(value)


def selection(value: Any, *, one_weight: bool) -> None:
    """A Selection; of row or tensor scope where there is one weight."""
    if not isinstance(value, Selection):
        raise TypeError(f"selection={_show(value)}: must be a Selection")
    if one_weight and value.scope == "global":
        raise ValueError("selection.scope='global': must be row or tensor here; use prune_many_")


def mask(value: Any, weight: Tensor) -> None:
    """A PackedMask of the weight's shape, on its device."""
    if not isinstance(value, PackedMask):
        raise TypeError(f"mask={_show(value)}: must be a PackedMask")
    if value.shape != tuple(weight.shape):
        raise ValueError(f"mask.shape={value.shape}: must be {tuple(weight.shape)}, as the weight")
    tensor("mask.bits", value.bits, (torch.uint8,))
    same_device("mask", value.bits, weight)


def aligned(weights: Any, **optional: Any) -> list[tuple[Any, ...]]:
    """What a many-call says of each weight, the weight first; a list of None may be None."""
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights={_show(weights)}: must be a list of tensors")
    lists = [list(weights)]
    for name, values in optional.items():
        if values is None:
            values = [None] * len(weights)
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}={_show(values)}: must be a list, or None")
        if len(values) != len(weights):
            raise ValueError(f"len({name})={len(values)}: must be {len(weights)}, as weights")
        lists.append(list(values))
    return list(zip(*lists, strict=True))


def prune_operands(
    operands: Sequence[Operand], selection: Selection, *, write: bool, many: bool = False
) -> None:
    """Everything a prune takes, before anything is written."""
    written, read = [], []
    for i, operand in enumerate(operands):
        place = f"s[{i}]" if many else ""
        weight = operand.weight
        matrix(f"weight{place}", weight)
        if i:
            same_device(f"weight{place}", weight, operands[0].weight)
        if write:
            writable(f"weight{place}", weight)
        for name in ("act_norm", "preserve_norm"):
            norm = getattr(operand, name)
            if norm is not None:
                vector(name + place, norm, like=weight)
                read.append((name + place, norm))
        base(weight, operand.base_weight, f"base_weight{place}")
        if operand.base_weight is not None:
            read.append((f"base_weight{place}", operand.base_weight))
        elif selection.score_delta:
            raise ValueError(
                f"base_weight{place}=None: must be given where selection.score_delta is True"
            )
        if operand.preserve_norm is not None and selection.n_m is not None:
            raise ValueError(
                f"preserve_norm{place} with selection.n_m={selection.n_m}: must be None with n_m"
            )
        written.append((f"weight{place}", weight))
    if write:
        no_overlap(written, read)


def named(**tensors: Tensor | None) -> list[tuple[str, Tensor]]:
    """[(name, tensor)] of those that are not None."""
    return [(name, value) for name, value in tensors.items() if value is not None]


def no_overlap(written: list[tuple[str, Tensor]], read: list[tuple[str, Tensor]]) -> None:
    """No element is written twice, or written and read under another name."""
    spans = []
    for kind, pairs in (("written", written), ("read", read)):
        for name, value in pairs:
            if value.numel():
                first = value.data_ptr()
                last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                spans.append((first, first + (last + 1) * value.element_size(), kind, name, value))
    spans.sort(key=lambda span: span[:2])
    reaching: list[tuple[Any, ...]] = []
    for span in spans:
        reaching = [other for other in reaching if other[1] > span[0]]
        for other in reaching:
            if "written" in (span[2], other[2]) and _share_elements(span[4], other[4]):
                first, second = sorted((other[3], span[3]))
                raise ValueError(f"{first} and {second} overlap in memory: must be apart")
        reaching.append(span)


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Exact for what spans alone cannot tell: two row-strided views between each other's rows."""
    if a.device != b.device:
        return False
    starts_a, width_a = _row_intervals(a)
    starts_b, width_b = _row_intervals(b)
    before = np.searchsorted(starts_a, starts_b + width_b, side="left") - 1
    hit = before >= 0
    return bool((starts_a[before[hit]] + width_a > starts_b[hit]).any())


def _row_intervals(value: Tensor) -> tuple[np.ndarray, int]:
    size = value.element_size()
    offsets = np.zeros(1, dtype=np.int64)
    for n, s in zip(value.shape[:-1], value.stride()[:-1], strict=True):
        offsets = (offsets[:, None] + np.arange(n, dtype=np.int64) * s).reshape(-1)
    return value.data_ptr() + np.sort(offsets) * size, value.shape[-1] * size


def _show(value: Any) -> str:
    """A value in a few words, on one line."""
    if isinstance(value, Tensor):
        return f"a {_names([value.dtype])} tensor of shape {tuple(value.shape)}"
    return " ".join(repr(value).split())[:80]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)
