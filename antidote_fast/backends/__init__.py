"""The backends by name, and which of them runs a call.

Every backend module exports the same functions: ``unavailable``, ``accumulate_sq_norm_``,
``score``, ``select_mask``, ``prune``, ``apply_mask_``; ``reference`` says what each does. One that
prunes a linear layer from its input in one launch has ``prune_linear`` too.
"""

import functools
import importlib
import os
from types import ModuleType

from antidote_fast.errors import BackendUnavailable

ENVIRONMENT = "ANTIDOTE_BACKEND"
NAMES = ("cpu", "cuda", "triton", "reference")
PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "xpu": ("triton", "reference"),
}


@functools.cache
def load(name: str) -> tuple[ModuleType, str | None]:
    """(module, why it cannot run here or None) of a backend."""
    module = importlib.import_module(f"antidote_fast.backends.{name}")
    return module, module.unavailable()


def available() -> dict[str, str | None]:
    """{backend name: None where it can run here, else the reason}."""
    return {name: load(name)[1] for name in NAMES}


def select(name: str | None, device_type: str) -> ModuleType:
    """The backend module that runs a call.

    Args:
        name: the caller's ``backend=``; None takes ``ANTIDOTE_BACKEND``, else the first available
            one for the device.
        device_type: device type of the tensors, such as "cpu" or "cuda".

    Raises:
        ValueError: no backend of that name.
        BackendUnavailable: it was asked for and cannot run here, or not on that device.
    """
    source = "backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT) or None, ENVIRONMENT
    if name is None:
        for candidate in PREFERENCE.get(device_type, ("reference",)):
            module, reason = load(candidate)
            if reason is None:
                return module
        raise BackendUnavailable(f"no backend can run on {device_type} tensors here")
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{source}={name!r}: must be one of {', '.join(NAMES)}")
    module, reason = load(name)
    if reason is not None:
        raise BackendUnavailable(f"{source}={name!r}: {reason}")
    if module.DEVICE_TYPES is not None and device_type not in module.DEVICE_TYPES:
        raise BackendUnavailable(
            f"{source}={name!r}: takes {' or '.join(module.DEVICE_TYPES)} tensors, "
            f"not {device_type}"
        )
    return module
