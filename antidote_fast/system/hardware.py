"""The processor and GPU that numbers were taken on."""

import os
import platform
from pathlib import Path

import torch

_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}


def fast_dtype() -> str:
    """bfloat16 where the processor multiplies in it, else float32 (emulated, bfloat16 is slow)."""
    return "bfloat16" if _bf16(_cpu_info()) else "float32"


def hardware() -> dict:
    """The processor, its cores and threads, and the GPU where there is one: what reports hold."""
    info = _cpu_info()
    description = {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": sorted(_bf16(info)),
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def _bf16(info) -> set:
    return set(info.get("flags", info.get("Features", "")).split()) & _BF16


def _cpu_info() -> dict:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
