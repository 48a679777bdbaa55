"""Fingerprints, and checkpoints written byte for byte where nothing was pruned."""

import shutil

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files import pruned_copy as ck
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.commit import output_folder
from antidote_fast.files.fingerprint import fingerprint_model
from antidote_fast.files.manifest import verify_folder
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import check_not_quantized, load_model
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.prune import prune_model_, prune_state_
from antidote_fast.selection import Selection


def data_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", [*tiny.KINDS, "mixtral", "qwen3_moe"])
def test_fingerprint_of_folder_and_model_agree(kind, tmp_path):
    model = tiny.build(kind)
    tiny.save_model(model, tmp_path / "m", max_shard_size="20KB")
    expected = open_checkpoint(tmp_path / "m").fingerprint()
    assert len(expected) == 32
    assert fingerprint_model(model) == expected
    assert fingerprint_model(tiny.add_lora(model, modules_to_save=["o_proj"])) == expected
    for dtype in ("bfloat16", "float32"):
        assert fingerprint_model(load_model(tmp_path / "m", dtype=dtype)) == expected
    assert fingerprint_model(tiny.build(kind, seed=1)) != expected


def test_fingerprint_of_half_precision_files(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        tiny.save_model(tiny.build(dtype=dtype), tmp_path / str(dtype))
        expected = open_checkpoint(tmp_path / str(dtype)).fingerprint()
        for loaded in ("float32", "bfloat16", "auto"):
            model = load_model(tmp_path / str(dtype), dtype=loaded)
            assert fingerprint_model(model) == expected


def test_fingerprint_unknown():
    assert fingerprint_model(torch.nn.Linear(2, 2)) == ""
    assert fingerprint_model(tiny.build().to("meta")) == ""
    model = tiny.build()
    packed = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.q_proj.weight = packed
    assert fingerprint_model(model) == ""


def test_fingerprint_changes_with_the_merged_adapter():
    model = tiny.build()
    merged = tiny.add_lora(tiny.build()).merge_and_unload()
    assert fingerprint_model(merged) != fingerprint_model(model)


@pytest.mark.parametrize("name", ["model", "sharded", "gpt2"])
def test_write_pruned_model(folders, tmp_path, name):
    source = folders / name
    model = load_model(source)
    norms = ActivationNorms.collect(model, tiny.batches())
    prune_model_(model, norms, Selection(0.25))
    tensors = open_checkpoint(source).read(norms.keys)
    prune_state_(tensors, norms, Selection(0.25))
    with output_folder(tmp_path / "out") as staged:
        ck.write_pruned(open_checkpoint(source), staged, tensors)
    out = tmp_path / "out"
    assert verify_folder(out) == []
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert set(before.tensors) == set(after.tensors)
    for key in set(before.tensors) - set(tensors):
        assert torch.equal(before.read([key])[key], after.read([key])[key])
    # Bytes outside of the pruned tensors are the source's own.
    old, new = data_of(source), data_of(out)
    assert set(new) == set(old) | {"COMPLETE.json"}
    for file, data in old.items():
        spans = [
            (e.start, e.end)
            for k, e in before.tensors.items()
            if k in tensors and e.file.name == file
        ]
        changed = {i for i, (a, b) in enumerate(zip(data, new[file], strict=True)) if a != b}
        assert len(data) == len(new[file])
        assert all(any(s <= i < e for s, e in spans) for i in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_write_pruned_adapter(folders, tmp_path, dtype):
    tiny.save_adapter(tiny.add_lora(tiny.build(), dtype=dtype), tmp_path / "in")
    source = open_checkpoint(tmp_path / "in")
    model = load_adapter(load_model(folders / "model"), source)
    norms = ActivationNorms.collect(model, tiny.batches())
    norms.save(tmp_path / "norms.safetensors")
    # From here on no model is there.
    norms = ActivationNorms.load(tmp_path / "norms.safetensors")
    assert norms.fingerprint == open_checkpoint(folders / "model").fingerprint()
    tensors = source.read(norms.keys)
    report = prune_state_(tensors, norms, Selection(0.25))
    assert len(report.layers) == 12
    with output_folder(tmp_path / "out") as staged:
        ck.write_pruned(source, staged, tensors)
    prune_model_(model, norms, Selection(0.25))
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "model")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False)
    live = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for key, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert value.dtype == dtype
        assert torch.equal(value, live[key])
        assert (value == 0).sum() >= value.numel() // 5
    for key, value in peft.get_peft_model_state_dict(loaded, save_embedding_layers=False).items():
        torch.testing.assert_close(value, live[key].to(value.dtype), rtol=0, atol=0)
    old, new = data_of(tmp_path / "in"), data_of(tmp_path / "out")
    assert new["adapter_config.json"] == old["adapter_config.json"]


def test_write_pruned_refuses(folders, tmp_path, monkeypatch):
    source = folders / "model"
    key = "model.layers.0.self_attn.q_proj.weight"
    tmp_path = tmp_path / "out"
    tmp_path.mkdir()
    for tensors, match in (
        ({"nonesuch": torch.ones(1)}, "has no tensor 'nonesuch'"),
        ({key: torch.ones(2, 2)}, r"is torch.float32 \(32, 32\) on disk"),
        ({key: torch.ones(32, 32, dtype=torch.bfloat16)}, r"not torch\.bfloat16"),
    ):
        with pytest.raises(DataError, match=match):
            ck.write_pruned(open_checkpoint(source), tmp_path, tensors)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(AntidoteError, match="GB needed"):
        ck.write_pruned(open_checkpoint(source), tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_only_known_files_are_copied(copy_of, tmp_path):
    folder = copy_of("adapter")
    for name in ("optimizer.pt", "evil.py", "report.json", "COMPLETE.json", "LICENSE", "x.bin"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-1").mkdir()
    with output_folder(tmp_path / "out") as staged:
        ck.write_pruned(open_checkpoint(folder), staged, {})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "COMPLETE.json",
        "LICENSE",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_prefix_left_out_of_the_file(copy_of):
    """GPT-2 on the hub has h.0..., the live model transformer.h.0...."""
    folder = copy_of("gpt2")
    path = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model = load_model(folder)
    checkpoint = open_checkpoint(folder)
    assert fingerprint_model(model) == checkpoint.fingerprint()
    norms = ActivationNorms.collect(model, tiny.batches())
    read = checkpoint.read(norms.keys)
    assert list(read) == norms.keys
    assert torch.equal(read[norms.keys[0]], model.get_parameter(norms.keys[0]))
    assert (
        checkpoint.find("wte.weight") == checkpoint.find("transformer.wte.weight") == "wte.weight"
    )


def test_read_by_name(folders):
    model = open_checkpoint(folders / "model")
    assert list(model.read(["model.norm.weight"])) == ["model.norm.weight"]
    with pytest.raises(DataError, match="has no tensor 'x'"):
        model.read(["x"])


def test_a_quantised_model_is_refused(copy_of):
    folder = copy_of("model")
    change = {"quantization_config": {"quant_method": "gptq"}}
    tiny.edit_json(folder / "config.json", lambda c: c.update(change))
    with pytest.raises(DataError, match=r"is quantised \(gptq\)"):
        check_not_quantized(open_checkpoint(folder))
