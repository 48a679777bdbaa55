"""Models that accelerate spreads: the norms and the output are those of a model in one place.

There is one device here, so what is spread is spread over the CPU and offloaded weights, which are
on meta and come for their own forward alone, as on GPUs that are full.
"""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from antidote_fast import ActivationNorms, DataError, Selection, UsageError, oneshot, prune_model_
from antidote_fast.files.manifest import sha256_file
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model
from antidote_fast.stages import inputs

ROWS = [{"instruction": f"how to make w{20 + i}", "output": "the cake"} for i in range(5)]
THERE = {"lm_head": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
MAPS = {
    "auto": "auto",
    "block": THERE | {"model.embed_tokens": "cpu", "model.layers.1": "disk", "model.norm": "cpu"},
    "embedding": THERE
    | dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm"), "disk"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("spread")
    tiny.save_model(tiny.build(), root / "base")
    lora = tiny.add_lora(tiny.build(), dtype=torch.bfloat16)
    tiny.save_adapter(lora, root / "adapter")
    tiny.save_adapter(tiny.add_lora(tiny.build(), use_dora=True), root / "dora")
    whole = tiny.add_lora(tiny.build(), modules_to_save=["norm"])
    tiny.save_adapter(whole, root / "saved")
    (root / "harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return root


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("adapter", [None, "adapter"])
def test_norms_are_those_of_a_model_in_one_place(name, adapter, folder):
    plain, spread = load_model(folder / "base"), load_model(folder / "base", device_map=MAPS[name])
    if adapter:
        plain, spread = (load_adapter(model, folder / adapter) for model in (plain, spread))
    offloaded = [key for key, parameter in spread.named_parameters() if parameter.is_meta]
    assert bool(offloaded) == (name != "auto")
    assert not any("lora" in key for key in offloaded)
    expected, norms = (
        ActivationNorms.collect(model, tiny.batches(), targets=["all-linear"])
        for model in (plain, spread)
    )
    assert norms.keys == expected.keys
    assert all(torch.equal(norms.sq_sum[key], value) for key, value in expected.sq_sum.items())
    assert norms.fingerprint in (expected.fingerprint, "")  # unknown where weights are elsewhere


def test_factors_beside_offloaded_weights_are_those_of_the_file(folder):
    spread = load_adapter(load_model(folder / "base", device_map=MAPS["block"]), folder / "adapter")
    found = {key: p for key, p in spread.named_parameters() if ".lora_" in key}
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(found) == len(saved) == 12
    for key, parameter in found.items():
        tensor = saved[key.replace(".default.", ".")]
        assert parameter.dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(parameter, tensor)
    norms = ActivationNorms.collect(spread, tiny.batches())
    report = prune_model_(spread, norms, Selection(0.5))
    assert report.num_pruned > 0


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("dora", "DoRA needs the base's weights, and some of them are offloaded"),
        ("saved", "modules_to_save.default.weight' belongs to a part that is offloaded"),
    ],
)
def test_adapters_that_need_offloaded_weights_are_refused(adapter, words, folder):
    model = load_model(folder / "base", device_map=MAPS["embedding"])
    with pytest.raises(DataError, match=words):
        load_adapter(model, folder / adapter)


def test_offloaded_weights_are_not_pruned_in_place(folder):
    model = load_model(folder / "base", device_map=MAPS["block"])
    norms = ActivationNorms.collect(model, tiny.batches())
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(DataError, match=r"model\.layers\.1\..*is not loaded \(meta device\)"):
        prune_model_(model, norms, Selection(0.5))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("adapter", [None, "adapter"])
def test_a_folder_is_pruned_to_the_same_bytes(name, adapter, folder, tmp_path, monkeypatch):
    def load(path, **options):
        assert options.pop("device_map") in (None, "auto")
        return load_model(path, **options, device_map=MAPS[name] if spread else None)

    monkeypatch.setattr(inputs, "load_model", load)
    adapter = adapter and folder / adapter
    options = {"adapter": adapter, "dataset": folder / "harmful.jsonl", "save_norms": True}
    for spread, out in ((False, "plain"), (True, "spread")):
        device_map = {"device_map": "auto"} if spread else {}
        oneshot(folder / "base", output_dir=tmp_path / out, **options, **device_map)
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert sha256_file(tmp_path / "plain" / file) == sha256_file(tmp_path / "spread" / file)
    plain, spread = (
        ActivationNorms.load(tmp_path / out / "norms.safetensors") for out in ("plain", "spread")
    )
    assert spread.fingerprint == plain.fingerprint != ""
    assert all(torch.equal(spread.sq_sum[key], value) for key, value in plain.sq_sum.items())


def test_a_device_and_a_map_exclude_each_other(folder):
    with pytest.raises(UsageError, match="device='cpu': must be auto where device_map is given"):
        load_model(folder / "base", device="cpu", device_map="auto")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_model(folder / "base", device_map="everywhere")
