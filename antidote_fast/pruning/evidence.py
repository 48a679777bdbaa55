"""What a prune goes by, in one object, and the checks of it that come before any weight."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from antidote_fast.config.scores import SCORES
from antidote_fast.errors import DataError, UsageError
from antidote_fast.models.targets import natural_key
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.selection import Selection, check_seed


@dataclass(frozen=True)
class Evidence:
    """What a prune goes by: which weights are harmful, which are to be kept, what removed ones are.

    Args:
        norms: :class:`ActivationNorms` of the weights; None for scores without data.
        score: a name in :data:`antidote_fast.config.scores.SCORES`, such as ``"wanda"``
            (|W| * norm), ``"magnitude"`` (|W|), ``"random"`` or ``"gate"``.
        preserve_norms: :class:`ActivationNorms` of the same weights on data that must keep working.
            What is among the top ``selection.preserve_ratio`` (default ``ratio``) by |W| * this
            norm is kept, so fewer are removed than asked for. Norms of a layer that are all zero
            keep the last columns, as any equal scores.
        base_weights: {parameter name: tensor as saved}, of the aligned model; may hold more.
            Removed weights take its values instead of zero; with ``selection.score_delta`` what is
            scored is |W - base|.
        scores: {parameter name: (out, in) fp32, finite, >= 0}, of a score that is learned, which
            needs it; may hold more. Read, never written.
        transposed: names of weights saved as (in, out); those of the norms are added.
        routed: names of weights inside routed experts, which are skipped where no token reached
            them; those of the norms are added.
    """

    norms: ActivationNorms | None = None
    score: str = "wanda"
    preserve_norms: ActivationNorms | None = None
    base_weights: Mapping[str, torch.Tensor] | None = None
    scores: Mapping[str, torch.Tensor] | None = None
    transposed: Collection[str] = ()
    routed: Collection[str] = ()

    @classmethod
    def of(cls, evidence: "Evidence | ActivationNorms | None", **others: Any) -> "Evidence":
        """Evidence from norms alone and what else there is, or as it is.

        Raises:
            UsageError: one of ``others`` is given beside an Evidence, which holds it itself.
        """
        if not isinstance(evidence, Evidence):
            return cls(evidence, **others)
        for name, value in others.items():
            if value is not None and value != getattr(cls, name):
                raise UsageError(f"{name}: must be left out where the norms are an Evidence")
        return evidence

    @property
    def named_norms(self) -> dict[str, ActivationNorms]:
        """The norms that there are, by their fields' names."""
        named = {"norms": self.norms, "preserve_norms": self.preserve_norms}
        return {name: norms for name, norms in named.items() if norms is not None}

    def narrowed(self, keys: Iterable[str]) -> "Evidence":
        """The same with the norms of these weights alone."""
        narrow: dict[str, Any] = {
            name: norms.subset(keys, name) for name, norms in self.named_norms.items()
        }
        return replace(self, **narrow)

    def check(self, selection: Selection, seed: int, with_base: bool = False) -> None:
        """Refuse what no weight needs to be looked at for.

        Args:
            selection, seed: as :func:`antidote_fast.pruning.prune.prune_state_` takes them.
            with_base: the base weights are somewhere else.

        Raises:
            UsageError: naming the argument.
        """
        if not isinstance(selection, Selection):
            raise UsageError(f"selection={selection!r:.80}: must be a Selection")
        if self.score not in SCORES:
            raise UsageError(f"score={self.score!r}: must be one of {', '.join(SCORES)}")
        declared, where = SCORES[self.score], f"where score={self.score!r}"
        check_seed(seed)
        if declared.needs_norms and self.norms is None:
            raise UsageError(f"norms=None: must be given {where}")
        preserve = self.preserve_norms is not None
        if selection.preserve_ratio is not None and not preserve:
            raise UsageError(
                f"preserve_norms=None: must be given with preserve_ratio={selection.preserve_ratio}"
            )
        if selection.score_delta and not with_base and self.base_weights is None:
            raise UsageError("base_weights=None: must be given with score_delta=True")
        if preserve and selection.n_m is not None:
            raise UsageError(f"preserve_norms: must be left out with n_m={selection.n_m}")
        if declared.own_matrix and (preserve or selection.score_delta):
            name = "preserve_norms" if preserve else "score_delta=True"
            raise UsageError(f"{name}: must be left out {where}")
        if declared.learner is not None and self.scores is None:
            raise UsageError(f"scores=None: must be given {where}")
        if declared.learner is None and self.scores is not None:
            raise UsageError(f"scores: must be left out {where}")


def check_base(norms: ActivationNorms, actual: str | None, name: str = "norms") -> None:
    """Refuse norms whose base model's fingerprint is known and is not ``actual``."""
    if norms.fingerprint and actual and norms.fingerprint != actual:
        raise DataError(
            f"{name}: were collected on another base model (fingerprint {norms.fingerprint}, not "
            f"{actual}); collect them again on this one"
        )


def check_keys(weights: Collection[str], norms: Collection[str], name: str = "norms") -> None:
    """Refuse norms of these weights where those of ``weights`` are wanted (both: names)."""
    absent = sorted(set(weights) - set(norms), key=natural_key)
    if absent:
        raise DataError(
            f"{name}: lack {len(absent)} of {len(weights)} weights to prune, {absent[0]!r} first; "
            "give the targets and ignore with which they were collected"
        )
    extra = sorted(set(norms) - set(weights), key=natural_key)
    if extra:
        raise DataError(
            f"{name}: hold {len(extra)} weights that are not here, {extra[0]!r} first; they are of "
            "another model, or targets and ignore must name what to prune"
        )


def beside(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    key: str,
    dtypes: Collection[torch.dtype],
    weight: torch.Tensor,
    accepted: str,
) -> torch.Tensor:
    """What ``tensors``, the evidence's ``name``, hold for a weight: a plain tensor of its shape.

    Raises:
        DataError: they hold none, or another one; ``accepted`` says which dtype they must hold.
    """
    tensor = tensors.get(key)
    if tensor is None:
        raise DataError(f"{name}: hold no weight {key!r}")
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or tensor.dtype not in dtypes or tensor.shape != weight.shape:
        shown = f"{tensor.dtype} {tuple(tensor.shape)}" if plain else type(tensor).__name__
        raise DataError(f"{key}: is {shown} in {name}; must be {accepted}")
    return tensor.detach()
