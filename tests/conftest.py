"""Where there is no GPU, Triton kernels are interpreted; checkpoint folders that files share."""

import os
import shutil

import pytest
import torch

# Read when a kernel is decorated: before anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny


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
def copy_of(folders, tmp_path):
    def copy(name):
        shutil.copytree(folders / name, tmp_path / name)
        return tmp_path / name

    return copy
