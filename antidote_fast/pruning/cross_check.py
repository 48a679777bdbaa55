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
from torch import Tensor

from antidote_fast import backends, ops
from antidote_fast.backends import reference
from antidote_fast.errors import AntidoteError
from antidote_fast.masks import PackedMask
from antidote_fast.models.targets import Target
from antidote_fast.selection import Selection, num_pruned

MAX_ROWS = 4
_UNWRITTEN = "; nothing was written"
_WRITTEN = "; the weights in memory are not to be used"
_LOWEST, _HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


@dataclass
class _Sample:
    """Some rows of one weight as they were: ``keys`` are their scores as ordered integers.

    ``kept_keys`` are those by the preserve norm, ``base_bits`` what removed weights become, and
    ``base`` goes with ``scored``: None where that is a random score.
    """

    place: int
    name: str
    rows: Tensor
    keys: np.ndarray
    bits: Tensor
    scored: Tensor
    norm: Tensor | None
    kept_keys: np.ndarray | None = None
    preserve_norm: Tensor | None = None
    base_bits: Tensor | int = 0
    base: Tensor | None = None
    removed: np.ndarray | None = None  # of the copy
    weight: Tensor | None = None  # the whole
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
        self._seen: set[tuple[Any, ...]] = set()

    def before(
        self,
        names: Sequence[str],
        scored: Sequence[Tensor],
        norms: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        preserve_norms: Sequence[Tensor | None] | None = None,
        bases: Sequence[Tensor | None] | None = None,
    ) -> list:
        """Copy rows of the weights of one call, and prune the copies.

        Args:
            names: of the weights, for messages.
            scored: the matrices that are selected from: the weights, or their random scores.
            norms: activation norms, or None each.
            weights: the matrices that will be written.
            preserve_norms, bases: as :func:`antidote_fast.ops.prune_many_`; lists, or None.

        Returns:
            What :meth:`selected` and :meth:`written` take.

        Raises:
            AntidoteError: the backend selects otherwise than the reference; nothing is written.
        """
        samples = []
        preserve_norms = preserve_norms or [None] * len(names)
        bases = bases or [None] * len(names)
        for place, (name, matrix) in enumerate(zip(names, scored, strict=True)):
            kind = tuple(matrix.shape), weights[place].dtype, matrix.device
            module = backends.select(self.backend, matrix.device.type)
            if kind in self._seen or module is reference or not matrix.numel():
                continue
            self._seen.add(kind)
            rows = _some_rows(matrix)
            part = matrix.detach()[rows]
            kept, base = preserve_norms[place], bases[place]
            base = None if base is None else base.detach()[rows]
            scored_base = base if matrix is weights[place] else None
            delta = scored_base if self.selection.score_delta else None
            samples.append(
                _Sample(
                    place,
                    name,
                    rows,
                    _keys(part, norms[place], delta),
                    _bits(weights[place].detach()[rows]),
                    part,
                    norms[place],
                    None if kept is None else _keys(part, kept, delta),
                    kept,
                    0 if base is None else _bits(base),
                    scored_base,
                )
            )
        if samples:
            self._prune_copies(samples)
        return samples

    def selected(
        self,
        samples: Sequence[_Sample],
        weights: Sequence[Tensor],
        masks: Sequence[PackedMask],
        thresholds: Sequence[float],
    ) -> None:
        """Look at what the call chose of the copied rows.

        Args:
            samples: of :meth:`before`.
            weights, masks, thresholds: of the whole call; the weights as they were.

        Raises:
            AntidoteError: naming the weight and the backend; nothing is written.
        """
        for sample in samples:
            mask, sample.weight = masks[sample.place], weights[sample.place]
            removed = sample.chosen = _removed(mask.bits[sample.rows], mask.shape[1])
            if self.selection.n_m is None and self.selection.scope != "row":
                edge, largest = thresholds[sample.place], self.selection.largest
                if sample.kept_keys is None:
                    ok = _beyond(sample.keys, removed, edge, largest)
                else:
                    ok = _beyond_and_below(sample.keys, sample.kept_keys, removed, edge, largest)
                if self.selection.scope == "tensor":
                    ok &= self._counted([mask], sample.kept_keys is not None)
            else:  # a row's selection is its own
                ok = np.array_equal(removed, sample.removed)
            unchanged = torch.equal(_bits(sample.weight.detach()[sample.rows]), sample.bits)
            if not (ok and unchanged):
                self._refuse(sample, _WRITTEN if not unchanged else _UNWRITTEN)
        compared = samples[:1] if self.selection.scope == "global" else ()
        for sample in compared:
            if not self._counted(masks, sample.kept_keys is not None):
                self._refuse(sample, _UNWRITTEN)

    def written(self, samples: Sequence[_Sample]) -> None:
        """Look at the copied rows again, now that the masks were applied.

        Raises:
            AntidoteError: naming the weight and the backend.
        """
        for sample in samples:
            now = _bits(sample.weight.detach()[sample.rows])
            chosen = torch.from_numpy(sample.chosen)
            if not torch.equal(now, torch.where(chosen, sample.base_bits, sample.bits)):
                self._refuse(sample, _WRITTEN)

    def _counted(self, masks, preserving):
        """Whether as many are removed of weights that are compared as the selection means."""
        total = sum(mask.shape[0] * mask.shape[1] for mask in masks)
        count, selected = sum(map(count_bits, masks)), num_pruned(total, self.selection)
        kept = num_pruned(total, self.selection.preserve) if preserving else 0
        return selected - kept <= count <= selected

    def _prune_copies(self, samples):
        copies = [sample.scored.clone() for sample in samples]
        masks, _ = ops.prune_with_report_(
            copies,
            [sample.norm for sample in samples],
            self.selection,
            preserve_norms=[sample.preserve_norm for sample in samples],
            base_weights=[sample.base for sample in samples],
            write=False,
            backend=self.backend,
        )
        for copy, mask, sample in zip(copies, masks, samples, strict=True):
            ops.apply_mask_(copy, mask, base_weight=sample.base, backend=self.backend)
        removed = [_removed(mask.bits, mask.shape[1]) for mask in masks]
        scope = self.selection.scope
        if any(sample.kept_keys is not None for sample in samples):
            differences = self._differences(samples)
            oks = [np.array_equal(r, d) for r, d in zip(removed, differences, strict=True)]
        elif scope == "global":
            ok = self._right(_line([s.keys for s in samples]), _line(removed))
            oks = [ok] * len(samples)
        elif scope == "tensor":
            oks = [
                self._right(_line([s.keys]), _line([r]))
                for s, r in zip(samples, removed, strict=True)
            ]
        else:
            oks = [self._right(s.keys, r) for s, r in zip(samples, removed, strict=True)]
        for sample, copy, chosen, ok in zip(samples, copies, removed, oks, strict=True):
            base = 0 if sample.base is None else sample.base_bits
            expected = torch.where(torch.from_numpy(chosen), base, _bits(sample.scored))
            if not ok or not torch.equal(_bits(copy), expected):
                self._refuse(sample, _UNWRITTEN)
            sample.removed = chosen

    def _differences(self, samples):
        """What is selected of the copied rows less what is protected, by the stable sort."""
        keys = [torch.from_numpy(sample.keys) for sample in samples]
        kept = [torch.from_numpy(sample.kept_keys) for sample in samples]
        selected = reference._selected(keys, self.selection)
        kept = reference._selected(kept, self.selection.preserve)
        return [(one & ~other).numpy() for one, other in zip(selected, kept, strict=True)]

    def _right(self, keys, removed):
        """Whether each row of ``removed`` is what the selection means of the row of ``keys``."""
        if self.selection.n_m is not None:
            scores = torch.from_numpy(keys)
            return np.array_equal(reference._selected([scores], self.selection)[0].numpy(), removed)
        columns = keys.shape[1]
        count = num_pruned(columns, self.selection)
        if (removed.sum(axis=1) != count).any():
            return False
        above = removed if self.selection.largest else ~removed
        return count in (0, columns) or _apart(keys, above)

    def _refuse(self, sample, consequence):
        module = backends.select(self.backend, sample.scored.device.type)
        raise AntidoteError(
            f"{sample.name}: the {module.NAME} backend does not select what the reference does"
            f"{consequence}; choose another backend, and report this"
        )


