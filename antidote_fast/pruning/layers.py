"""Weights on their way through a prune: every check of them, before the first write."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from antidote_fast import _check, ops
from antidote_fast.backends.operand import Operand
from antidote_fast.config.scores import SCORES
from antidote_fast.errors import AntidoteError, DataError, NothingPruned
from antidote_fast.masks import PackedMask
from antidote_fast.models.targets import Target, check_names, natural_key
from antidote_fast.pruning.evidence import Evidence, beside
from antidote_fast.pruning.scores import score_module
from antidote_fast.selection import Selection
from antidote_fast.system import interrupts


@dataclass
class Layer:
    """One weight: ``matrix`` is (out, in), the saved tensor or a transposed copy of it.

    ``base`` is like ``matrix``, and what removed weights become; ``preserve_norm`` is (in,) fp32.
    """

    key: str
    saved: torch.Tensor
    matrix: torch.Tensor
    transposed: bool
    copied: bool
    norm: torch.Tensor | None
    zero_norm_channels: int | None
    preserve_norm: torch.Tensor | None = None
    zero_preserve_channels: int | None = None
    base: torch.Tensor | None = None
    zero_weights: int = 0
    mask: PackedMask | None = None
    threshold: float = math.nan
    seconds: float | None = None
    masked: Target | None = None  # whose parameter ``saved`` is a masked copy of

    def remove(self, backend: str | None) -> None:
        """Remove what the mask marks, also from where the weight is saved; may be done twice."""
        start = time.perf_counter()
        ops.apply_mask_(self.matrix, self.mask, base_weight=self.base, backend=backend)
        if self.copied:
            self.saved.copy_(self.matrix.t() if self.transposed else self.matrix)
        if self.masked is not None:
            self.masked.remove(self.mask)
        if self.seconds is not None:
            self.seconds += time.perf_counter() - start


def prepare(
    weights: Mapping[str, torch.Tensor], evidence: Evidence, scope: str
) -> tuple[list[Layer], dict[str, str]]:
    """Every check on every weight; nothing is written here.

    Args:
        weights, evidence: as :func:`antidote_fast.pruning.prune.prune_state_`, which says what is
            raised; names in ``transposed`` and ``routed``, its own and those of its norms, may be
            of other weights.
        scope: of the selection.

    Returns:
        (layers in natural order, {key: why it was left alone}).
    """
    check_names(weights)
    declared = SCORES[evidence.score]
    by_channel = None if declared.own_matrix else score_module(evidence.score).channel_norm
    norms = evidence.named_norms.values()
    transposed = set(evidence.transposed).union(*(each.transposed for each in norms))
    routed = set(evidence.routed).union(*(each.routed for each in norms))
    layers, skipped = [], {}
    for key in sorted(weights, key=natural_key):
        saved = weights[key]
        if not isinstance(saved, torch.Tensor) or saved.dim() != 2:
            raise DataError(f"{key}: must be a matrix (out_features, in_features)")
        if saved.dtype not in _check.WEIGHT_DTYPES:
            raise DataError(f"{key}: is {saved.dtype}; must be float32, bfloat16 or float16")
        if saved.device.type == "meta":
            raise DataError(f"{key}: is not loaded (meta device); prune the checkpoint's tensors")
        matrix = saved.t() if key in transposed else saved
        norm, zeros = _norm_of(key, matrix, evidence.norms, scope, "norms")
        if declared.needs_norms and zeros == norm.numel():
            if key in routed:
                skipped[key] = "routed expert that no token reached"
                continue
            raise DataError(f"{key}: all its activation norms are zero")
        preserve, preserve_zeros = _norm_of(
            key, matrix, evidence.preserve_norms, scope, "preserve_norms"
        )
        base = None
        if evidence.base_weights is not None:
            accepted = f"{saved.dtype} {tuple(saved.shape)}, as the weight"
            bases = "base_weights", evidence.base_weights
            base = beside(*bases, key, _check.WEIGHT_DTYPES, saved, accepted)
            if base.device.type == "meta":
                raise DataError(f"{key}: is not loaded in base_weights (meta device)")
            base = base.to(saved.device)
            base = base.t() if key in transposed else base
            base = base if base.stride(1) == 1 else base.contiguous()
        # A copy where columns do not lie side by side: Conv1D, and odd views.
        copied = key in transposed or matrix.stride(1) != 1
        if copied:
            matrix = matrix.clone(memory_format=torch.contiguous_format)
        norm = _on(saved.device, by_channel and by_channel(norm))
        preserve = _on(saved.device, preserve)
        where = key, saved, matrix, key in transposed, copied
        layers.append(Layer(*where, norm, zeros, preserve, preserve_zeros, base))
    for layer, num_zeros in zip(layers, _zeros_in(layers, "matrix"), strict=True):
        layer.zero_weights = num_zeros
    if evidence.base_weights is not None:
        for layer, _ in zip(layers, _zeros_in(layers, "base", " in base_weights"), strict=True):
            _as_weight(layer)
    if not layers:
        raise NothingPruned(
            f"nothing to prune: {len(skipped)} weights, all of routed experts that no token reached"
        )
    return layers, skipped


def check_all(layers: Sequence[Layer], selection: Selection) -> None:
    """What the op refuses (overlaps, strides), for all layers before the first one is written.

    Raises:
        DataError: naming the weights.
    """
    by_device: dict[torch.device, list] = {}
    for layer in layers:
        by_device.setdefault(layer.matrix.device, []).append(layer)
    for here in by_device.values():
        operands = [Operand(x.matrix, base_weight=x.base) for x in here]
        try:
            _check.prune_operands(operands, selection, write=True, many=True)
        except (TypeError, ValueError) as error:

            def named(match, here=here):
                return here[int(match[2])].key + (" in base_weights" if match[1] else "")

            text = re.sub(r"(base_)?weights?\[(\d+)\]", named, str(error))
            raise DataError(text) from None
    for layer in layers:
        if layer.copied and _overlaps_itself(layer.saved):
            raise DataError(
                f"{layer.key}.stride()={layer.saved.stride()}: must not overlap or be expanded"
            )
    if any(layer.copied for layer in layers):  # else those above were the saved ones
        in_rows = [x for x in layers if x.saved.stride(1) == 1]
        try:
            _check.no_overlap([(x.key, x.saved) for x in in_rows], [])
        except ValueError as error:
            raise DataError(str(error)) from None


def remove_all(layers: Sequence[Layer], backend: str | None) -> None:
    """Remove from all layers what their masks mark: from all of them, whatever comes between.

    A signal waits until the last one is done, and any other exception is raised again after that.

    Raises:
        AntidoteError: a device or its memory failed twice; the message says which layers are done.
    """
    left = list(layers)

    def go_on():
        while left:
            left[0].remove(backend)
            del left[0]

    try:
        interrupts.held_back(go_on)
    except BaseException as error:
        try:
            go_on()
        except Exception as again:
            done = len(layers) - len(left)
            raise AntidoteError(
                f"{left[0].key}: could not be written ({type(again).__name__}); {done} of "
                f"{len(layers)} weights are pruned, those before it in natural order"
            ) from again
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"all {len(layers)} weights are pruned")
        raise


def _overlaps_itself(matrix):
    (small, size), (large, count) = sorted(zip(matrix.stride(), matrix.shape, strict=True))
    if matrix.numel() < 2:
        return False
    return (size > 1 and small == 0) or (count > 1 and large < small * (size - 1) + 1)


def _norm_of(key, matrix, norms, scope, name):
    """(the norm, how many of its channels are zero) of a weight; (None, None) without norms."""
    if norms is None:
        return None, None
    norm = norms.act_norm(key, scope)
    if norm.shape[0] != matrix.shape[1]:
        raise DataError(
            f"{key}: has {matrix.shape[1]} input channels, its {name.replace('_', ' ')} "
            f"{norm.shape[0]}"
        )
    return norm, norm.numel() - int(torch.count_nonzero(norm))


def _on(device, norm):
    return None if norm is None else norm.to(device, non_blocking=True)


def _as_weight(layer):
    """Have the base in its weight's dtype, which must hold its values exactly."""
    base, dtype = layer.base, layer.matrix.dtype
    layer.base = base.to(dtype)
    if base.dtype != dtype and not torch.equal(layer.base.to(base.dtype), base):
        raise DataError(
            f"{layer.key}: is {base.dtype} in base_weights, and {dtype}, as the weight is, "
            "cannot hold its values; load both in one dtype"
        )


