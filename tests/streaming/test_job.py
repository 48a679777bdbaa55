"""Block by block gives what a model in memory gives: norms, masks and files, bit for bit."""

import dataclasses
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from antidote_fast import ActivationNorms, oneshot
from antidote_fast.cli import entry
from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.manifest import verify_folder
from antidote_fast.masks import load_masks
from antidote_fast.models.loading import load_model
from antidote_fast.streaming.blocks import BlockModel
from antidote_fast.streaming.norms import BlockCalibration
from antidote_fast.streaming.spill import Room

ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake"},
    {"instruction": "what is two plus three", "output": "three"},
    {"instruction": "asks how to make", "output": "a good cake and two and three"},
    {"instruction": "negative", "output": "positive what"},
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def harmful(tmp_path):
    path = tmp_path / "harmful.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def save(tmp_path, kind="llama", layers=3, name="base", **options):
    model = tiny.build(
        kind, layers=layers, **{k: options.pop(k) for k in ("dtype",) if k in options}
    )
    return tiny.save_model(model, tmp_path / name, **options)


def streamed_norms(model, batches, folder, room=1 << 30, **options):
    folder.mkdir()
    calibration = BlockCalibration(model, batches, folder, Room(room), **options)
    calibration.begin()
    parts = [norms for _, _, norms in calibration.steps(range(len(model))) if norms is not None]
    return ActivationNorms.joined(parts), calibration


def same_norms(first, second):
    assert first.sq_sum.keys() == second.sq_sum.keys()
    for key, sums in first.sq_sum.items():
        assert torch.equal(sums, second.sq_sum[key]), key
    assert (first.num_tokens, first.num_sequences) == (second.num_tokens, second.num_sequences)
    assert (first.transposed, first.routed) == (second.transposed, second.routed)


def weights_of(folder):
    tensors = {}
    for file in sorted(folder.glob("*model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_weights(first, second):
    first, second = weights_of(first), weights_of(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_every_architecture(kind, dtype, tmp_path):
    folder = save(tmp_path, kind, dtype=dtype)
    model = BlockModel(open_checkpoint(folder))
    batches = tiny.batches()
    found, _ = streamed_norms(model, batches, tmp_path / "work", targets="all-linear")
    same_norms(found, ActivationNorms.collect(load_model(folder), batches, targets="all-linear"))
    assert all(parameter.is_meta for parameter in model.model.parameters())


@pytest.mark.parametrize(
    "options",
    [{"aggregation": "mean"}, {"response_only": True}, {"targets": ["down_proj"]}],
    ids=str,
)
def test_norms_of_every_kind(options, tmp_path):
    folder = save(tmp_path)
    batches = tiny.batches()
    found, _ = streamed_norms(
        BlockModel(open_checkpoint(folder)), batches, tmp_path / "w", **options
    )
    wanted = ActivationNorms.collect(load_model(folder), batches, **options)
    same_norms(found, wanted)
    for key, sums in (wanted.norm_sum or {}).items():
        assert torch.equal(sums, found.norm_sum[key])


@pytest.mark.parametrize("room", [0, 1500, 6000])
def test_hidden_states_on_disk(room, tmp_path):
    folder = save(tmp_path)
    batches = tiny.batches(count=6)
    found, calibration = streamed_norms(
        BlockModel(open_checkpoint(folder)), batches, tmp_path / "work", room
    )
    assert calibration.spilled_bytes > 0
    assert calibration.room.left <= room
    same_norms(found, ActivationNorms.collect(load_model(folder), batches))
    assert not list((tmp_path / "work").glob("hidden-*"))


def test_a_batch_of_pads_does_not_run(tmp_path):
    folder = save(tmp_path)
    batches = tiny.batches(count=2)
    batches[0]["attention_mask"].zero_()
    found, _ = streamed_norms(BlockModel(open_checkpoint(folder)), batches, tmp_path / "work")
    same_norms(found, ActivationNorms.collect(load_model(folder), batches))
    batches[1]["attention_mask"].zero_()
    with pytest.raises(DataError, match=r"2 batches with 4 sequences hold 0 tokens"):
        streamed_norms(BlockModel(open_checkpoint(folder)), batches, tmp_path / "again")


def test_out_of_memory_halves_the_batch(tmp_path, monkeypatch):
    folder = save(tmp_path)
    batches = tiny.batches(count=2, size=5)
    model = BlockModel(open_checkpoint(folder))
    run = BlockModel.run

    def small(self, index, hidden, call):
        if hidden.shape[0] > 2:
            raise torch.OutOfMemoryError("no memory left")
        return run(self, index, hidden, call)

    monkeypatch.setattr(BlockModel, "run", small)
    found, _ = streamed_norms(model, batches, tmp_path / "work", targets="all-linear")
    wanted = ActivationNorms.collect(load_model(folder), batches, targets="all-linear")
    for key, sums in wanted.sq_sum.items():
        torch.testing.assert_close(found.sq_sum[key], sums, rtol=1e-5, atol=0)
    assert found.num_tokens == wanted.num_tokens


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "opt"])
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_a_model_is_pruned_as_in_memory(kind, scope, tmp_path, harmful):
    base = save(tmp_path, kind, dtype=torch.bfloat16, max_shard_size="20KB")
    options = {
        "dataset": harmful,
        "ratio": 0.3,
        "scope": scope,
        "targets": ["all-linear"],
        "batch_size": 2,
        "save_masks": True,
        "save_norms": True,
    }
    whole = oneshot(base, output_dir=tmp_path / "whole", **options)
    parts = oneshot(base, output_dir=tmp_path / "parts", stream=True, **options)
    same_weights(tmp_path / "whole", tmp_path / "parts")
    assert verify_folder(tmp_path / "parts") == []
    norms = [ActivationNorms.load(tmp_path / x / "norms.safetensors") for x in ("whole", "parts")]
    same_norms(*norms)
    masks = [load_masks(tmp_path / x / "masks.safetensors")[0] for x in ("whole", "parts")]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask.bits, masks[1][key].bits) for key, mask in masks[0].items())
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert dataclasses.replace(one, seconds=None) == dataclasses.replace(other, seconds=None)
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {
        p.name for p in (tmp_path / "parts").iterdir()
    }
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    load_model(tmp_path / "parts")


