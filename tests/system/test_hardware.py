"""What the processor is told to be, and which dtype is quick on it."""

from types import SimpleNamespace

import pytest
import torch

from antidote_fast.system import hardware


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx2", "float32"), ("fpu avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16")],
)
def test_bfloat16_only_where_the_processor_has_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(hardware, "_cpu_info", lambda: {"flags": flags, "model name": "A"})
    assert hardware.fast_dtype() == dtype
    assert hardware.hardware()["processor"] == "A"


def test_the_processor_is_told_without_proc_too(monkeypatch):
    monkeypatch.setattr(hardware, "Path", lambda path: tiny_path_that_is_not_there())
    assert hardware._cpu_info() == {}
    assert hardware.fast_dtype() == "float32"
    assert hardware.hardware()["threads"] == torch.get_num_threads()


def tiny_path_that_is_not_there():
    def read_text(**options):
        raise FileNotFoundError

    return SimpleNamespace(read_text=read_text)
