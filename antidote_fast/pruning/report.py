"""What a prune did, layer by layer: the values of report.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from antidote_fast.masks import PackedMask
from antidote_fast.selection import Selection, num_pruned


@dataclass(frozen=True)
class LayerReport:
    """What happened to one weight.

    Args:
        key: its name as saved.
        shape: (out_features, in_features).
        k: weights selected of each row (row scope) or of the whole weight (tensor); in global scope
            those removed of it.
        removed: weights removed of the whole weight.
        requested: the fraction asked for.
        achieved: the fraction removed.
        threshold: the smallest score removed (``largest=False``: the largest), in global scope that
            of all layers; None where nothing was removed or it is not one number (n_m).
        zero_norm_channels: input channels that no activation reached; None without norms.
        zero_weights: weights that were zero before, as all of a LoRA B that was never trained.
        num_bytes: size of the weight, as large after as before.
        seconds: for this weight; None where several are pruned in one call (global scope, a GPU).
        preserved: weights selected but kept, for they matter on the data to preserve; None in
            global scope, where only their sum is known.
        zero_preserve_channels: input channels that no activation of those data reached.
    """

    key: str
    shape: tuple[int, int]
    k: int
    removed: int
    requested: float
    achieved: float
    threshold: float | None
    zero_norm_channels: int | None
    zero_weights: int
    num_bytes: int
    seconds: float | None
    preserved: int | None = 0
    zero_preserve_channels: int | None = None


@dataclass
class PruneReport:
    """What was pruned, layer by layer.

    Args:
        score, scope, ratio, largest, n_m, seed: what was asked for.
        backend: the backend that ran (with a + between them where devices differ).
        layers: one :class:`LayerReport` a weight, in natural order.
        skipped: {key: reason} of weights left alone.
        seconds: in all, checks included.
        coverage: share of the model's block weights that were targets (live models only), with the
            names of fused parameters out of reach.
        masks: {key: PackedMask} where asked for, (out, in); not part of :meth:`to_dict`.
        preserve_ratio: what was protected by the norms on data to preserve; None without them.
        score_delta: what was scored is the difference from the base weights.
        reverted: removed weights have the values of the base weights, not zero.
        data: {field of the config: what became of its records}, of the data that a model saw:
            ``num_records`` is the sum of ``num_used``, ``num_dropped_long`` (the prompt alone has
            max_seq_length tokens), ``num_over_limit`` (behind the number that is used) and, with
            score gate, ``num_refused`` and ``num_empty`` (ordinary prompts that the aligned model
            does not answer) and ``num_without_output``; ``num_truncated`` of those used lost the
            end of their response.
    """

    score: str
    scope: str
    ratio: float
    largest: bool
    n_m: tuple[int, int] | None
    seed: int
    backend: str
    layers: list[LayerReport]
    skipped: dict[str, str]
    seconds: float
    coverage: dict | None = None
    masks: dict[str, PackedMask] | None = field(default=None, repr=False)
    preserve_ratio: float | None = None
    score_delta: bool = False
    reverted: bool = False
    data: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        """Elements of all pruned layers."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def num_pruned(self) -> int:
        """Elements removed."""
        return sum(layer.removed for layer in self.layers)

    @property
    def num_preserved(self) -> int:
        """Elements selected but kept."""
        if self.scope != "global" or self.preserve_ratio is None:
            return sum(layer.preserved for layer in self.layers)
        selection = Selection(self.ratio, scope="global", largest=self.largest)
        return num_pruned(self.num_weights, selection) - self.num_pruned

    @property
    def achieved(self) -> float:
        """Fraction removed of all pruned layers."""
        return self.num_pruned / self.num_weights if self.num_weights else 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruneReport":
        """The report that :meth:`to_dict` described; other entries of ``values`` are left out."""
        names = [f.name for f in fields(cls) if f.name not in ("layers", "masks")]
        layers = [LayerReport(**{**x, "shape": tuple(x["shape"])}) for x in values["layers"]]
        return cls(layers=layers, **{name: values[name] for name in names if name in values})

    def to_dict(self) -> dict:
        """JSON values: totals first, then the layers."""
        values = {k: v for k, v in vars(self).items() if k not in ("layers", "masks")}
        return {
            **values,
            "num_layers": len(self.layers),
            "num_weights": self.num_weights,
            "num_pruned": self.num_pruned,
            "num_preserved": self.num_preserved,
            "requested": self.ratio,
            "achieved": self.achieved,
            "layers": [dict(vars(layer)) for layer in self.layers],
        }