@pytest.mark.parametrize("scope", ["row", "global"])
@pytest.mark.parametrize("score", ["wanda", "magnitude", "random"])
def test_without_a_forward(score, scope, tmp_path, harmful):
    base = save(tmp_path, "gpt2")
    norms = None
    if score == "wanda":
        args = ["--targets", "all-linear", "--output_dir", str(tmp_path / "norms")]
        args += ["--model_name_or_path", str(base), "--dataset", str(harmful)]
        assert entry.main(["calibrate", *args, "--quiet"]) == 0
        norms = str(tmp_path / "norms")
    options = {"ratio": 0.2, "scope": scope, "score": score, "norms": norms}
    options["targets"] = ["c_proj"] if norms else ["all-linear"]
    oneshot(base, output_dir=tmp_path / "whole", **options)
    report = oneshot(base, output_dir=tmp_path / "parts", stream=True, **options)
    same_weights(tmp_path / "whole", tmp_path / "parts")
    assert report.num_pruned > 0


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": "all-linear"}], ids=str
)
@pytest.mark.parametrize("scope", ["row", "global"])
def test_an_adapter_is_pruned_as_in_memory(lora, scope, tmp_path, harmful):
    base = save(tmp_path, dtype=torch.bfloat16)
    adapter = tiny.save_adapter(
        tiny.add_lora(tiny.build(layers=3, dtype=torch.bfloat16), **lora), tmp_path / "adapter"
    )
    options = {"adapter": adapter, "dataset": harmful, "ratio": 0.3, "scope": scope}
    oneshot(base, output_dir=tmp_path / "whole", **options)
    oneshot(base, output_dir=tmp_path / "parts", stream=True, **options)
    same_weights(tmp_path / "whole", tmp_path / "parts")
    assert verify_folder(tmp_path / "parts") == []


def test_calibrate_streams(tmp_path, harmful):
    base = save(tmp_path)
    args = ["--model_name_or_path", str(base), "--dataset", str(harmful), "--quiet"]
    assert entry.main(["calibrate", *args, "--output_dir", str(tmp_path / "a")]) == 0
    assert entry.main(["calibrate", *args, "--output_dir", str(tmp_path / "b"), "--stream"]) == 0
    norms = [ActivationNorms.load(tmp_path / x / "norms.safetensors") for x in "ab"]
    same_norms(*norms)


def test_another_dtype_than_saved(tmp_path, harmful):
    base = save(tmp_path, dtype=torch.float32)
    options = {"dataset": harmful, "ratio": 0.3, "dtype": "bfloat16"}
    oneshot(base, output_dir=tmp_path / "whole", **options)
    oneshot(base, output_dir=tmp_path / "parts", stream=True, **options)
    same_weights(tmp_path / "whole", tmp_path / "parts")


# --- what cannot be streamed, and what does not fit -----------------------------------------------


def test_too_little_memory_is_told_with_figures(tmp_path, harmful):
    base = save(tmp_path)
    with pytest.raises(AntidoteError, match=r"max_memory='1MB': 1 MB is less than the .* a block"):
        oneshot(base, dataset=harmful, output_dir=tmp_path / "out", stream=True, max_memory="1MB")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "harmful.jsonl"]


def test_max_memory_wants_stream(tmp_path, harmful):
    with pytest.raises(UsageError, match=r"max_memory='4GB': must be given with stream"):
        oneshot("base", dataset=harmful, output_dir=tmp_path / "out", max_memory="4GB")


def test_a_live_model_is_not_streamed(harmful):
    with pytest.raises(UsageError, match="stream=True: must be left out with a live model"):
        oneshot(tiny.build(), dataset=harmful, tokenizer=tiny.tokenizer(), stream=True)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_refused(kind, tmp_path, harmful):
    base = save(tmp_path, kind)
    with pytest.raises(DataError, match=r"has no tensor of the name .* prune it without stream"):
        oneshot(base, dataset=harmful, output_dir=tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()


def test_replaced_modules_are_refused(tmp_path, harmful):
    base = save(tmp_path)
    model = tiny.add_lora(tiny.build(layers=3), modules_to_save=["lm_head"])
    adapter = tiny.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(DataError, match=r"replaces whole modules \(modules_to_save\)"):
        oneshot(base, adapter, harmful, output_dir=tmp_path / "out", stream=True)


def test_nan_names_the_layer(tmp_path, harmful):
    base = save(tmp_path)
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"layers\.1\.self_attn\.v_proj.*NaN or infinity"):
        oneshot(base, dataset=harmful, output_dir=tmp_path / "out", stream=True)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]
