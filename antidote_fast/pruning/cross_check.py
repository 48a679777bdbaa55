"""What a kernel selected, checked against the definition on a few rows of each kind of weight.

A fault in a kernel, a compiler or a device would prune the wrong weights and say nothing. So for
the first weight of each (shape, dtype, device) of a prune some rows are copied. The backend prunes
the copy first, and the reference another; the masks of the whole weights are looked at before they
are applied, and the rows again after that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from antidote_fast import backends, ops
from antidote_fast.backends import reference
from antidote_fast.backends.operand import Operand
from antidote_fast.errors import AntidoteError
from antidote_fast.models.targets import Target
from antidote_fast.pruning.layers import Layer
from antidote_fast.selection import Selection, num_pruned

MAX_ROWS = 4
_UNWRITTEN = "; nothing was written"
_WRITTEN = "; the weights in memory are not to be used"


@dataclass
class Sample:
    """Some rows of one weight as they were, and what is selected of them.

    ``part`` is what they are selected from, and ``base`` goes with it: None where that is a matrix
    of scores. ``scores`` and ``preserve_scores``, by the preserve norm, are integers in their
    order. ``bits`` are those of the rows, ``base_bits`` what removed weights become.
    """

    layer: Layer
    rows: torch.Tensor
    part: torch.Tensor
    base: torch.Tensor | None
    scores: torch.Tensor
    preserve_scores: torch.Tensor | None
    bits: torch.Tensor
    base_bits: torch.Tensor | int
    mask_of_copy: torch.Tensor | None = None
    chosen: torch.Tensor | None = None  # of these rows, in the whole


class CrossCheck:
    """Checks the calls of one prune; every weight kind once.

    Args:
        selection: the :class:`Selection`.
        backend: as in :mod:`antidote_fast.ops`; nothing is checked where it is the reference.
        enabled: otherwise nothing is checked either.
    """

    def __init__(self, selection: Selection, backend: str | None, enabled: bool = True) -> None:
        self.selection, self.backend, self.enabled = selection, backend, enabled
        self._seen: set[tuple] = set()
        self._samples: list[Sample] = []

    def before(self, layers: Sequence[Layer], scored: Sequence[torch.Tensor]) -> list[Sample]:
        """Copy rows of the weights of one call, and prune the copies.

        Args:
            layers: the weights.
            scored: the matrices that are selected from: the weights', or their scores.

        Returns:
            What :meth:`selected` takes; :meth:`written` looks at all of them.

        Raises:
            AntidoteError: the backend selects otherwise than the reference; nothing is written.
        """
        samples = []
        for layer, matrix in zip(layers, scored, strict=True) if self.enabled else ():
            kind = tuple(matrix.shape), layer.matrix.dtype, matrix.device
            module = backends.select(self.backend, matrix.device.type)
            if kind in self._seen or module is reference or not matrix.numel():
                continue
            self._seen.add(kind)
            rows = _some_rows(matrix)
            part = matrix.detach()[rows]
            base = None if layer.base is None else layer.base.detach()[rows]
            scored_base = base if matrix is layer.matrix else None
            delta = scored_base if self.selection.score_delta else None
            preserve = layer.preserve_norm
            samples.append(
                Sample(
                    layer,
                    rows,
                    part,
                    scored_base,
                    _ordered(part, layer.norm, delta),
                    None if preserve is None else _ordered(part, preserve, delta),
                    _bits(layer.matrix.detach()[rows]),
                    0 if base is None else _bits(base),
                )
            )
        if samples:
            self._prune_copies(samples)
        self._samples += samples
        return samples

    def selected(self, samples: Sequence[Sample], layers: Sequence[Layer]) -> None:
        """Look at what the call chose of the copied rows.

        Args:
            samples: of :meth:`before`.
            layers: of the whole call, with their masks and thresholds; the weights as they were.

        Raises:
            AntidoteError: naming the weight and the backend; nothing is written.
        """
        for sample in samples:
            layer = sample.layer
            bits = layer.mask.bits[sample.rows].cpu()
            sample.chosen = reference.unpack_bits(bits, layer.mask.shape[1])
            if self.selection.n_m is not None or self.selection.scope == "row":
                ok = torch.equal(bits, sample.mask_of_copy)  # a row's selection is its own
            else:
                ok = _cut_at(sample, layer.threshold, self.selection.largest)
                if self.selection.scope == "tensor":
                    ok &= self._counted([layer])
            unchanged = torch.equal(_bits(layer.matrix.detach()[sample.rows]), sample.bits)
            if not (ok and unchanged):
                self._refuse(sample, _WRITTEN if not unchanged else _UNWRITTEN)
        if self.selection.scope == "global" and samples and not self._counted(layers):
            self._refuse(samples[0], _UNWRITTEN)

    def written(self) -> None:
        """Look at all copied rows again, now that the masks were applied.

        Raises:
            AntidoteError: naming the weight and the backend.
        """
        for sample in self._samples:
            now = _bits(sample.layer.matrix.detach()[sample.rows])
            if not torch.equal(now, torch.where(sample.chosen, sample.base_bits, sample.bits)):
                self._refuse(sample, _WRITTEN)

    def _counted(self, layers):
        """Whether as many are removed of weights that are compared as the selection means."""
        total = sum(layer.matrix.numel() for layer in layers)
        count = sum(layer.mask.count() for layer in layers)
        selected, preserved = num_pruned(total, self.selection), 0
        if layers[0].preserve_norm is not None:
            preserved = num_pruned(total, self.selection.preserve)
        return selected - preserved <= count <= selected

    def _prune_copies(self, samples):
        copies = [sample.part.clone() for sample in samples]
        norms = [sample.layer.norm for sample in samples]
        preserve_norms = [sample.layer.preserve_norm for sample in samples]
        bases = [sample.base for sample in samples]
        masks, _ = ops.prune_with_report_(
            copies,
            norms,
            self.selection,
            preserve_norms=preserve_norms,
            base_weights=bases,
            write=False,
            backend=self.backend,
        )
        for copy, mask, base in zip(copies, masks, bases, strict=True):
            ops.apply_mask_(copy, mask, base_weight=base, backend=self.backend)
        parts = [sample.part.to("cpu", copy=True) for sample in samples]
        bits = [mask.bits.to("cpu", copy=True) for mask in masks]
        lists = parts, _on_cpu(norms), _on_cpu(preserve_norms), _on_cpu(bases), bits
        expected = [Operand(*each) for each in zip(*lists, strict=True)]
        reference.prune(expected, self.selection, write=True)
        for i, sample in enumerate(samples):
            sample.mask_of_copy = bits[i]
            same_mask = torch.equal(masks[i].bits.cpu(), bits[i])
            if not same_mask or not torch.equal(_bits(copies[i]), _bits(parts[i])):
                self._refuse(sample, _UNWRITTEN)

    def _refuse(self, sample, consequence):
        module = backends.select(self.backend, sample.part.device.type)
        raise AntidoteError(
            f"{sample.layer.key}: the {module.NAME} backend does not select what the reference does"
            f"{consequence}; choose another backend, and report this"
        )


def check_live(targets: Sequence[Target], weights: Mapping[str, torch.Tensor]) -> None:
    """Whether modules compute with what is pruned, by some rows of the first of each kind.

    Args:
        targets: of :func:`antidote_fast.models.targets.find_targets`.
        weights: {key: tensor that is to be pruned, or was}.

    Raises:
        AntidoteError: a module's ``weight`` is another tensor, as one that a hook computes.
    """
    seen = set()
    for target in targets:
        pruned = weights[target.key].detach()
        kind = type(target.module), target.masked, tuple(pruned.shape), pruned.dtype, pruned.device
        if kind in seen or not pruned.numel() or pruned.dim() != 2 or pruned.is_meta:
            continue
        seen.add(kind)
        live: Any = target.module.weight
        live, rows = live.detach(), _some_rows(pruned)
        live = live.to_local() if hasattr(live, "to_local") else live
        if live.shape != pruned.shape or not torch.equal(_bits(live[rows]), _bits(pruned[rows])):
            raise AntidoteError(
                f"{target.key}: its module ({type(target.module).__name__}) computes with another "
                "tensor than its parameter; leave it out with ignore"
            )


def _some_rows(matrix):
    count = matrix.shape[0]
    rows = sorted({i * (count - 1) // max(1, MAX_ROWS - 1) for i in range(MAX_ROWS)})
    return torch.tensor(rows, dtype=torch.int64, device=matrix.device)


def _on_cpu(tensors):
    return [None if tensor is None else tensor.cpu() for tensor in tensors]


def _ordered(part, norm, base=None):
    """Scores of some rows as integers in their order."""
    return reference.score(*_on_cpu([part, norm, base])).view(torch.int32)


def _bits(part):
    return part.cpu().view(torch.int32 if part.itemsize == 4 else torch.int16)


def _apart(scores, above):
    """Whether all (score, index) that are ``above`` are above all others."""
    above = above[scores.argsort(stable=True)]
    return not bool((above[:-1] & ~above[1:]).any())


def _cut_at(sample, threshold, largest):
    """Whether rows of a whole that was cut at ``threshold`` are on their sides of it.

    What is preserved of those beyond it is above all removed ones by its own scores.
    """
    scores, removed = sample.scores, sample.chosen
    if math.isnan(threshold):
        return not bool(removed.any())
    edge = torch.tensor(threshold, dtype=torch.float32, device="cpu").view(torch.int32)
    inside, outside = (scores > edge, scores < edge)[:: 1 if largest else -1]
    if removed[outside].any():
        return False
    if sample.preserve_scores is None:
        above = removed if largest else ~removed
        return bool(removed[inside].all()) and _apart(scores.flatten(), above.flatten())
    either = inside | removed
    return _apart(sample.preserve_scores[either], ~removed[either])
