"""How a kernel is started: on the tensors' device, with multiply-add never fused."""

import contextlib
import functools

import torch

RAW = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SIGNED = 3


def run(kernel, grid, *args, device, num_warps, max_registers=None, **constants):
    """Launch ``kernel[grid](*args)`` on ``device``, the current stream of it.

    Every launch of the backend passes here, which is what the ahead-of-time tests record.
    ``max_registers`` a thread is for NVIDIA's compiler, which takes more than it needs otherwise.
    """
    if torch.version.hip:  # warps of 64 threads, of which a program has 1024 at most
        num_warps = min(num_warps, 16)
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}
    if max_registers is not None and torch.version.cuda:
        options["maxnreg"] = max_registers
    with _on(device):
        kernel[grid](*args, **options, **constants)


def raw(tensor):
    """The same memory as integers of its width: no kernel sees a float it does not compute."""
    return tensor.detach().view(RAW[tensor.dtype])


@functools.lru_cache(maxsize=64)
def absent(device, dtype):
    """What stands for an operand that is not there; never read."""
    return torch.empty(0, dtype=dtype, device=device)


def num_programs(device, per_processor):
    """Programs that keep every processor of a GPU busy; few where kernels are interpreted."""
    if device.type == "cpu":
        return 3
    return _processors(device) * per_processor


@functools.lru_cache(maxsize=64)
def _processors(device):
    properties = torch.get_device_module(device).get_device_properties(device)
    for name in ("multi_processor_count", "gpu_subslice_count"):
        if getattr(properties, name, None):
            return getattr(properties, name)
    return 64


def _on(device):
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def is_interpreted(kernel):
    """Whether Triton's interpreter runs this kernel: decided when it was decorated."""
    return type(kernel).__name__ == "InterpretedFunction"
