"""Hooks that sum the squares of what flows into the targets: put on and taken off by one owner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from antidote_fast import backends
from antidote_fast._check import WEIGHT_DTYPES
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import DataError, UsageError
from antidote_fast.models.targets import Target

AGGREGATIONS = ("rms", "mean")
Flats = dict[torch.device, Tensor]


class LastInputSeen(Exception):
    """Ends a forward whose last target has had its input: what follows is not wanted."""


class NormCollector:
    """Collects norms during forwards that the caller runs; a context manager.

    ::

        with NormCollector(find_targets(model)) as collector, torch.no_grad():
            for batch in batches:
                if collector.start(batch):
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                    collector.finish()
        norms = ActivationNorms.of(collector)

    Modules that receive the very same tensor (q/k/v; gate/up; their LoRA A) are reduced once.
    :meth:`ActivationNorms.collect` is this loop with eval mode and error handling.

    Only forwards of the thread that calls :meth:`start` count. Those that other threads run on the
    same modules meanwhile are theirs alone, and may have a collector of their own.

    Args:
        targets: of :func:`antidote_fast.models.targets.find_targets`.
        aggregation: ``"rms"`` or ``"mean"``, which keeps one norm a sequence as well.
        response_only: count only tokens whose label (unshifted) is not -100.
        backend: as in :mod:`antidote_fast.ops`.
        stop_early: once a forward has shown in what order the targets get their inputs, end later
            ones with :class:`LastInputSeen` where the last of them has had its own. Not for models
            whose modules are moved between devices by hooks. Without effect where a target gets no
            input or several, as routed experts may.

    Raises:
        UsageError: unknown aggregation.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        aggregation: str = "rms",
        response_only: bool = False,
        backend: str | None = None,
        stop_early: bool = False,
    ) -> None:
        if aggregation not in AGGREGATIONS:
            accepted = ", ".join(AGGREGATIONS)
            raise UsageError(f"aggregation={aggregation!r}: must be one of {accepted}")
        self.targets = list(targets)
        self.aggregation = aggregation
        self.response_only = response_only
        self.backend = backend
        self.stop_early = stop_early and not any(target.routed for target in self.targets)
        self._order: list[int] | None = None  # of the targets' inputs in a forward
        self._open = False
        self._thread: int | None = None  # that called open or start
        self._pending: list[tuple[int, Tensor]] = []  # a target's index, and its sums
        self._mask: Tensor | None = None
        self._masks: dict[tuple[Any, ...], Any] = {}
        self._shared: tuple[Tensor, torch.dtype, int | None, Tensor] | None = None
        self._allocate()
        self.reset()

    def __enter__(self) -> NormCollector:
        try:
            self.open()
            return self
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception: object) -> None:
        try:
            self.close()
        finally:  # the first may have been interrupted
            self.close()

    def open(self) -> None:
        """Put the hooks on."""
        self._open, self._thread = True, threading.get_ident()
        for index, target in enumerate(self.targets):
            hook: Any = self._make_hook(index, target)
            hook.collector = self
            target.input_module.register_forward_pre_hook(hook, with_kwargs=True)

    def close(self) -> None:
        """Take the hooks off; what was collected stays."""
        self._open = False
        for target in self.targets:
            # Not by handles: of a registration that was interrupted there is none.
            module = target.input_module
            for number, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "collector", None) is self:
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
                    module._forward_pre_hooks.pop(number, None)
        self.discard()

    def others_on(self, model: nn.Module) -> bool:
        """Return whether another open collector has hooks on a module of ``model``."""
        hooks = (hook for m in model.modules() for hook in list(m._forward_pre_hooks.values()))
        owners = (getattr(hook, "collector", None) for hook in hooks)
        return any(isinstance(x, NormCollector) and x is not self and x._open for x in owners)

    def start(self, batch: Mapping[str, Any]) -> bool:
        """Say which tokens of the next forward count.

        Args:
            batch: dict with ``input_ids`` (B, T) and, as in :meth:`ActivationNorms.collect`,
                ``attention_mask`` and ``labels``.

        Returns:
            False where none counts; the forward may be left out then, and :meth:`finish` too.
        """
        self.discard()
        ids = batch["input_ids"]
        mask = _plane("attention_mask", batch.get("attention_mask"), ids)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        if self.response_only:
            labels = _plane("labels", batch.get("labels"), ids)
            if labels is None:
                raise UsageError("response_only=True: every batch must have labels")
            mask = mask & (labels.to(mask.device) != -100)
        self._seen_batches += 1
        self._seen_sequences += ids.shape[0]
        self._sequences = int(mask.any(dim=-1).sum())
        self._tokens = int(mask.sum())
        if not self._tokens:
            return False
        self._all_count = self._tokens == mask.numel()
        self._mask, self._shape = mask, mask.shape
        self._thread = threading.get_ident()
        return True

    def idle(self) -> None:
        """Say that nothing of the next forward counts; no :meth:`finish` follows it."""
        self.discard()
        self._idle = True
        self._thread = threading.get_ident()

    def finish(self) -> None:
        """Add what the last forward gave to the totals.

        Raises:
            DataError: an input held NaN or infinity, naming the layer.
            UsageError: no :meth:`start` before it, or a forward in another thread than start's.
        """
        if self._mask is None:
            raise UsageError("finish: call start(batch) first")
        if self._elsewhere and not self._pending:
            raise UsageError(
                "finish: the forward ran in another thread than start(batch); call both in one"
            )
        if self.stop_early and self._order is None:
            self._order = [index for index, _ in self._pending]
            if sorted(self._order) != list(range(len(self.targets))):
                self.stop_early = False
        self._add_pending()
        if not all(bool(torch.isfinite(flat).all()) for flat in self._batch.values()):
            slots = zip(self.targets, self._slots, strict=True)
            bad = next(t for t, slot in slots if not all(bool(x.isfinite().all()) for x in slot))
            self.discard()
            raise DataError(
                f"{bad.key}: its input holds NaN or infinity, or squares past float32, in batch "
                f"{self._seen_batches}"
            )
        for device, flat in self._batch.items():
            self._total[device].add_(flat)
        self.num_sequences += self._sequences
        self.num_tokens += self._tokens
        self.discard()

    def reset(self) -> None:
        """Forget all that was collected, to begin with other weights in the same modules."""
        self.discard()
        for flat in self._total.values():
            flat.zero_()
        self.num_sequences = self.num_tokens = 0
        self._seen_batches = self._seen_sequences = 0

    def discard(self) -> None:
        """Forget the forward since the last :meth:`start`."""
        if self._pending:
            for flat in self._batch.values():
                flat.zero_()
        self._idle = self._elsewhere = False
        self._mask = self._shared = None
        self._masks, self._pending = {}, []

    def tokens_counted(self, x: Tensor) -> tuple[bool, Tensor | None]:
        """Which tokens of x (..., K) count, for a kernel that sums squares in the hooks' place.

        Returns:
            (known, mask): mask is a contiguous bool of ``x.shape[:-1]``, or None where all count.
            Where it is not known x belongs to no batch, and the hooks say what is wrong.
        """
        tokens = x.shape[:-1]
        if self._mask is None or not self._is_ours():
            return False, None
        if tokens not in (self._shape, (self._shape.numel(),)):
            return False, None
        if self._all_count:
            return True, None
        place = (x.device, *tokens)
        if place not in self._masks:
            self._masks[place] = self._mask.to(x.device).reshape(tokens).contiguous()
        return True, self._masks[place]

    def deposit(self, x: Tensor, sums: Tensor) -> None:
        """Take sums (K,) fp32 of ``x ** 2`` over its counted tokens, made along with x.

        A module that receives this very tensor next, unchanged and in its dtype, is not reduced.
        """
        self._shared = (x, x.dtype, _version(x), sums)

    def sums(self, *, fingerprint: str = "", world: World = ALONE) -> dict:
        """The sums of all finished batches, as :class:`ActivationNorms` takes them.

        Args:
            fingerprint: of the base model; ranks that calibrate another are refused.
            world: the ranks (:mod:`antidote_fast.distributed`) whose sums are added up. Each of
                them calls this, also one that finished no batch, and all get the same sums.

        Returns:
            Keyword arguments of :class:`ActivationNorms`.

        Raises:
            DataError: no token counted, with the counts; ranks whose targets, settings or base
                models differ.
        """
        totals, seen = self._total, [self._seen_batches, self._seen_sequences]
        counts = [self.num_sequences, self.num_tokens, *seen]
        if world.size > 1:
            sizes = [flat.numel() for flat in totals.values()]
            keys = [(t.key, t.in_features, t.transposed, t.routed) for t in self.targets]
            settings = [self.aggregation, self.response_only, fingerprint]
            world.check_same("models or settings of the ranks", repr((sizes, keys, settings)))
            ours = torch.tensor(counts, dtype=torch.float64)
            added, *flats = world.all_reduce([ours, *totals.values()])
            totals, counts = dict(zip(totals, flats, strict=True)), [int(x) for x in added]
        num_sequences, num_tokens, batches, sequences = counts
        with world.together():
            if not num_tokens:
                only = " that are neither padding nor prompt" if self.response_only else ""
                raise DataError(
                    f"calibration data: {batches} batches with {sequences} sequences hold 0 tokens"
                    f"{only} to count"
                )
            sums: dict[str, dict[str, Tensor]] = {"sq_sum": {}, "norm_sum": {}}
            for target, views in zip(self.targets, self._views(totals), strict=True):
                for name, view in zip(sums, views, strict=False):
                    sums[name][target.key] = view.to("cpu", torch.float32)
            return {
                "sq_sum": sums["sq_sum"],
                "norm_sum": sums["norm_sum"] or None,
                "num_sequences": num_sequences,
                "num_tokens": num_tokens,
                "response_only": self.response_only,
                "transposed": [t.key for t in self.targets if t.transposed],
                "routed": [t.key for t in self.targets if t.routed],
            }

    def _allocate(self) -> None:
        """One flat float64 buffer a device for the batch and one for the totals.

        Totals in float64, so that thousands of batches stay as exact as one.
        """
        self._places = []
        sizes: dict[torch.device, int] = {}
        parts = 2 if self.aggregation == "mean" else 1
        for target in self.targets:
            device = target.weight.device
            if device.type in ("meta", "mps"):  # offloaded; no float64
                device = torch.device("cpu")
            start = sizes.get(device, 0)
            self._places.append((device, start, target.in_features))
            sizes[device] = start + parts * target.in_features
        self._batch, self._total = (
            {d: torch.zeros(n, dtype=torch.float64, device=d) for d, n in sizes.items()}
            for _ in range(2)
        )
        self._slots = self._views(self._batch)

    def _views(self, flats: Flats) -> list[tuple[Tensor, ...]]:
        """A target: (sq_sum,) or (sq_sum, norm_sum), as views."""
        parts = 2 if self.aggregation == "mean" else 1
        return [
            tuple(flats[device][start + i * width : start + (i + 1) * width] for i in range(parts))
            for device, start, width in self._places
        ]

    def _make_hook(self, index: int, target: Target) -> Callable[..., None]:
        is_lora = ".lora_" in target.key
        # PEFT casts the wrapper's input to the factor's dtype, a copy for each factor: sharing is
        # seen, and the cast done, on the wrapper's side.
        dtype = target.weight.dtype if is_lora else None
        cast_to = None if dtype == torch.float32 else dtype
        shareable = not is_lora or target.input_module is not target.module
        first = target.first_factor

        # Short, and sums are added to their slots in finish: what runs here runs between two
        # layers, with cold caches.
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._idle or not self._is_ours():
                return
            x = args[0] if args else next(iter(kwargs.values()))
            self._pending.append((index, sums_of(x)))
            # Looked at where all have had theirs: that is the last one, or not as before.
            last = self._order is not None and index == self._order[-1] and self.stop_early
            if last and [place for place, _ in self._pending] == self._order:
                raise LastInputSeen

        def sums_of(x: Tensor) -> Tensor:
            if first is not None:
                x = functional.linear(x.to(first.weight.dtype), first.weight)
                return self._reduce(target, x)
            if not shareable:
                return self._reduce(target, x)
            dtype, version = cast_to or x.dtype, _version(x)
            shared = self._shared
            if shared is None or shared[0] is not x or shared[1:3] != (dtype, version):
                shared = self._shared = x, dtype, version, self._reduce(target, x.to(dtype))
            return shared[3]

        return hook

    def _is_ours(self) -> bool:
        """Whether a forward is of the thread that collects; else it is not looked at."""
        if self._open and self._thread == threading.get_ident():
            return True
        self._elsewhere = self._mask is not None
        return False

    def _add_pending(self) -> None:
        """Add what the hooks left to the batch's buffers, in one addition a device if it fits."""
        in_place = sorted(self._pending, key=lambda entry: entry[0])
        once = [index for index, _ in in_place] == list(range(len(self.targets)))
        if self.aggregation == "mean":
            for index, sums in self._pending:
                sq_sum, norm_sum = self._slots[index]
                sums = sums.to(sq_sum.device, torch.float64)  # (B, K)
                sq_sum.add_(sums.sum(dim=0))
                norm_sum.add_(sums.sqrt().sum(dim=0))
        elif not once:  # a shared module, or an expert not reached
            for index, sums in self._pending:
                self._slots[index][0].add_(sums.to(self._slots[index][0].device))
        else:
            # Hundreds of small additions keep a GPU waiting.
            for device, flat in self._batch.items():
                mine = [sums for index, sums in in_place if self._places[index][0] == device]
                flat.add_(torch.cat([sums.to(device) for sums in mine]))

    def _reduce(self, target: Target, x: Tensor) -> Tensor:
        """Sums over tokens of x²: (K,), or (B, K) where each sequence's own is wanted."""
        if not x.is_contiguous():
            x = x.contiguous()
        *shape, width = x.shape
        place = (x.device, x.dtype, width == target.in_features, target.routed, *shape)
        if place not in self._masks:
            self._masks[place] = self._checked_mask(target, x)
        mask, add = self._masks[place]
        if self.aggregation == "rms":
            sums = torch.zeros(width, dtype=torch.float32, device=x.device)
            if x.numel():
                add(sums, x, mask)
            return sums
        x = x.reshape(*self._shape, width)
        sums = torch.zeros((len(x), width), dtype=torch.float32, device=x.device)
        for row, sequence in enumerate(x):
            add(sums[row], sequence, None if mask is None else mask.reshape(self._shape)[row])
        return sums

    def _checked_mask(self, target: Target, x: Tensor) -> tuple[Tensor | None, Callable[..., None]]:
        """(mask in the shape of x's tokens or None where all count, what sums the squares).

        The latter is ``ops.accumulate_sq_norm_`` without its checks, which are made here once for
        all inputs of one kind.
        """
        if self._mask is None:
            raise UsageError(f"{target.key}: a forward without start(batch) before it")
        if x.dtype not in WEIGHT_DTYPES:
            raise DataError(f"{target.key}: got {x.dtype}; must be float32, bfloat16 or float16")
        if x.shape[-1] != target.in_features:
            raise DataError(
                f"{target.key}: got {x.shape[-1]} channels, the weight takes {target.in_features}"
            )
        add = backends.select(self.backend, x.device.type).accumulate_sq_norm_
        tokens = x.shape[:-1]
        if target.routed and tokens != self._shape:
            if not self._all_count or self.aggregation == "mean":
                raise DataError(
                    f"{target.key}: a routed expert gets tokens of which padding or prompt cannot "
                    "be told apart; use batches without padding (batch_size 1), all tokens and "
                    "aggregation rms"
                )
            return None, add
        if tokens not in (self._shape, (self._shape.numel(),)):
            raise DataError(
                f"{target.key}: got {tuple(tokens)} tokens, where the batch has "
                f"{tuple(self._shape)}"
            )
        return self.tokens_counted(x)[1], add


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _plane(name: str, value: Tensor | None, ids: Tensor) -> Tensor | None:
    """None, or a tensor of the shape of ``input_ids``."""
    if value is None:
        return None
    if ids.dim() != 2 or value.shape != ids.shape:
        raise DataError(
            f"batch: {name} has shape {tuple(value.shape)} and input_ids {tuple(ids.shape)}; both "
            "must be (batch, tokens)"
        )
    return value
