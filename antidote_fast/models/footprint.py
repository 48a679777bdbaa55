"""The memory that a model takes, and whether there is enough of it."""

import torch

from antidote_fast.errors import AntidoteError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.models.loading import pick_device, pick_dtype
from antidote_fast.system.memory import available_memory, format_bytes

ADAM_BYTES = 8  # two fp32 moments a trainable weight


def weight_bytes(checkpoint: Checkpoint, dtype: str = "auto") -> int:
    """Bytes of a checkpoint's weights in memory, in ``dtype`` (auto: as they are saved)."""
    wanted = pick_dtype(dtype)
    convert = wanted != "auto" and "quantization_config" not in checkpoint.config
    entries = checkpoint.tensors.values()
    floats = [e for e in entries if convert and e.dtype is not None and e.dtype.is_floating_point]
    change = sum(e.num_elements * wanted.itemsize - e.num_bytes for e in floats)
    return sum(e.num_bytes for e in entries) + change


def check_memory(config, checkpoints: list[Checkpoint | None]) -> None:
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
    base, device = checkpoints[0], pick_device(config.device)
    available = device_memory(device)
    what, advice = "its weights need", "a smaller --dtype"
    if getattr(config, "tuning", None) == "full":
        what, advice = "training all weights needs", "--tuning lora"
        needed = base.num_weights * (4 + 4 + ADAM_BYTES)
    else:
        needed = sum(weight_bytes(source, config.dtype) for source in checkpoints if source)
        if hasattr(config, "stream"):
            advice = "--stream, which holds one block of the model at a time"
    if available is not None and needed > available:
        raise AntidoteError(
            f"{base.folder}: {what} {format_bytes(needed)} of memory, and {format_bytes(available)}"
            f" are available on {device}; give {advice}, or another --device"
        )


def device_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where nothing tells."""
    if device.type == "cpu":
        return available_memory()
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return None
