"""One forward a batch: its tensors on the device and checked, in parts where memory is short."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.models.tokens import fitted
from antidote_fast.norms.collector import LastInputSeen, NormCollector


def on_device(
    batch: Mapping[str, Any], device: torch.device, known: int | None, number: int
) -> dict[str, Any]:
    """Return a batch whose tensors are on a device, its token ids checked.

    Raises:
        DataError: no dict with input_ids, or a token id that the model has no embedding for.
    """
    if not hasattr(batch, "items") or "input_ids" not in batch:
        raise DataError(f"batch {number}: must be a dict with input_ids")
    ids = batch["input_ids"]
    if isinstance(ids, Tensor) and ids.device.type == "cpu":  # elsewhere one would wait
        batch = fitted(dict(batch), known, f"batch {number}")
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def input_device(model: nn.Module) -> torch.device:
    """Return the device where a model takes its inputs; offloaded weights (meta) do not count."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def run_forward(model: nn.Module, options: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """Run a model on a batch, without its labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    model(**inputs, **options)


def run_batch(
    model: nn.Module, collector: NormCollector, batch: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """One forward under a :class:`NormCollector`; on a GPU out of memory, two of half the size.

    The model is in eval mode, with hooks of the collector and without gradients; the batch is on
    its device, and the options are those of :func:`lean_forward`.
    """

    def forward(part: Mapping[str, Any]) -> None:
        if collector.start(part):
            with contextlib.suppress(LastInputSeen):
                run_forward(model, options, part)
            collector.finish()

    in_halves(forward, batch)


def in_halves(forward: Callable[..., Any], batch: Mapping[str, Any], *others: Any) -> list[Any]:
    """What a forward gives: of all, or where a GPU's memory is too small, of ever smaller parts.

    Args:
        forward: takes what follows, and begins anew what it left unfinished.
        batch: dict with ``input_ids`` (B, T).
        others: what else is split, in tuples and lists: tensors of B entries.

    Raises:
        AntidoteError: it does not fit at one sequence either.
    """
    size = batch["input_ids"].shape[0]
    try:
        return [forward(batch, *others)]
    except torch.OutOfMemoryError as error:
        if size < 2:
            raise AntidoteError(
                "out of memory at one sequence a batch: shorten max_seq_length"
            ) from error

    def half(rows: slice) -> Any:
        def part(value: Any) -> Any:
            split = isinstance(value, Tensor) and value.dim() and value.shape[0] == size
            return value[rows] if split else value

        return pytree.tree_map(part, (dict(batch), *others))

    halves = (slice(0, size // 2), slice(size // 2, size))
    return [result for rows in halves for result in in_halves(forward, *half(rows))]
