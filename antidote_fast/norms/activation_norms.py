"""Activation norms say how much each input channel of each target carries on a data set.

One fp32 sum of squares a channel is kept, never the activations: hooks reduce each target's input
during an ordinary forward. Source: Antidote, arXiv 2408.09600, eq. 1; its official code takes the
root of the mean square (``aggregation="rms"``), its text the mean of per-sequence norms
(``"mean"``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from antidote_fast.distributed.fsdp import reshard, run_in_step, runs_in_step
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import AntidoteError, DataError, UsageError, printable, readable
from antidote_fast.files.checkpoint import read_tensor_file
from antidote_fast.files.commit import new_file
from antidote_fast.files.fingerprint import fingerprint_model
from antidote_fast.files.tensor_file import save_tensors
from antidote_fast.models.forwards import make_lean
from antidote_fast.models.targets import find_targets
from antidote_fast.models.tokens import num_embeddings
from antidote_fast.models.undo import eval_mode, no_grad, undoing
from antidote_fast.norms import fusion
from antidote_fast.norms.batches import input_device, on_device, run_batch, run_forward
from antidote_fast.norms.collector import AGGREGATIONS, NormCollector
from antidote_fast.system.progress import Progress, track

FORMAT = "antidote_fast.norms"
VERSION = "1"
_SUMS = ("sq_sum", "norm_sum")


@dataclasses.dataclass(eq=False, repr=False)
class ActivationNorms:
    """The sums of squares that a data set gives, from which any selection can be made later.

    Args:
        sq_sum: {parameter name as saved: (K,) fp32}, the sum over counted tokens of x².
        num_sequences: how many sequences have a counted token.
        num_tokens: how many tokens count.
        norm_sum: {name: (K,) fp32}, the sum over sequences of sqrt(sum over tokens of x²); given
            where the mean of norms was collected.
        response_only: whether only response tokens count.
        fingerprint: the base model's (:mod:`antidote_fast.files.fingerprint`); ``""`` if unknown.
        transposed: the names of weights that are saved as (in, out), as ``Conv1D`` does.
        routed: the names of weights inside routed experts.

    Raises:
        DataError: sums that are not (K,) fp32, finite and at least 0, naming the layer; counts
            below 1.
    """

    sq_sum: dict[str, Tensor]
    _: dataclasses.KW_ONLY
    num_sequences: int
    num_tokens: int
    norm_sum: dict[str, Tensor] | None = None
    response_only: bool = False
    fingerprint: str = ""
    transposed: Set[str] = frozenset()
    routed: Set[str] = frozenset()

    def __post_init__(self) -> None:
        self.sq_sum = dict(self.sq_sum)
        self.norm_sum = None if self.norm_sum is None else dict(self.norm_sum)
        self.num_sequences, self.num_tokens = int(self.num_sequences), int(self.num_tokens)
        self.response_only = bool(self.response_only)
        self.transposed, self.routed = frozenset(self.transposed), frozenset(self.routed)
        self._check()

    @property
    def aggregation(self) -> str:
        """How the sums become norms: ``"rms"`` or ``"mean"``."""
        return "rms" if self.norm_sum is None else "mean"

    @property
    def keys(self) -> list[str]:
        """The names of the weights, in the order in which they were collected."""
        return list(self.sq_sum)

    def __repr__(self) -> str:
        return (
            f"ActivationNorms({len(self.sq_sum)} weights, {self.num_sequences} sequences, "
            f"{self.num_tokens} tokens, {self.aggregation})"
        )

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        *,
        targets: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] = (),
        response_only: bool = False,
        aggregation: str = "rms",
        progress: Progress = False,
        fingerprint: str | None = None,
        backend: str | None = None,
        fuse: bool = False,
        world: World = ALONE,
    ) -> ActivationNorms:
        """Run a model over batches and keep the norms of its targets' inputs.

        The model runs in eval mode, without gradients and caches; each module's mode is restored
        and the hooks are gone afterwards, whatever is raised and wherever. One call at a time may
        run on a model, and other threads must not change its mode meanwhile. A batch that does not
        fit in the memory of a GPU is split in half and tried again.

        Args:
            model: a transformers model, or a PEFT model.
            batches: dicts of tensors: ``input_ids`` (B, T), ``attention_mask`` (B, T; without it
                every token counts) and, for ``response_only``, ``labels`` (B, T), -100 where a
                token is not of the response. What else is in them is passed to the model.
            targets, ignore: as :func:`antidote_fast.models.targets.find_targets`.
            response_only: counts only tokens whose label (unshifted) is not -100.
            aggregation: ``"rms"`` or ``"mean"``.
            progress: as :func:`antidote_fast.system.progress.track` takes it.
            fingerprint: of the base model; computed where not given.
            backend: as in :mod:`antidote_fast.ops`.
            fuse: sum squares inside RMSNorm and SwiGLU, where a Llama-like model has them in front
                of targets (:mod:`antidote_fast.norms.fusion`); the norms then differ by the
                activations' rounding. Off until it has been measured on a GPU. Where nothing can be
                fused, a warning says so.
            world: the ranks (:func:`antidote_fast.distributed.world`) that calibrate together, each
                on batches of its own (``world.shard(batches)``; none at all is fine); their sums
                are added up at the end, and all get the same norms. By default it is this process
                alone, whatever process group exists. A model that FSDP2 shards needs it; its ranks
                run as many forwards as the one with the most batches.

        Raises:
            UsageError: unknown aggregation, ``response_only`` without labels, ``fuse`` with
                ``aggregation="mean"``, or a model on which norms are being collected already.
            BackendUnavailable: ``fuse`` where Triton kernels cannot run on the model's device.
            DataError: no batch, or no counted token in any; a token id that the model has no
                embedding for; a layer whose inputs hold NaN or infinity; a layer that got another
                number of tokens than the batch has.
            NothingPruned: no target matched.
            PeerFailed: another rank of ``world`` failed.
        """
        with world.together():
            reshard(model)
            chosen = find_targets(model, targets, ignore)
            device = input_device(model)
            in_step = runs_in_step(model, chosen, world)
            if fuse:
                fusion.check_fuse(device.type, aggregation)
        if fingerprint is None:
            fingerprint = fingerprint_model(model)
        with undoing() as undo:
            no_grad(undo)
            collector = NormCollector(
                chosen, aggregation=aggregation, response_only=response_only, backend=backend
            )
            undo.later(collector.close)
            collector.open()
            if collector.others_on(model):
                raise UsageError(
                    "model: norms are being collected on it already; wait for that, or use a copy "
                    "of the model"
                )
            eval_mode(model, undo)
            if fuse:
                fusion.fuse(model, collector, undo)
            options = make_lean(model, undo, chosen)
            numbered = enumerate(track(batches, "calibrate", progress))
            known = num_embeddings(model)
            placed = (on_device(batch, device, known, number) for number, batch in numbered)
            if in_step:
                forward = functools.partial(run_forward, model, options)
                run_in_step(placed, collector, forward, world, device)
                reshard(model)
            else:
                with world.together():
                    for batch in placed:
                        run_batch(model, collector, batch, options)
            return cls.of(collector, fingerprint=fingerprint, world=world)

    @classmethod
    def of(
        cls, collector: NormCollector, *, fingerprint: str = "", world: World = ALONE
    ) -> ActivationNorms:
        """Return the norms that a :class:`NormCollector` summed.

        The arguments and errors are those of :meth:`NormCollector.sums`.
        """
        return cls(**collector.sums(fingerprint=fingerprint, world=world), fingerprint=fingerprint)

    def act_norm(self, key: str, scope: str = "row") -> Tensor:
        """Return the norm of each input channel of one weight, (K,) fp32.

        It is ``sqrt(sq_sum)`` for row and tensor scope (a common factor does not matter within one
        weight), and ``sqrt(sq_sum / num_tokens)`` for global scope. With ``aggregation="mean"`` it
        is ``norm_sum / num_sequences`` for all.

        Raises:
            DataError: the norms hold no weight of this name.
        """
        if key not in self.sq_sum:
            raise DataError(f"norms: hold no weight {key!r}")
        if self.norm_sum is not None:
            return self.norm_sum[key] / self.num_sequences
        total = self.sq_sum[key]
        return torch.sqrt(total / self.num_tokens if scope == "global" else total)

    def merge(self, other: ActivationNorms) -> ActivationNorms:
        """Return the norms of both data sets together, as if one run had collected them.

        Raises:
            DataError: they are of other weights or base models, or were collected otherwise.
        """
        for name in ("aggregation", "response_only", "fingerprint", "transposed", "routed"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise DataError(f"norms cannot be merged: {name} is {mine!r} and {theirs!r}")
        if set(self.sq_sum) != set(other.sq_sum):
            only = sorted(set(self.sq_sum) ^ set(other.sq_sum))
            raise DataError(f"norms cannot be merged: only one of them has {only[0]!r}")
        for key, value in self.sq_sum.items():
            if value.shape != other.sq_sum[key].shape:
                raise DataError(f"norms cannot be merged: {key} differs in length")
        return dataclasses.replace(
            self,
            sq_sum=_added(self.sq_sum, other.sq_sum),
            norm_sum=self.norm_sum and _added(self.norm_sum, other.norm_sum or {}),
            num_sequences=self.num_sequences + other.num_sequences,
            num_tokens=self.num_tokens + other.num_tokens,
        )

    def subset(self, keys: Iterable[str], name: str = "norms") -> ActivationNorms:
        """Return the norms of these weights alone; a refusal calls the norms ``name``.

        Raises:
            DataError: there are none of one of them.
        """
        keys = list(keys)
        absent = [key for key in keys if key not in self.sq_sum]
        if absent:
            raise DataError(f"{name}: hold no weight {absent[0]!r}; collect them for these targets")
        return dataclasses.replace(
            self,
            sq_sum={key: self.sq_sum[key] for key in keys},
            norm_sum=self.norm_sum and {key: self.norm_sum[key] for key in keys},
            transposed=self.transposed & set(keys),
            routed=self.routed & set(keys),
        )

    @classmethod
    def joined(cls, parts: Iterable[ActivationNorms]) -> ActivationNorms:
        """Join the norms of several blocks, collected on the same data, to those of one model."""
        parts = list(parts)
        means = {key: value for part in parts for key, value in (part.norm_sum or {}).items()}
        return dataclasses.replace(
            parts[0],
            sq_sum={key: value for part in parts for key, value in part.sq_sum.items()},
            norm_sum=means or None,
            transposed=frozenset().union(*(part.transposed for part in parts)),
            routed=frozenset().union(*(part.routed for part in parts)),
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (4 bytes a channel), which appears whole or not at all."""
        path = Path(path)
        tensors = {
            f"{key}.{name}": value.detach().cpu().contiguous()
            for name in _SUMS
            for key, value in (getattr(self, name) or {}).items()
        }
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "num_sequences": str(self.num_sequences),
            "num_tokens": str(self.num_tokens),
            "response_only": str(self.response_only).lower(),
            "aggregation": self.aggregation,
            "transposed": json.dumps(sorted(self.transposed)),
            "routed": json.dumps(sorted(self.routed)),
        }
        try:
            with new_file(path) as partial:
                save_tensors(partial, tensors, metadata)
        except OSError as error:
            raise AntidoteError(f"{path}: cannot be written: {error}") from error

    @classmethod
    @readable()
    def load(cls, path: str | Path, name: str = "norms") -> ActivationNorms:
        """Read a file that :meth:`save` wrote; a refusal calls it ``name``.

        Raises:
            DataError: no such file, not a norms file, an unknown version, or damaged contents.
        """
        where = f"{name}={str(path)!r}"
        try:
            metadata, tensors = read_tensor_file(path)
        except FileNotFoundError:
            raise DataError(f"{where}: no such file") from None
        except (OSError, DataError) as error:
            what = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ")
            raise DataError(f"{where}: cannot be read: {what}") from None
        if metadata.get("format") != FORMAT:
            raise DataError(f"{where}: is not a norms file of antidote_fast")
        if metadata.get("version") != VERSION:
            raise DataError(
                f"{where}: has format version {metadata.get('version')!r}; "
                f"this release reads {VERSION}"
            )
        try:
            sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in _SUMS}
            for full, tensor in tensors.items():
                key, _, kind = full.rpartition(".")
                sums[kind][key] = tensor
            mean = metadata["aggregation"] == "mean"
            if metadata["aggregation"] not in AGGREGATIONS or mean != bool(sums["norm_sum"]):
                raise ValueError(f"aggregation={metadata['aggregation']!r}")
            settings: dict[str, Any] = {
                "num_sequences": int(metadata["num_sequences"]),
                "num_tokens": int(metadata["num_tokens"]),
                "response_only": {"true": True, "false": False}[metadata["response_only"]],
                "fingerprint": metadata["fingerprint"],
                "transposed": _names(metadata["transposed"]),
                "routed": _names(metadata["routed"]),
            }
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{where}: cannot be read: {printable(error):.300}") from None
        return cls(sums["sq_sum"], norm_sum=sums["norm_sum"] if mean else None, **settings)

    def _check(self) -> None:
        if not self.sq_sum:
            raise DataError("norms: hold no weights")
        for name in ("num_sequences", "num_tokens"):
            if not 1 <= getattr(self, name) < 1 << 63:
                raise DataError(f"norms: {name}={getattr(self, name)}: must be at least 1")
        if self.norm_sum is not None and set(self.norm_sum) != set(self.sq_sum):
            raise DataError("norms: norm_sum and sq_sum are of different weights")
        for name in _SUMS:
            for key, value in (getattr(self, name) or {}).items():
                if value.dim() != 1 or value.dtype != torch.float32:
                    raise DataError(
                        f"norms: {key}.{name} is {value.dtype} {tuple(value.shape)}: must be "
                        "float32 (in_features,)"
                    )
                if value.shape != self.sq_sum[key].shape:
                    raise DataError(f"norms: {key}: norm_sum and sq_sum differ in length")
                # Of NaN the bounds are NaN, and neither comparison holds.
                low, high = torch.aminmax(value) if value.numel() else (value.new_zeros(()),) * 2
                if not (low >= 0 and high < torch.inf):
                    raise DataError(f"norms: {key}.{name} holds NaN, infinity or a negative value")


def _names(text: str) -> list[str]:
    """A JSON list of weights' names."""
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("a list of names is not one")
    return names


def _added(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: (mine[key].double() + theirs[key].double()).float() for key in mine}


def counts_of(norms: ActivationNorms) -> dict[str, Any]:
    """Return what a report says of norms: how much they were collected over, and how."""
    names = ("num_sequences", "num_tokens", "response_only", "aggregation")
    return {name: getattr(norms, name) for name in names}
