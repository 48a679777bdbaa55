"""Harmful embedding drift: how far fine-tuning moved what attention puts out."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from antidote_fast.errors import DataError, UsageError
from antidote_fast.models.blocks import attention_modules, outputs_seen
from antidote_fast.models.kinds import Model
from antidote_fast.models.tokens import fitted, num_embeddings
from antidote_fast.models.undo import eval_mode, undoing
from antidote_fast.system.progress import Progress, track


def _forward(
    model: Model, outputs: dict[int, Tensor], batch: Mapping[str, Any]
) -> dict[int, Tensor]:
    """Each attention block's output, a copy of what hooks put in ``outputs``: the last where a
    block is called several times in one forward (shared layers).
    """
    outputs.clear()
    device = next(model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    model(**inputs, use_cache=False)
    return dict(outputs)


@torch.no_grad()
def embedding_drift(
    model: Model, reference: Model | None, batches: Sequence[dict], *, progress: Progress = False
) -> dict:
    """L2 distance of attention outputs between a fine-tuned model and the aligned one.

    The official sum is over layers and batches of the norm of one batch's difference, pads
    included. Here a norm is taken of each sequence without its pads, so that neither padding nor
    the batch size changes the result (at batch size 1 the two are the same).

    Args:
        model: the fine-tuned model.
        reference: the aligned model; None for a PEFT model's own base, its adapter switched off.
        batches: dicts with ``input_ids`` and ``attention_mask`` (batch, length), right padded, of
            the same alignment data for both.

    Returns:
        ``embedding_drift_sum`` over layers and sequences, ``embedding_drift_per_token`` (the mean
        over layers and tokens of one token's distance), ``num_layers``, ``num_sequences``,
        ``num_tokens``.

    Raises:
        UsageError: no reference for a model that is not PEFT-wrapped.
        DataError: no tokens, a token id that a model has no embedding for, models whose attention
            does not match, or outputs that are not finite.
    """
    if reference is None and not hasattr(model, "disable_adapter"):
        raise UsageError("reference=None: must be a model, unless the model has an adapter")
    aligned = model if reference is None else reference
    sizes = [size for size in map(num_embeddings, (model, aligned)) if size is not None]
    known = min(sizes, default=None)
    batches = [fitted(batch, known, f"batch {i}") for i, batch in enumerate(batches, 1)]
    total = per_token = 0.0
    num_tokens = num_sequences = num_layers = 0
    ours: dict[int, Tensor] = {}
    theirs: dict[int, Tensor] = {}
    with undoing() as undo:
        for each in (model, aligned):
            eval_mode(each, undo)
        with (
            outputs_seen(attention_modules(model), ours.__setitem__),
            outputs_seen(attention_modules(aligned), theirs.__setitem__),
        ):
            for batch in track(batches, "drift", progress):
                tuned = _forward(model, ours, batch)
                with model.disable_adapter() if reference is None else nullcontext():
                    base = _forward(aligned, theirs, batch)
                mask = batch["attention_mask"].bool()
                num_tokens += int(mask.sum())
                num_sequences += len(mask)
                num_layers = len(tuned)
                if tuned.keys() != base.keys():
                    raise DataError(f"{len(tuned)} attention blocks here, {len(base)} in reference")
                for i in tuned:
                    squares = _token_squares(tuned[i], base[i], mask)
                    total += squares.sum(1).sqrt().sum().item()
                    per_token += squares.sqrt().sum().item()
    if not num_tokens:
        raise DataError("no tokens to measure the embedding drift on")
    if not math.isfinite(total):
        raise DataError("the embedding drift is not finite: a model puts out NaN or infinity")
    return {
        "embedding_drift_sum": total,
        "embedding_drift_per_token": per_token / (num_tokens * num_layers),
        "num_layers": num_layers,
        "num_sequences": num_sequences,
        "num_tokens": num_tokens,
    }


def _token_squares(tuned: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of each token, fp32 (batch, length), 0 on pads."""
    if tuned.shape != base.shape or tuned.numel() % mask.numel():
        raise DataError(
            f"attention outputs {tuple(tuned.shape)} and {tuple(base.shape)} do not match: the "
            "reference must be of the same architecture"
        )
    difference = tuned.float() - base.to(tuned.device).float()
    # Models that flatten give (batch * length, hidden).
    squares = difference.reshape(*mask.shape, -1).square().sum(-1)
    # Not a product: pads may hold NaN.
    return squares.masked_fill(~mask.to(squares.device), 0)
