"""Where there is no GPU, Triton kernels are interpreted; checkpoint folders that files share."""

import functools
import os
import shutil

import hypothesis
import pytest
import torch

# Read when a kernel is decorated: before anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import broken_backends
import interpreting
import sampling
import tiny

hypothesis.settings.register_profile("fuzz", max_examples=100_000)  # make fuzz


def pytest_addoption(parser):
    parser.addoption(
        "--whole", action="store_true", help="every case and example, not a fixed sample of them"
    )


def pytest_configure(config):
    sampling.WHOLE = config.getoption("whole")
    interpreting.interpret_faster()


# Files of a few long tests: two workers that share the rest end at the same time.
LONGEST = ("test_kill", "test_benchmarks", "test_protocol", "test_ranks", "test_ray_pool")
LONGEST += ("test_dry_run", "test_experiment", "test_memory", "test_soak", "test_package")


def pytest_collection_modifyitems(items):
    items[:] = sampling.thinned(items)
    items.sort(key=lambda item: item.path.stem not in LONGEST)


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
    """Puts a backend that does some damage in place of another (``broken_backends.install``)."""
    return functools.partial(broken_backends.install, monkeypatch)


@pytest.fixture
def copy_of(folders, tmp_path):
    def copy(name):
        shutil.copytree(folders / name, tmp_path / name)
        return tmp_path / name

    return copy