def _zeros_in(layers, name, where=""):
    """How many elements of each layer's matrix or base are zero; all must be finite.

    A GPU is waited for once, not once a matrix.
    """
    facts: dict[str, Any] = {}
    waiting: dict[torch.device, dict[str, torch.Tensor]] = {}
    for layer in layers:
        matrix = getattr(layer, name)
        if matrix.device.type == "cpu" and matrix.is_contiguous() and matrix.numel():
            # isfinite() makes temporaries: 218 ms for (4096, 4096) fp32, this 23 (2-core Xeon,
            # busy).
            bounds = torch.aminmax(matrix)
            # As integers without their sign bit; twice as fast as torch.count_nonzero on bf16.
            bits = matrix.view(torch.int16 if matrix.itemsize == 2 else torch.int32).numpy()
            facts[layer.key] = bounds.min.item(), bounds.max.item(), np.count_nonzero(bits << 1)
        else:
            waiting.setdefault(matrix.device, {})[layer.key] = _bounds_and_nonzero(matrix)
    for by_key in waiting.values():
        facts.update(zip(by_key, torch.stack([*by_key.values()]).tolist(), strict=True))
    for layer in layers:
        low, high, nonzero = facts[layer.key]
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(f"{layer.key}: holds NaN or infinity{where}")
        yield layer.matrix.numel() - int(nonzero)


def _bounds_and_nonzero(matrix):
    """(3,) float64 on its device: the smallest and largest element, NaN if any is, and a count."""
    if not matrix.numel():
        return torch.zeros(3, dtype=torch.float64, device=matrix.device)
    bounds = [bound.double() for bound in torch.aminmax(matrix)]
    return torch.stack([*bounds, torch.count_nonzero(matrix).double()])
