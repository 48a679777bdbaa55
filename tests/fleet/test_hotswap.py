"""Adapters that follow each other on one live base: what they compute, and what stays behind."""

import shutil

import fleets
import peft
import pytest
import tiny
import torch
from fleets import KINDS
from safetensors.torch import save_file

from antidote_fast import DataError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.fleet.hotswap import AdapterSlot, BaseLost
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model


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
        fresh = load_adapter(load_model(folders.base), adapter)
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


def of(folders, name):
    """An adapter and its tensors, as a fleet reads them."""
    adapter = open_checkpoint(folders.adapters / name)
    return adapter, adapter.read(adapter.tensors)


def test_tensors_that_were_put_stay_the_callers(folders):
    slot = AdapterSlot(lambda: load_model(folders.base))
    put = {name: of(folders, name) for name in ("plain", "plain2", "saved", "saved2", "dora")}
    for adapter, tensors in put.values():
        slot.put(adapter, tensors)
    for adapter, tensors in put.values():
        fresh = adapter.read(adapter.tensors)
        assert all(torch.equal(tensors[key], value) for key, value in fresh.items())
    assert slot.swaps == 2


@pytest.mark.parametrize("name", ["embed_tokens.weight", "q_proj.base_layer.weight", "norm.weight"])
def test_a_base_that_changed_is_loaded_again(folders, name):
    slot = AdapterSlot(lambda: load_model(folders.base))
    bare = logits(slot.model)
    for adapter in ("plain", "plain2"):  # loaded, swapped
        slot.put(*of(folders, adapter))
        assert slot.changed() is None
        slot.put(*of(folders, adapter))
        changed = [k for k, _ in slot.model.named_parameters() if k.endswith(name)][-1]
        slot.model.get_parameter(changed).data[-1] *= -1
        assert slot.changed() == changed.replace(".base_layer", "")
        slot.clear()
        assert torch.equal(logits(slot.model), bare)
    assert slot.reloads == 2
    slot.put(*of(folders, "plain"))
    slot.clear()
    assert slot.reloads == 2


def test_a_load_that_fails_leaves_the_base(folders, monkeypatch):
    slot = AdapterSlot(lambda: load_model(folders.base))
    bare, names = logits(slot.model), dict(slot.model.named_modules())

    def spoil(live, *_, **__):
        live.get_parameter("base_model.model.lm_head.weight").data += 1
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(peft, "set_peft_model_state_dict", spoil)
        with pytest.raises(DataError, match="cannot be put on this model: no"):
            slot.put(*of(folders, "plain"))
    assert slot.reloads == 1
    assert dict(slot.model.named_modules()).keys() == names.keys()
    assert torch.equal(logits(slot.model), bare)


def test_a_base_whose_files_changed_is_not_taken_for_it(folders):
    seeds = iter([0, 1])
    slot = AdapterSlot(lambda: tiny.build(seed=next(seeds)))
    slot.put(*of(folders, "plain"))
    slot.model.lm_head.weight.data += 1
    with pytest.raises(BaseLost, match=r"'model\.embed_tokens\.weight' is another one now"):
        slot.clear()
