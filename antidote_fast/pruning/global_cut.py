"""Global scope over weights that do not fit in memory together: one edge, found in two passes.

Scores are fp32 and not negative, so their bits as integers are in their order. The first pass
counts the upper 16 bits of every score; the bin in which the edge lies follows. The second counts
the lower 16 bits within that bin, for each weight, so that it is also known how many of the scores
that equal the edge lie in which weight. A mask then needs nothing but its own weight. The result is
that of :func:`antidote_fast.prune_many_` with ``scope="global"``, bit for bit. What is preserved
for its norms on other data has an edge of its own, found in the same two passes.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from antidote_fast.backends.reference import pack_bits
from antidote_fast.config.scores import SCORES, computed_scores
from antidote_fast.errors import DataError, NothingPruned, UsageError
from antidote_fast.masks import PackedMask
from antidote_fast.models.targets import check_names, natural_key
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.scores import score_module
from antidote_fast.selection import Selection, num_pruned
from antidote_fast.system.progress import track

_BINS = 1 << 16
_INFINITY = 0x7F800000
_NAN = _INFINITY + 1  # every NaN counts as one score above infinity
_CHUNK = 1 << 18  # scores at a time: 1 MB of fp32 stays in a core's cache


@dataclass(frozen=True)
class GlobalCut:
    """The edge of a global selection, and what of it lies in each weight.

    Args:
        edge: the score at the edge as an integer; None where nothing is selected.
        largest, seed, evidence: as :func:`find_cut` was given.
        ties: {key: (first, last)}: of the weight's scores that equal the edge, in flat order, those
            that are selected.
        counts: {key: weights selected of it}, those that ``preserve`` keeps among them.
        delta: the score is of the difference from a base.
        preserve: the cut that says what is preserved of what this one selects, or None.
    """

    edge: int | None
    largest: bool
    seed: int
    ties: dict[str, tuple[int, int]] = field(repr=False)
    counts: dict[str, int] = field(repr=False)
    evidence: Evidence = field(repr=False)
    delta: bool = False
    preserve: "GlobalCut | None" = None

    @property
    def threshold(self) -> float:
        """The smallest score selected (``largest=False``: the largest); NaN where nothing is."""
        if self.edge is None or self.edge == _NAN:
            return math.nan
        return float(np.array([self.edge], dtype=np.int32).view(np.float32)[0])

    def mask(self, key: str, weight: torch.Tensor, base: torch.Tensor | None = None) -> PackedMask:
        """What is removed of one weight.

        Args:
            weight, base: (out, in), as ``read(key)`` and ``read_base(key)`` gave them to
                :func:`find_cut`; left as they are.

        Raises:
            DataError: its scores are not those that were counted; it has changed since.
        """
        rows, columns = weight.shape
        packed, removed, seen = [], 0, 0
        first, last = self.ties[key]
        base = base if self.delta else None
        edge = self.edge
        if edge is None:  # no score is beyond this one
            edge = _NAN if self.largest else 0
        for scores in _chunks(key, weight, self.evidence, self.seed, base):
            chosen = scores > edge if self.largest else scores < edge
            # Most weights have no score at the edge removed, and then none is looked for.
            if first < last:
                equal = (scores == edge).view(-1).nonzero().view(-1)
                chosen.view(-1)[equal[max(0, first - seen) : max(0, last - seen)]] = True
                seen += len(equal)
            removed += int(chosen.count_nonzero())
            packed.append(_pack(chosen))
        if removed != self.counts[key]:
            raise DataError(f"{key}: has changed since its scores were counted; start again")
        bits = (
            torch.cat(packed) if packed else pack_bits(torch.empty_like(weight, dtype=torch.bool))
        )
        mask = PackedMask(bits, (rows, columns))
        return mask if self.preserve is None else mask - self.preserve.mask(key, weight, base)

    def to_dict(self) -> dict:
        """JSON values, all but the evidence; :meth:`from_dict` takes them back."""
        values = {name: value for name, value in vars(self).items() if name != "evidence"}
        values["preserve"] = self.preserve and self.preserve.to_dict()
        return {**values, "ties": {key: list(pair) for key, pair in self.ties.items()}}

    @classmethod
    def from_dict(cls, values: dict, evidence: Evidence) -> "GlobalCut":
        """The cut that :meth:`to_dict` described, with the evidence that it was found by."""
        ties = {key: tuple(pair) for key, pair in values["ties"].items()}
        preserve = values.get("preserve")
        preserve = preserve and cls.from_dict(preserve, Evidence(evidence.preserve_norms))
        return cls(**{**values, "ties": ties, "preserve": preserve}, evidence=evidence)


def find_cut(
    keys: Collection[str],
    read: Callable[[str], torch.Tensor],
    evidence: Evidence | ActivationNorms | None,
    selection: Selection,
    *,
    seed: int = 0,
    read_base: Callable[[str], torch.Tensor] | None = None,
    progress: bool = False,
) -> GlobalCut:
    """Where a global selection over many weights has its edge, one of them in memory at a time.

    Every weight is read twice. Beside the weight that is being read this takes a few MB, and for
    each weight at most 6 bytes for each of its scores that are near the edge, 393 kB at most.

    Args:
        keys: names of the weights, in any order; without those that are skipped.
        read: called with a name, gives the (out, in) tensor, bf16, fp16 or fp32.
        evidence, seed: as :func:`antidote_fast.pruning.prune.prune_state_` takes them; the norms
            hold these names.
        selection: one of global scope.
        read_base: called with a name, gives the base of the weight, a tensor like it; needed, and
            called, with ``selection.score_delta`` alone.

    Raises:
        UsageError: another scope, an unknown score, no norms where the score needs them, a
            selection that needs preserve norms or a base that are not given.
        NothingPruned: no keys.
        DataError: a weight that is no longer what it was at the first pass; the name of a tensor
            that a weight is computed from.
    """
    if not isinstance(selection, Selection) or selection.scope != "global":
        raise UsageError(f"selection={selection!r:.80}: must be a Selection of scope='global'")
    evidence = Evidence.of(evidence)
    if evidence.score not in computed_scores() and evidence.score in SCORES:
        accepted = ", ".join(computed_scores())
        raise UsageError(f"score={evidence.score!r}: must be one of {accepted} a weight at a time")
    evidence.check(selection, seed, with_base=read_base is not None)
    if not keys:
        raise NothingPruned("nothing to prune: no weights")
    check_names(keys)
    order = sorted(keys, key=natural_key)
    searches = [_Search(order, selection, evidence, seed)]
    if evidence.preserve_norms is not None:
        preserve = Evidence(evidence.preserve_norms)
        searches.append(_Search(order, selection.preserve, preserve, seed))
    for name, step in (("count scores", _Search.count), ("find the edge", _Search.look)):
        left = [search for search in searches if not search.is_over]
        for key in track(order, name, progress) if left else ():
            weight = read(key)
            base = read_base(key) if selection.score_delta else None
            for search in left:
                step(search, key, weight, base)
            del weight, base  # before the next ones are read
        for search in left:
            search.narrow()
    cut, *preserved = [search.cut() for search in searches]
    return replace(cut, preserve=preserved[0]) if preserved else cut


class _Search:
    """One edge, in two passes over the weights: ``count`` each, ``narrow``, ``look`` at each."""

    def __init__(self, order, selection, evidence, seed):
        self._order, self._selection = order, selection
        self._options = evidence, seed
        self._upper, self._sizes = torch.zeros(_BINS // 2, dtype=torch.int64, device="cpu"), {}
        self._place = self._left = self._edge = None
        self._beyond, self._near = {}, {}
        self.is_over = False

    def count(self, key, weight, base):
        """The upper 16 bits of every score."""
        self._sizes[key] = weight.numel()
        for scores in _chunks(key, weight, *self._options, base):
            counts = torch.bincount((scores >> 16).view(-1), minlength=len(self._upper))
            self._upper += counts.cpu()

    def look(self, key, weight, base):
        """The lower 16 bits of those in the bin of the edge."""
        if weight.numel() != self._sizes[key]:
            raise DataError(f"{key}: has changed since its scores were counted; start again")
        scores = _chunks(key, weight, *self._options, base)
        self._beyond[key], self._near[key] = _near(scores, self._place, self._selection.largest)

    def narrow(self):
        """What follows from a pass: the bin of the edge, then the edge."""
        largest = self._selection.largest
        if self._place is None:
            wanted = num_pruned(sum(self._sizes.values()), self._selection)
            self.is_over = wanted == 0
            if wanted:
                self._place, self._left = _edge(self._upper.numpy(), wanted, largest)
            return
        lower = np.zeros(_BINS, dtype=np.int64)
        for values, counts in self._near.values():
            lower[values] += counts
        if lower.sum() != self._upper[self._place]:
            raise DataError("the weights have changed since their scores were counted; start again")
        self._edge, self._left = _edge(lower, self._left, largest)

    def cut(self):
        """The cut without what is preserved of it."""
        order, selection = self._order, self._selection
        edge, ties, counts = None, dict.fromkeys(order, (0, 0)), dict.fromkeys(order, 0)
        if self._edge is not None:
            edge = self._place << 16 | self._edge
            near = [self._near[key] for key in order]
            firsts, lasts, beyond = _share_ties(near, self._edge, self._left, selection.largest)
            ties = dict(zip(order, zip(firsts.tolist(), lasts.tolist(), strict=True), strict=True))
            within = dict(zip(order, (beyond + lasts - firsts).tolist(), strict=True))
            counts = {key: self._beyond[key] + within[key] for key in order}
        evidence, seed = self._options
        return GlobalCut(
            edge, selection.largest, seed, ties, counts, evidence, selection.score_delta
        )


def _chunks(key, weight, evidence, seed, base=None):
    """The scores of some rows after another, as int32 in the order of the scores, NaN one value."""
    rows, columns = weight.shape
    if not weight.numel():
        return
    module = score_module(evidence.score)
    if SCORES[evidence.score].own_matrix:
        score_rows = module.row_scores(key, weight, evidence, seed)
    else:
        norm = evidence.norms and evidence.norms.act_norm(key, "global").to(weight.device)
        norm = module.channel_norm(norm)

        def score_rows(start, stop):
            scores = weight[start:stop].detach().to(torch.float32, copy=True)
            if base is not None:
                scores.sub_(base[start:stop])
            return (scores if norm is None else scores.mul_(norm)).abs_()

    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        scores = score_rows(start, min(start + step, rows)).to(weight.device)
        yield scores.view(torch.int32).clamp_(max=_NAN)


def _near(chunks, place, largest):
    """(scores beyond the bin ``place``, (lower 16 bits, counts) of those within it)."""
    beyond, counts = 0, np.zeros(_BINS, dtype=np.uint32)
    for scores in chunks:
        flat = scores.view(-1)
        if flat.device.type == "cpu":  # twice as fast as torch: 1.0 ns a score, not 2.0
            flat = flat.numpy()
            low = np.bincount(flat[flat >> 16 == place] & 0xFFFF, minlength=_BINS)
            outside = flat >= (place + 1) << 16 if largest else flat < place << 16
            beyond += int(np.count_nonzero(outside))
        else:
            low = torch.bincount(flat[flat >> 16 == place] & 0xFFFF, minlength=_BINS).cpu().numpy()
            outside = flat >> 16 > place if largest else flat >> 16 < place
            beyond += int(outside.count_nonzero())
        counts += low.astype(np.uint32)
    values = np.flatnonzero(counts)
    return beyond, (values.astype(np.uint16), counts[values])


def _edge(counts, wanted, largest):
    """(the bin of the ``wanted``-th score from the end that is removed, how many of it are)."""
    ordered = counts[::-1] if largest else counts
    reached = np.cumsum(ordered)
    place = int(np.searchsorted(reached, wanted))
    left = wanted - (int(reached[place - 1]) if place else 0)
    return len(counts) - 1 - place if largest else place, left


def _share_ties(near, low, left, largest):
    """For each weight: its first tie that is removed, the one after its last; scores beyond ties.

    By position: the smallest selection takes the first of them all, the largest the last.
    """
    equal = np.array([counts[values == low].sum(dtype=np.int64) for values, counts in near])
    beyond = [
        counts[values > low if largest else values < low].sum(dtype=np.int64)
        for values, counts in near
    ]
    before = np.cumsum(equal) - equal
    start = equal.sum() - left if largest else 0
    firsts, lasts = (np.clip(at - before, 0, equal) for at in (start, start + left))
    return firsts, lasts, np.array(beyond)


def _pack(chosen):
    if chosen.device.type != "cpu":
        return pack_bits(chosen)
    return torch.from_numpy(np.packbits(chosen.numpy(), axis=1, bitorder="little"))
