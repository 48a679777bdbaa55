"""Where there is no GPU, Triton kernels are interpreted; checkpoint folders that files share."""

import functools
import importlib.util
import inspect
import os
import shutil

import hypothesis
import pytest
import torch

# Read when a kernel is decorated: before anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import faulty
import sampling
import tiny

hypothesis.settings.register_profile("fuzz", max_examples=100_000)  # make fuzz

_LANGUAGE = ("triton.language", "triton.language.core")


def pytest_addoption(parser):
    parser.addoption(
        "--whole", action="store_true", help="every case and example, not a fixed sample of them"
    )


def pytest_configure(config):
    sampling.WHOLE = config.getoption("whole")
    interpret_faster()


def interpret_faster():
    """Interpret in a third of the time: Triton patches its language anew for each inner call."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from triton.runtime import interpreter

        patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

        def patch_once(fn):
            modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            which = frozenset(m.__name__ for m in modules if m.__name__ in _LANGUAGE)
            if which in patched:
                return None  # an inner call's is never undone
            patched.add(which)
            return patch(fn)

        def launch_afresh(*args, **kwargs):
            patched.clear()
            return launch(*args, **kwargs)

        interpreter._patch_lang = patch_once
        interpreter.GridExecutor.__call__ = launch_afresh


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders of a model (two shapes of file), its twin of another seed, and an adapter."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.save_model(tiny.build(), root / "model")
    tiny.save_model(tiny.build(), root / "sharded", max_shard_size="20KB")
    tiny.save_model(tiny.build(seed=1), root / "twin")
    tiny.save_model(tiny.build("gpt2"), root / "gpt2")
    tiny.save_adapter(tiny.add_lora(tiny.build()), root / "adapter")
    return root


@pytest.fixture
def broken(monkeypatch):
    """Puts a backend that does some damage in place of another, as :func:`faulty.install`."""
    return functools.partial(faulty.install, monkeypatch)


@pytest.fixture
def copy_of(folders, tmp_path):
    def copy(name):
        shutil.copytree(folders / name, tmp_path / name)
        return tmp_path / name

    return copy
