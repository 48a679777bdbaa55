"""The memory that a model takes, and whether there is enough of it."""

import math

import torch

from antidote_fast.errors import AntidoteError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.models.loading import pick_device, pick_dtype
from antidote_fast.system.memory import available_memory, format_bytes

ADAM_BYTES = 8  # two fp32 moments a trainable weight


def weight_bytes(checkpoint: Checkpoint, dtype="auto") -> int:
    """Bytes of a checkpoint's weights in memory, in ``dtype`` (auto: as they are saved)."""
    wanted = pick_dtype(dtype)
    convert = wanted != "auto" and "quantization_config" not in checkpoint.config
    total = 0
    for entry in checkpoint.tensors.values():
        is_float = entry.dtype is not None and entry.dtype.is_floating_point
        if convert and is_float:
            total += math.prod(entry.shape) * wanted.itemsize
        else:
            total += entry.end - entry.start
    return total


def check_memory(config, checkpoints):
    """Refuse, before weights are loaded, what cannot be held; only what is surely needed counts.

    That is the weights, and in full training their fp32 copies, gradients and Adam's moments.

    Args:
        config: a stage's dataclass.
        checkpoints: those whose weights are loaded, the base model first; None is left out.

    Raises:
        AntidoteError: naming both numbers and what to do.
    """
    if getattr(config, "device_map", None):  # spread over devices, and past them
        return
    found = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    needed = sum(weight_bytes(checkpoint, config.dtype) for checkpoint in found)
    if getattr(config, "tuning", None) == "full":
        weights = sum(math.prod(entry.shape) for entry in found[0].tensors.values())
        needed = weights * (4 + 4 + ADAM_BYTES)
    device = pick_device(config.device)
    available = device_memory(device)
    if available is not None and needed > available:
        full = getattr(config, "tuning", None) == "full"
        what = "training all weights needs" if full else "its weights need"
        raise AntidoteError(
            f"{found[0].folder}: {what} {format_bytes(needed)} of memory, and "
            f"{format_bytes(available)} are available on {device}; {_advice(config)}"
        )


def _advice(config):
    if hasattr(config, "stream"):
        return "give --stream, which holds one block of the model at a time, or another --device"
    if getattr(config, "tuning", None) == "full":
        return "give --tuning lora, or another --device"
    return "give a smaller --dtype, or another --device"


def device_memory(device) -> int | None:
    """Bytes that are free on a device; None where nothing tells."""
    if device.type == "cpu":
        return available_memory()
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return None
