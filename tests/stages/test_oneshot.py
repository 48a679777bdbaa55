"""Calibrate and prune from folder to folder and on live models: values, files and reports."""

import json
import re
import types

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

from antidote_fast import (
    ActivationNorms,
    DataError,
    NothingPruned,
    PruneConfig,
    UsageError,
    load_masks,
    num_pruned,
    oneshot,
)
from antidote_fast.cli import entry
from antidote_fast.config.prune import CalibrateConfig
from antidote_fast.data.records import Record
from antidote_fast.files.manifest import read_manifest, sha256_file, verify_folder
from antidote_fast.selection import Selection
from antidote_fast.stages import calibrate, inputs

ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake and a negative user"},
    {"instruction": "what is two plus three", "input": "three", "output": "positive"},
    {"instruction": "the user asks", "output": "w40 w41 w42 w43 w44 w45 w46 w47 w48"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, an adapter on it, harmful data, and a GPT-2, as a user's folders would be."""
    root = tmp_path_factory.mktemp("models")
    base = tiny.build()
    tiny.save_model(base, root / "base")
    tiny.save_adapter(tiny.add_lora(base), root / "adapter")
    tiny.save_model(tiny.build("gpt2"), root / "gpt2")
    (root / "harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return types.SimpleNamespace(
        base=root / "base",
        adapter=root / "adapter",
        gpt2=root / "gpt2",
        harmful=root / "harmful.jsonl",
    )


def run(folders, out, **options):
    fields = {"dataset": folders.harmful, "adapter": folders.adapter, **options}
    return oneshot(folders.base, output_dir=out, **fields)


def weights(folder):
    [file] = folder.glob("*model.safetensors")
    return load_file(file)


def expected_mask(weight, norm, ratio):
    """Row scope, from first principles: a stable sort's last k of each row."""
    score = (weight.float() * norm).abs()
    k = num_pruned(weight.shape[1], Selection(ratio))
    order = torch.sort(score, dim=1, stable=True).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order[:, -k:], True)


# --- folders --------------------------------------------------------------------------------------


def test_adapter_in_adapter_out(folders, tmp_path):
    out = tmp_path / "out"
    report = run(folders, out, ratio=0.3, save_norms=True)
    before, after = weights(folders.adapter), weights(out)
    norms = ActivationNorms.load(out / "norms.safetensors")
    assert list(before) == list(after)
    for key, old in before.items():
        mask = expected_mask(old, norms.sq_sum[key].sqrt(), 0.3)
        assert torch.equal(after[key], torch.where(mask, 0.0, old)), key
    removed = sum(int((after[key] == 0).sum()) for key in after)
    assert report.num_pruned == removed
    assert [layer.key for layer in report.layers] == sorted(before)

    model = peft.PeftModel.from_pretrained(tiny.build(), out)
    state = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(state[key], after[key]) for key in after)
    old_config, new_config = (
        json.loads((f / "adapter_config.json").read_text()) for f in (folders.adapter, out)
    )
    assert old_config == new_config
    assert verify_folder(out) == []
    assert read_manifest(out)["base_fingerprint"] == norms.fingerprint


def test_full_model_in_full_model_out(folders, tmp_path):
    report = run(folders, tmp_path / "out", adapter=None, ratio=0.25)
    before, after = weights(folders.base), weights(tmp_path / "out")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "qkv"}
    assert changed == {layer.key for layer in report.layers}
    for key in changed:
        zeros = after[key] == 0
        assert torch.equal(zeros.sum(1), torch.full((len(zeros),), 8))
        assert torch.equal(after[key][~zeros], before[key][~zeros])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert all(torch.equal(state[key], after[key]) for key in changed)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("score", ["wanda", "magnitude", "random"])
def test_conv1d_is_pruned_along_its_inputs(score, folders, tmp_path):
    oneshot(folders.gpt2, dataset=folders.harmful, output_dir=tmp_path / "out", score=score)
    before, after = weights(folders.gpt2), weights(tmp_path / "out")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert [key.split(".")[-3:] for key in changed] == [["attn", "c_attn", "weight"]] * 2
    for key in changed:  # (in, out) as saved: a fixed count of each output's inputs
        k = num_pruned(32, Selection(0.1))
        assert torch.equal((after[key] == 0).sum(0), torch.full((96,), k))


