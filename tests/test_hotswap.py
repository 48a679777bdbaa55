"""Adapters that follow each other on one live base: what they compute, and what stays behind."""

import shutil

import fleets
import pytest
import tiny
import torch
from fleets import KINDS
from safetensors.torch import load_file, save_file

from antidote_fast import DataError, checkpoint
from antidote_fast.files import open_checkpoint
from antidote_fast.hotswap import AdapterSlot
from antidote_fast.loading import load_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fleets.make(tmp_path_factory)


def logits(model):
    with torch.no_grad():
        return model(tiny.batches(count=1, pads=False)[0]["input_ids"]).logits


def test_swapped_adapters_compute_what_loaded_ones_do(folders):
    slot = AdapterSlot(lambda: load_model(folders.base))
    bare = logits(slot.model)
    for name in [*KINDS, "plain", "plain2", "dora", "dora2"]:
        adapter = open_checkpoint(folders.adapters / name)
        live = slot.put(adapter, adapter.read(adapter.tensors))
        fresh = checkpoint.load_adapter(load_model(folders.base), adapter)
        assert torch.equal(logits(live), logits(fresh)), name
        assert not torch.equal(logits(live), bare), name
    # plain2, rslora2, dora2, saved2, the second plain, plain2 and dora2 follow one like them.
    assert slot.swaps == 7
    assert slot.loads == len(KINDS) + 4 - 7
    slot.clear()
    assert torch.equal(logits(slot.model), bare)
    assert not hasattr(slot.model, "peft_config")


def test_swap_looks_at_keys_shapes_and_dtypes(folders, tmp_path):
    slot = AdapterSlot(lambda: load_model(folders.base))
    adapter = open_checkpoint(folders.adapters / "plain")
    tensors = adapter.read(adapter.tensors)
    slot.put(adapter, tensors)
    assert slot.fits(open_checkpoint(folders.adapters / "plain2"))
    for name in ("alpha", "rank", "rslora", "dora", "others", "saved"):
        assert not slot.fits(open_checkpoint(folders.adapters / name)), name
    short = tmp_path / "short"
    shutil.copytree(folders.adapters / "plain", short)
    save_file(dict(list(tensors.items())[2:]), short / "adapter_model.safetensors")
    other = tmp_path / "half"
    shutil.copytree(folders.adapters / "plain", other)
    save_file({k: v.half() for k, v in tensors.items()}, other / "adapter_model.safetensors")
    assert not slot.fits(open_checkpoint(other))
    lacking = open_checkpoint(short)
    assert not slot.fits(lacking)
    with pytest.raises(DataError, match="lacks 2 tensors"):
        slot.put(lacking, lacking.read(lacking.tensors))
    live = slot.put(adapter, tensors)
    assert torch.isfinite(logits(live)).all()


def test_an_adapter_that_brings_base_weights_leaves_none_behind(folders, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(folders.adapters / "plain", foreign)
    tensors = load_file(foreign / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.weight"
    embeddings = load_file(folders.base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(tensors | {key: 2 * embeddings}, foreign / "adapter_model.safetensors")
    loads = []

    def load():
        loads.append(1)
        return load_model(folders.base)

    slot = AdapterSlot(load)
    bare = logits(slot.model)
    adapter = open_checkpoint(foreign)
    slot.put(adapter, adapter.read(adapter.tensors))
    slot.clear()
    assert torch.equal(logits(slot.model), bare)
    assert len(loads) == 2
