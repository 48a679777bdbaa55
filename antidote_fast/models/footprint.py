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
    total = 0
    for entry in checkpoint.tensors.values():
        if convert and entry.dtype is not None and entry.dtype.is_floating_point:
            total += entry.num_elements * wanted.itemsize
        else:
            total += entry.num_bytes
    return total


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
    advice = "give a smaller --dtype, or another --device"
    if getattr(config, "tuning", None) == "full":
        what, needed = "training all weights needs", base.num_weights * (4 + 4 + ADAM_BYTES)
        advice = "give --tuning lora, or another --device"
    else:
        what = "its weights need"
        needed = sum(weight_bytes(source, config.dtype) for source in checkpoints if source)
        if hasattr(config, "stream"):
            advice = (
                "give --stream, which holds one block of the model at a time, or another --device"
            )
    if available is not None and needed > available:
        raise AntidoteError(
            f"{base.folder}: {what} {format_bytes(needed)} of memory, and "
            f"{format_bytes(available)} are available on {device}; {advice}"
        )


def device_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where nothing tells."""
    if device.type == "cpu":
        return available_memory()
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return None
