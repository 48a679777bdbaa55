"""What a kernel selected, checked against the definition on a few rows of each kind of weight.

A fault in a kernel, a compiler or a device would prune the wrong weights and say nothing. So for
the first weight of each (shape, dtype, device) of a prune some rows are copied. The backend prunes
the copy first; the masks of the whole weights are looked at before they are applied, and the rows
again after that.
Nothing is sorted: a selection is right if and only if its count is right and every (score, index)
on one side of it is below every one on the other. Only what is selected by one norm and not by
another has no such form: there the few copied rows are sorted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from antidote_fast import backends, ops
from antidote_fast.backends import reference
from antidote_fast.errors import AntidoteError
from antidote_fast.masks import PackedMask
from antidote_fast.models.targets import Target
from antidote_fast.pruning.layers import Layer
from antidote_fast.selection import Selection, num_pruned

MAX_ROWS = 4
_UNWRITTEN = "; nothing was written"
_WRITTEN = "; the weights in memory are not to be used"
_LOWEST, _HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


@dataclass
class Sample:
    """Some rows of one weight as they were: ``scores`` are theirs as ordered integers.

    ``preserve_scores`` are those by the preserve norm, ``base_bits`` what removed weights become,
    ``part`` is what was selected from, and ``base`` goes with it: None where that is a matrix of
    scores.
    """

    layer: Layer
    rows: torch.Tensor
    scores: np.ndarray
    bits: torch.Tensor
    part: torch.Tensor
    preserve_scores: np.ndarray | None
    base_bits: torch.Tensor | int
    base: torch.Tensor | None
    removed: np.ndarray | None = None  # of the copy
    chosen: np.ndarray | None = None  # of these rows, in the whole


class CrossCheck:
    """Checks the calls of one prune; every weight kind once.

    Args:
        selection: the :class:`Selection`.
        backend: as in :mod:`antidote_fast.ops`; nothing is checked where it is the reference.
    """

    def __init__(self, selection: Selection, backend: str | None) -> None:
        self.selection = selection
        self.backend = backend
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
        for layer, matrix in zip(layers, scored, strict=True):
            kind = tuple(matrix.shape), layer.matrix.dtype, matrix.device
            module = backends.select(self.backend, matrix.device.type)
            if kind in self._seen or module is reference or not matrix.numel():
                continue
            self._seen.add(kind)
            rows = _some_rows(matrix)
            part = matrix.detach()[rows]
            preserve_norm = layer.preserve_norm
            base = None if layer.base is None else layer.base.detach()[rows]
            scored_base = base if matrix is layer.matrix else None
            delta = scored_base if self.selection.score_delta else None
            samples.append(
                Sample(
                    layer,
                    rows,
                    _ordered(part, layer.norm, delta),
                    _bits(layer.matrix.detach()[rows]),
                    part,
                    None if preserve_norm is None else _ordered(part, preserve_norm, delta),
                    0 if base is None else _bits(base),
                    scored_base,
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
            layer, largest = sample.layer, self.selection.largest
            removed = sample.chosen = _removed(layer.mask.bits[sample.rows], layer.mask.shape[1])
            if self.selection.n_m is None and self.selection.scope != "row":
                about = removed, layer.threshold, largest
                if sample.preserve_scores is None:
                    ok = _cut_at(sample.scores, *about)
                else:
                    ok = _cut_at_but_preserved(sample.scores, sample.preserve_scores, *about)
                if self.selection.scope == "tensor":
                    ok &= self._counted([layer])
            else:  # a row's selection is its own
                ok = np.array_equal(removed, sample.removed)
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
            chosen = torch.from_numpy(sample.chosen)
            if not torch.equal(now, torch.where(chosen, sample.base_bits, sample.bits)):
                self._refuse(sample, _WRITTEN)

    def _counted(self, layers):
        """Whether as many are removed of weights that are compared as the selection means."""
        total = sum(layer.matrix.numel() for layer in layers)
        count = sum(count_bits(layer.mask) for layer in layers)
        selected, preserved = num_pruned(total, self.selection), 0
        if layers[0].preserve_norm is not None:
            preserved = num_pruned(total, self.selection.preserve)
        return selected - preserved <= count <= selected

    def _prune_copies(self, samples):
        copies = [sample.part.clone() for sample in samples]
        masks, _ = ops.prune_with_report_(
            copies,
            [sample.layer.norm for sample in samples],
            self.selection,
            preserve_norms=[sample.layer.preserve_norm for sample in samples],
            base_weights=[sample.base for sample in samples],
            write=False,
            backend=self.backend,
        )
        for copy, mask, sample in zip(copies, masks, samples, strict=True):
            ops.apply_mask_(copy, mask, base_weight=sample.base, backend=self.backend)
        removed = [_removed(mask.bits, mask.shape[1]) for mask in masks]
        scope = self.selection.scope
        if any(sample.preserve_scores is not None for sample in samples):
            differences = self._differences(samples)
            oks = [np.array_equal(r, d) for r, d in zip(removed, differences, strict=True)]
        elif scope == "global":
            ok = self._right(_line([s.scores for s in samples]), _line(removed))
            oks = [ok] * len(samples)
        elif scope == "tensor":
            oks = [
                self._right(_line([s.scores]), _line([r]))
                for s, r in zip(samples, removed, strict=True)
            ]
        else:
            oks = [self._right(s.scores, r) for s, r in zip(samples, removed, strict=True)]
        for sample, copy, chosen, ok in zip(samples, copies, removed, oks, strict=True):
            base = 0 if sample.base is None else sample.base_bits
            expected = torch.where(torch.from_numpy(chosen), base, _bits(sample.part))
            if not ok or not torch.equal(_bits(copy), expected):
                self._refuse(sample, _UNWRITTEN)
            sample.removed = chosen

    def _differences(self, samples):
        """What is selected of the copied rows less what is protected, by the stable sort."""
        scores = [torch.from_numpy(sample.scores) for sample in samples]
        preserve = [torch.from_numpy(sample.preserve_scores) for sample in samples]
        selected = reference.selected_masks(scores, self.selection)
        preserved = reference.selected_masks(preserve, self.selection.preserve)
        return [(one & ~other).numpy() for one, other in zip(selected, preserved, strict=True)]

    def _right(self, scores, removed):
        """Whether each row of ``removed`` is what the selection means of the row of ``scores``."""
        if self.selection.n_m is not None:
            selected = reference.selected_masks([torch.from_numpy(scores)], self.selection)[0]
            return np.array_equal(selected.numpy(), removed)
        columns = scores.shape[1]
        count = num_pruned(columns, self.selection)
        if (removed.sum(axis=1) != count).any():
            return False
        above = removed if self.selection.largest else ~removed
        return count in (0, columns) or _apart(scores, above)

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


def _ordered(part, norm, base=None):
    """Scores of finite rows as integers in their order; what ``reference.score`` gives."""
    scores = part.to("cpu", torch.float32)
    if base is not None:
        scores = scores - base.to("cpu", torch.float32)
    scores = scores.abs()
    if norm is not None:
        scores = (scores * norm.detach().cpu()).abs_()
    return scores.numpy().view(np.int32)


def _bits(part):
    return part.cpu().view(torch.int32 if part.itemsize == 4 else torch.int16)


def _removed(bits, columns):
    bits = bits.cpu().numpy()
    return np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(bool)


def _line(matrices):
    return np.concatenate([matrix.reshape(1, -1) for matrix in matrices], axis=1)


def _apart(scores, above):
    """Whether in each row all (score, index) that are ``above`` are above all others."""
    low = np.where(above, _LOWEST, scores).max(axis=1)
    high = np.where(above, scores, _HIGHEST).min(axis=1)
    if (low > high).any():
        return False
    for row in np.flatnonzero(low == high):
        sides = above[row][scores[row] == low[row]]
        if (sides[:-1] & ~sides[1:]).any():  # of equal scores the later ones are above
            return False
    return True


def _cut_at(scores, removed, threshold, largest):
    """Whether rows of a whole that was cut at ``threshold`` are on their sides of it."""
    if np.isnan(threshold):
        return not removed.any()
    edge = _as_integer(threshold)
    above = removed if largest else ~removed
    ties = above[scores == edge]
    inside, outside = above[scores > edge].all(), not above[scores < edge].any()
    return bool(inside and outside and not (ties[:-1] & ~ties[1:]).any())


def _cut_at_but_preserved(scores, preserve_scores, removed, threshold, largest):
    """:func:`_cut_at` where some are preserved, those above all removed ones by their scores."""
    if np.isnan(threshold):
        return not removed.any()
    edge = _as_integer(threshold)
    inside, outside = (scores > edge, scores < edge)[:: 1 if largest else -1]
    either = inside | removed
    if removed[outside].any():
        return False
    return not either.any() or _apart(preserve_scores[either][None], ~removed[either][None])


def _as_integer(score):
    return np.array([score], dtype=np.float32).view(np.int32)[0]


def count_bits(mask: PackedMask) -> int:
    """Bits set of a :class:`PackedMask`; mask.count() takes 20 times as long on a CPU."""
    if mask.bits.device.type != "cpu" or not hasattr(np, "bitwise_count"):
        return mask.count()
    return int(np.bitwise_count(mask.bits.numpy()).sum(dtype=np.int64))
