"""Which base model is this? A short text that a live model and its checkpoint folder share.

It hashes the model's type, and the names, shapes and a sample of the values of every 2-D weight
inside a block. Values are compared as bfloat16, so that a checkpoint and the same model loaded in a
wider or narrower dtype agree; a float32 checkpoint loaded as float16 is the one pair that does not
(the value is rounded twice).
"""

import hashlib
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from antidote_fast.distributed.fsdp import is_sharded, sampled_rows

UNKNOWN = ""
_BLOCK_WEIGHT = re.compile(r"(?:^|\.)([^.]+\.\d+\..*\.weight)$")
# Names that transformers may rename or fuse between file and model.
_UNSTABLE = re.compile(r"expert|moe|\bgate\.weight$|rotary_emb")
_ADAPTER_PART = re.compile(r"\.(lora_[A-Za-z_]+|modules_to_save)\.")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COLUMNS = 32
_TINY = 2.0**-13  # float16 has fewer bits below this


def block_name(name: str) -> str | None:
    """The part of a parameter's name from its block on, or None outside of blocks.

    ``model.layers.0.mlp.up_proj.weight`` gives ``layers.0.mlp.up_proj.weight``, as does the name
    that PEFT gives to the same base weight.
    """
    if _ADAPTER_PART.search(name) or _UNSTABLE.search(name):
        return None
    match = _BLOCK_WEIGHT.search(
        name.replace(".base_layer.", ".").replace(".original_module.", ".")
    )
    return match.group(1) if match else None


def fingerprint(
    weights: Iterable[tuple[str, tuple[int, ...], torch.dtype, Callable[..., Tensor]]],
    model_type: str | None,
) -> str:
    """Hash of an iterable of ``(name, shape, dtype, rows)``; order does not matter.

    ``model_type`` is that of the config. ``rows(indices, columns)`` gives the first ``columns``
    columns of those rows, on any device.
    Returns ``""`` (unknown) where there is nothing to hash or a weight is packed, as in a quantised
    model.
    """
    digests = {}
    for name, shape, dtype, rows in weights:
        short = block_name(name)
        if short is None or len(shape) != 2:
            continue
        if dtype not in _DTYPES:
            return UNKNOWN
        if 0 in shape:
            continue
        sample = rows(_picked(shape), _COLUMNS)
        sample = sample.detach().to("cpu", torch.float32)
        sample = torch.where(sample.abs() < _TINY, 0.0, sample).to(torch.bfloat16).contiguous()
        digest = hashlib.sha256(f"{short} {tuple(shape)} ".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
        digests[short] = digest.hexdigest()
    if not digests:
        return UNKNOWN
    text = " ".join([str(model_type), *(digests[k] for k in sorted(digests))])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fingerprint_model(model: nn.Module) -> str:
    """Fingerprint of a live model's base weights; an adapter on top does not count.

    ``""`` where it cannot be told: quantised weights, or weights that live elsewhere (meta). Of a
    model sharded by FSDP2 every rank must ask.
    """
    parameters = list(model.named_parameters())
    if any(p.is_meta for _, p in parameters):
        return UNKNOWN
    sampled = {}
    if any(is_sharded(p) for _, p in parameters):
        inside = [(name, p) for name, p in parameters if block_name(name) and p.numel()]
        sampled = sampled_rows(inside, _picked, _COLUMNS)
        if sampled is None:
            return UNKNOWN
    return fingerprint(
        ((name, tuple(p.shape), p.dtype, _rows(p, sampled.get(name))) for name, p in parameters),
        getattr(getattr(model, "config", None), "model_type", None),
    )


def _picked(shape):
    return sorted({0, shape[0] // 2, shape[0] - 1})


def _rows(tensor, sample=None):
    if sample is not None:
        return lambda rows, columns: sample
    return lambda rows, columns: tensor.detach()[rows, :columns]