def check_live(targets: Sequence[Target], weights: Mapping[str, Tensor]) -> None:
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


def _keys(part, norm, base=None):
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


def _apart(keys, above):
    """Whether in each row all (key, index) that are ``above`` are above all others."""
    low = np.where(above, _LOWEST, keys).max(axis=1)
    high = np.where(above, keys, _HIGHEST).min(axis=1)
    if (low > high).any():
        return False
    for row in np.flatnonzero(low == high):
        sides = above[row][keys[row] == low[row]]
        if (sides[:-1] & ~sides[1:]).any():  # of equal scores the later ones are above
            return False
    return True


def _beyond(keys, removed, threshold, largest):
    """Whether rows of a whole that was cut at ``threshold`` are on their sides of it."""
    if np.isnan(threshold):
        return not removed.any()
    edge = np.array([threshold], dtype=np.float32).view(np.int32)[0]
    above = removed if largest else ~removed
    ties = above[keys == edge]
    inside = np.array_equal(above[keys > edge], np.ones((keys > edge).sum(), dtype=bool))
    outside = not above[keys < edge].any()
    return bool(inside and outside and not (ties[:-1] & ~ties[1:]).any())


def _beyond_and_below(keys, kept_keys, removed, threshold, largest):
    """:func:`_beyond` where some are kept: those rank above all removed ones by ``kept_keys``."""
    if np.isnan(threshold):
        return not removed.any()
    edge = np.array([threshold], dtype=np.float32).view(np.int32)[0]
    inside, outside = (keys > edge, keys < edge) if largest else (keys < edge, keys > edge)
    either = inside | removed
    if removed[outside].any():
        return False
    return not either.any() or _apart(kept_keys[either][None], ~removed[either][None])


def count_bits(mask: PackedMask) -> int:
    """Bits set of a :class:`PackedMask`; mask.count() takes 20 times as long on a CPU."""
    if mask.bits.device.type != "cpu" or not hasattr(np, "bitwise_count"):
        return mask.count()
    return int(np.bitwise_count(mask.bits.numpy()).sum(dtype=np.int64))