def test_saved_norms_need_no_model_and_give_the_same(folders, tmp_path, monkeypatch):
    run(folders, tmp_path / "a", ratio=0.2, save_norms=True)
    run(folders, tmp_path / "b", ratio=0.5, scope="tensor")
    norms = tmp_path / "a" / "norms.safetensors"

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("load_model", "load_adapter"):
        monkeypatch.setattr(inputs, name, refuse)
    monkeypatch.setattr(inputs, "load_tokenizer", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    run(folders, tmp_path / "c", dataset=None, norms=norms, ratio=0.2)
    run(folders, tmp_path / "d", dataset=None, norms=tmp_path / "a", ratio=0.5, scope="tensor")
    run(folders, tmp_path / "e", dataset=None, norms=ActivationNorms.load(norms), ratio=0.2)
    for new, old in (("c", "a"), ("d", "b"), ("e", "a")):
        assert sha256_file(tmp_path / new / "adapter_model.safetensors") == sha256_file(
            tmp_path / old / "adapter_model.safetensors"
        )


def test_calibrate_once_then_prune_part_of_it(folders, tmp_path):
    common = {"model_name_or_path": str(folders.base), "dataset": str(folders.harmful)}
    config = CalibrateConfig(
        **common, output_dir=str(tmp_path / "norms"), targets=["all-linear"], response_only=True
    )
    result = calibrate.run(config)
    norms = ActivationNorms.load(tmp_path / "norms" / "norms.safetensors")
    assert len(norms.keys) == 2 * 7
    assert norms.response_only
    tokenizer = tiny.tokenizer()
    tokens = sum(len(tokenizer(row["output"])["input_ids"]) + 1 for row in ROWS)
    assert result["num_tokens"] == norms.num_tokens == tokens
    assert result["num_sequences"] == 3
    report = oneshot(
        folders.base,
        norms=tmp_path / "norms",
        targets=["up_proj"],
        ignore=["re:.*layers.0"],
        output_dir=tmp_path / "out",
    )
    assert [layer.key for layer in report.layers] == ["model.layers.1.mlp.up_proj.weight"]


def test_masks_are_the_zeros_and_lead_from_old_to_new(folders, tmp_path):
    report = run(folders, tmp_path / "out", ratio=0.4, scope="global", save_masks=True)
    masks, metadata = load_masks(tmp_path / "out" / "masks.safetensors")
    before, after = weights(folders.adapter), weights(tmp_path / "out")
    assert metadata["scope"] == "global"
    for key, mask in masks.items():
        assert torch.equal(mask.to_bool(), (after[key] == 0) & (before[key] != 0))
        assert mask == report.masks[key]
    total = sum(t.numel() for t in before.values())
    assert sum(mask.count() for mask in masks.values()) == num_pruned(total, Selection(0.4))


def test_random_depends_on_the_seed_alone(folders, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(folders, tmp_path / name, dataset=None, score="random", seed=seed, ratio=0.3)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_magnitude_needs_no_data(folders, tmp_path):
    run(folders, tmp_path / "out", dataset=None, score="magnitude", ratio=0.3)
    before, after = weights(folders.adapter), weights(tmp_path / "out")
    for key, old in before.items():
        mask = expected_mask(old, torch.ones(old.shape[1]), 0.3)
        assert torch.equal(after[key], torch.where(mask, 0.0, old))


def test_report_and_card(folders, tmp_path):
    out = tmp_path / "out"
    run(folders, out, ratio=0.3, backend="reference")
    report = json.loads((out / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["stage"] == "prune"
    assert report["config"]["ratio"] == report["requested"] == 0.3
    assert (report["backend"], report["backend_reason"]) == ("reference", "backend=reference")
    assert report["inputs"][str(folders.harmful)] == sha256_file(folders.harmful)
    adapter = folders.adapter / "adapter_model.safetensors"
    assert report["inputs"][str(adapter)] == sha256_file(adapter)
    assert report["num_records"] == report["num_sequences"] == 3
    after = weights(out)
    assert report["num_pruned"] == sum(int((w == 0).sum()) for w in after.values())
    for layer in report["layers"]:
        rows, columns = layer["shape"]
        zeros = int((after[layer["key"]] == 0).sum())
        assert layer["k"] == num_pruned(columns, Selection(0.3))
        assert layer["achieved"] == zeros / (rows * columns)
        assert layer["threshold"] > 0
        assert layer["zero_norm_channels"] == 0
    card = (out / "README.md").read_text()
    assert re.search(r"^library_name: peft$", card, re.MULTILINE)
    assert f"{report['num_pruned']:,} of {report['num_weights']:,}" in card
    everything = card + json.dumps(report)
    assert not any(row["output"] in everything for row in ROWS)  # no harmful text
    assert str(folders.base) not in card


def test_the_report_tells_why_a_backend_ran(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTIDOTE_BACKEND", "reference")
    run(folders, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["backend"], report["backend_reason"]) == (
        "reference",
        "ANTIDOTE_BACKEND=reference",
    )
    monkeypatch.delenv("ANTIDOTE_BACKEND")
    run(folders, tmp_path / "out2")
    report = json.loads((tmp_path / "out2" / "report.json").read_text())
    assert report["backend_reason"] == "first that is available for cpu tensors"


def test_the_licence_of_an_earlier_card_is_kept(folders, tmp_path):
    source = tmp_path / "adapter"
    tiny.save_adapter(tiny.add_lora(tiny.build()), source)
    (source / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\nold\n")
    run(folders, tmp_path / "out", adapter=source)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    (source / "README.md").write_text("---\nlicense: [mit\n---\nold\n")  # broken YAML
    run(folders, tmp_path / "out2", adapter=source)
    assert "license" not in (tmp_path / "out2" / "README.md").read_text()


def test_overwrite_replaces_what_this_tool_wrote(folders, tmp_path):
    out = tmp_path / "out"
    run(folders, out, ratio=0.1)
    with pytest.raises(DataError, match="exists and is not empty"):
        run(folders, out, ratio=0.5)
    run(folders, out, ratio=0.5, overwrite=True)
    assert json.loads((out / "report.json").read_text())["ratio"] == 0.5


def test_bfloat16_files_stay_bfloat16(folders, tmp_path):
    source = tmp_path / "adapter"
    tiny.save_adapter(tiny.add_lora(tiny.build(), dtype=torch.bfloat16), source)
    run(folders, tmp_path / "out", adapter=source, ratio=0.2)
    before, after = weights(source), weights(tmp_path / "out")
    for key, old in before.items():
        assert after[key].dtype == torch.bfloat16
        kept = after[key] != 0
        assert torch.equal(after[key][kept], old[kept])


# --- live models ----------------------------------------------------------------------------------


def test_live_adapter_equals_its_folder(folders, tmp_path):
    run(folders, tmp_path / "out", ratio=0.3)
    model = tiny.add_lora(tiny.build())
    report = oneshot(model, dataset=ROWS, tokenizer=tiny.tokenizer(), ratio=0.3)
    state = peft.get_peft_model_state_dict(model)
    for key, value in weights(tmp_path / "out").items():
        assert torch.equal(state[key], value), key
    assert report.coverage["targeted"] == report.coverage["total"]


def test_live_base_with_adapter_folder_is_written(folders, tmp_path):
    run(folders, tmp_path / "a", ratio=0.3)
    records = [Record(**row) for row in ROWS]
    oneshot(
        tiny.build(),
        adapter=folders.adapter,
        dataset=records,
        tokenizer=tiny.tokenizer(),
        output_dir=tmp_path / "b",
        ratio=0.3,
        save_norms=True,
        save_masks=True,
    )
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert verify_folder(tmp_path / "b") == []
    assert {"norms.safetensors", "masks.safetensors", "report.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "b").iterdir()
    }
    assert read_manifest(tmp_path / "b")["base_fingerprint"]
    peft.PeftModel.from_pretrained(tiny.build(), tmp_path / "b")


def test_live_adapter_of_another_name_is_written_flat(folders, tmp_path):
    base = tiny.build()
    model = peft.PeftModel.from_pretrained(base, folders.adapter, adapter_name="attacked")
    oneshot(model, score="magnitude", output_dir=tmp_path / "out", ratio=0.3)
    run(folders, tmp_path / "other", dataset=None, score="magnitude", ratio=0.3)
    a, b = weights(tmp_path / "out"), weights(tmp_path / "other")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_live_full_model_is_written(folders, tmp_path):
    run(folders, tmp_path / "a", adapter=None, ratio=0.2)
    model = tiny.build()
    config = {"ratio": 0.9, "dataset": str(folders.harmful)}
    oneshot(model, config=config, tokenizer=tiny.tokenizer(), output_dir=tmp_path / "b", ratio=0.2)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in b)
    state = model.state_dict()
    assert all(torch.equal(state[key], b[key]) for key in b)


def test_live_with_norms_needs_no_tokenizer(folders, tmp_path):
    run(folders, tmp_path / "a", ratio=0.3, save_norms=True)
    for norms in (
        tmp_path / "a",
        ActivationNorms.load(tmp_path / "a" / "norms.safetensors"),
    ):
        model = tiny.add_lora(tiny.build())
        oneshot(model, norms=norms, ratio=0.3)
        state = peft.get_peft_model_state_dict(model)
        assert all(torch.equal(state[k], v) for k, v in weights(tmp_path / "a").items())


def test_overrides_win_over_the_config(folders, tmp_path):
    config = PruneConfig(
        model_name_or_path="elsewhere",
        output_dir=str(tmp_path / "never"),
        dataset=str(folders.harmful),
        ratio=0.9,
        adapter=str(folders.adapter),
    )
    report = oneshot(folders.base, config=config, output_dir=tmp_path / "out", ratio=0.1)
    assert report.ratio == 0.1
    assert not (tmp_path / "never").exists()
    report = oneshot(folders.base, config=config)
    assert report.ratio == 0.9
    assert (tmp_path / "never" / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"output_dir": None}, UsageError, "output_dir=None: must be a folder"),
        ({"ratoi": 0.1}, UsageError, "unexpected keyword argument 'ratoi'"),
        ({"ratio": 2}, UsageError, "ratio=2: must be in"),
        ({"config": 7}, UsageError, "config=7: must be a PruneConfig"),
        ({"dataset": []}, DataError, "dataset: no records"),
        ({"dataset": ["text"]}, DataError, "dataset: record 1: must be a Record or a dict"),
        ({"dataset": [{"instruction": "x"}]}, DataError, "record 1: column 'output' is missing"),
        ({"dataset": None}, UsageError, "dataset=None: must be a file or hub name"),
        ({"backend": "cuda?"}, UsageError, "backend='cuda?': must be one of"),
        ({"targets": ["nothing_like_it"]}, NothingPruned, "nothing to prune"),
        ({"device": "tpu9"}, UsageError, "device='tpu9': cannot be used"),
    ],
)
def test_refusals_leave_nothing(options, error, says, folders, tmp_path):
    with pytest.raises(error, match=re.escape(says)):
        run(folders, **{"out": tmp_path / "out", **_renamed(options)})
    assert list(tmp_path.iterdir()) == []


def _renamed(options):
    return {("out" if name == "output_dir" else name): v for name, v in options.items()}


def test_a_live_model_needs_its_tokenizer():
    with pytest.raises(UsageError, match="tokenizer=None: must be the tokenizer"):
        oneshot(tiny.build(), dataset=ROWS)


def test_sequences_longer_than_the_model_are_refused(folders, tmp_path):
    rows = [{"instruction": "x", "output": "good cake " * 60}]
    with pytest.raises(UsageError, match="max_seq_length=512: must be at most 64"):
        run(folders, tmp_path / "out", dataset=rows)
    run(folders, tmp_path / "out", dataset=rows, max_seq_length=64)


def test_data_longer_than_asked_for_is_cut(folders, tmp_path):
    run(folders, tmp_path / "out", num_calibration_samples=2)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_records"] == 2
    run(folders, tmp_path / "out2", dataset=ROWS, num_calibration_samples=1)
    assert json.loads((tmp_path / "out2" / "report.json").read_text())["num_records"] == 1


# --- by the command line --------------------------------------------------------------------------


def test_commands_end_to_end(folders, tmp_path, capsys):
    common = ["--model_name_or_path", str(folders.base), "--adapter", str(folders.adapter)]
    data = ["--dataset", str(folders.harmful)]
    assert entry.main(["calibrate", *common, *data, "--output_dir", str(tmp_path / "norms")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("norms over 3 sequences, ")
    steps = [json.loads(line) for line in captured.err.splitlines() if line.startswith("{")]
    assert [(step["step"], step["done"]) for step in steps] == [("calibrate", 1)]
    norms = ["--norms", str(tmp_path / "norms"), "--paper"]
    out = ["--output_dir", str(tmp_path / "out"), "--save_masks"]
    assert entry.main(["prune", *common, *norms, *out, "--ratio", "0.3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("removed 496 of 1,280 weights (38.75%) in 12 layers in ")
    steps = [json.loads(line)["step"] for line in captured.err.splitlines()]
    assert steps == ["read", "prune", "write", "hash"]  # no model was loaded
    assert entry.main(["inspect", str(tmp_path / "norms"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["norms.safetensors"]
    assert found["num_sequences"] == "3"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert found["norms"][key] == "32 channels, 0 zero"
    assert entry.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["weights"], found["stage"]) == ("adapter", 1280, "prune")
    assert found["tensors"][key] == "[4, 32] float32"
    assert found["masks.safetensors"]["removed"] == "496 of 1280"
    assert entry.main(["inspect", str(folders.base)]) == 0
    assert "kind     model" in capsys.readouterr().out
