"""What a config of others may ask for: ranks, counts, patterns, nesting; refused at once."""

import gc
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

from antidote_fast.cli.entry import main
from antidote_fast.errors import DataError
from antidote_fast.files import checkpoint
from antidote_fast.files.bounds import bounded
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.models import patterns
from antidote_fast.models.adapter_config import MAX_RANK
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.loading import load_model, without_weights

ROOT = Path(__file__).parents[2]


EVIL = "(?:[^X]|[^Y])" * 28 + "Z"
FIELDS = {
    "rank_pattern": {EVIL: 4},
    "alpha_pattern": {EVIL: 8},
    "target_modules": EVIL,
    "exclude_modules": EVIL,
    "modules_to_save": [EVIL],
    "layers_pattern": [EVIL],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_pattern_that_backtracks_reaches_nobody(copy_of, folders, name, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    folder = copy_of("adapter")
    change = {name: FIELDS[name]}
    if name == "layers_pattern":
        change["layers_to_transform"] = [0]
    tiny.edit_json(folder / "adapter_config.json", lambda c: c.update(change))
    says = rf"{name}: '\(\?:.*" + (
        "is not a module's name" if name == "modules_to_save" else r"takes over 0\.1 s"
    )
    with pytest.raises(DataError, match=says) as refused:
        load_adapter(tiny.build(), folder)
    assert len(str(refused.value)) < len(str(folder)) + 220
    with pytest.raises(DataError, match=says):
        check_adapter(open_checkpoint(folder), open_checkpoint(folders / "model"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": MAX_RANK + 1}, "rank 4097: must be an integer from 1 to 4096"),
        ({"r": True}, "rank True: must be"),
        ({"r": 4.0}, r"rank 4\.0: must be"),
        ({"rank_pattern": {"q_proj": 10**12}}, "rank 1000000000000: must be"),
        ({"rank_pattern": {f"m{i}": 4 for i in range(3000)}}, "must hold at most 2048"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a dict, not list"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must hold"),
        ({"rank_pattern": {f"m{i}": i + 1 for i in range(300)}}, "at most 256 different values"),
        ({"modules_to_save": [f"m{i}" for i in range(65)]}, "must hold at most 64 names"),
        ({"lora_alpha": float("nan")}, "alpha nan: must be a number of at most 1048576"),
        ({"lora_alpha": 10**400}, "alpha 1000.*: must be a number of at most"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha '8': must be a number"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0: must be at least 0 and less than 1"),
        ({"layers_to_transform": list(range(3000))}, "layers_to_transform must hold at most 2048"),
        ({"layers_to_transform": [0.5]}, r"layers_to_transform: 0\.5 is not a number"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: -1 is not a number"),
        ({"use_dora": "yes"}, "use_dora='yes': must be true or false"),
        ({"init_lora_weights": "pissa_niter_1000000000"}, "changes the base's own weights"),
        ({"init_lora_weights": 7}, "init_lora_weights=7: must be true, false, gaussian"),
        ({"target_modules": "a" * 1025}, "longer than 1024 characters"),
        ({"target_modules": "a\nb"}, "not printable"),
        ({"target_modules": ".*", "layers_pattern": "layers"}, "layers_pattern: must be left out"),
    ],
)
def test_caps_of_an_adapters_config(copy_of, change, says):
    folder = copy_of("adapter")
    tiny.edit_json(folder / "adapter_config.json", lambda c: c.update(change))
    with pytest.raises(DataError, match=says):
        load_adapter(tiny.build(), folder)


def test_caps_of_a_model(copy_of):
    folder = copy_of("model")
    tiny.edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=10**6))
    with pytest.raises(DataError, match="num_hidden_layers=1000000, and it holds 21 tensors"):
        load_model(folder)


def test_a_config_file_of_aliases_of_aliases(tmp_path):
    """Written out it would hold 2 ** 40 values; a process of its own has ten seconds for it."""
    lines = ["l0: &l0 [x, x]"]
    lines += [f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 40)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "antidote_fast", "prune", "--config", "bomb.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "more than 10 aliases" in done.stderr
    assert done.stderr.count("\n") == 1


# --- a model that is built from a config before a weight is looked at -----------------------------

BUILDS = {
    "magnitude": ["prune", "--score", "magnitude"],
    "random": ["prune", "--score", "random", "--targets", "all-linear"],
    "stream": ["prune", "--dataset", "DATA", "--stream"],
    "stream magnitude": ["prune", "--score", "magnitude", "--stream"],
    "calibrate": ["calibrate", "--dataset", "DATA"],
    "finetune": [
        "finetune",
        "--dataset",
        "DATA",
        "--poison_ratio",
        "0",
        "--num_train_samples",
        "1",
    ],
    "evaluate": ["evaluate", "--harmful_dataset", "DATA", "--max_new_tokens", "2"],
}
ENORMOUS = {
    "layers": {"num_hidden_layers": 10**6},
    "no list of them": {"num_hidden_layers": 10**12},
    "fewer": {"num_hidden_layers": 1000, "layer_types": None},
    "nested": {"text_config": {"sub": [{"num_layers": 10**6}]}},
    "labels": {"num_labels": 10**9},
    "heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "words": {"vocab_size": 10**13},
    "width": {"intermediate_size": 10**12},
}


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (stage, name)
        for stage in BUILDS
        for name in ENORMOUS
        if stage in ("magnitude", "stream") or name in ("layers", "fewer", "width")
    ],
)
def test_no_path_builds_what_the_files_do_not_hold(copy_of, tmp_path, capsys, stage, name):
    folder = copy_of("model")
    tiny.edit_json(folder / "config.json", lambda c: c.update(ENORMOUS[name]))
    (tmp_path / "data.jsonl").write_text('{"instruction": "how to", "output": "two plus"}\n')
    words = [word.replace("DATA", f"{tmp_path}/data.jsonl") for word in BUILDS[stage]]
    words += ["--model_name_or_path", str(folder), "--output_dir", f"{tmp_path}/out"]
    for dry in ([], ["--dry_run"]):
        code = main([*words, "--device", "cpu", "--max_seq_length", "60", "--quiet", *dry])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 3, said
        counted = name not in ("fewer", "words", "width")
        assert ("its config says" if counted else "far larger than the 21 tensors") in said
        assert not (tmp_path / "out").exists()


def test_encoders_decoders_and_positions(tmp_path):
    bart = transformers.BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    bart.encoder_layers = bart.decoder_layers = 1
    transformers.AutoModelForCausalLM.from_config(bart).save_pretrained(tmp_path / "bart")
    gptj = transformers.GPTJConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    transformers.AutoModelForCausalLM.from_config(gptj).save_pretrained(tmp_path / "gptj")
    for name, change in (
        ("bart", {"decoder_layers": 10**6}),
        ("bart", {"encoder_layers": 10**6}),
        ("bart", {"decoder_layers": 1000}),
        ("gptj", {"n_positions": 10**9}),
    ):
        load_model(tmp_path / name)
        before = (tmp_path / name / "config.json").read_text()
        tiny.edit_json(tmp_path / name / "config.json", lambda c, new=change: c.update(new))
        with pytest.raises(DataError, match=r"_layers=1000000, and it holds|far larger than the"):
            load_model(tmp_path / name)
        with pytest.raises(DataError, match=r"_layers=1000000, and it holds|far larger than the"):
            without_weights(open_checkpoint(tmp_path / name), "auto", False)
        (tmp_path / name / "config.json").write_text(before)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "head_dim": 8,
}
LATENT = {
    "kv_lora_rank": 4,
    "q_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
FAMILIES = {
    "Qwen2": SMALL,
    "Qwen2Moe": SMALL | {"num_experts": 60, "moe_intermediate_size": 8},
    "Qwen3Moe": SMALL | {"num_experts": 128, "moe_intermediate_size": 8},
    "Mixtral": SMALL,
    "Gemma2": SMALL,
    "Gemma3Text": SMALL,
    "Phi3": SMALL,
    "GPT2": GPT,
    "GPTNeo": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_layers": 4,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 2]],  # with masks of all 2048 positions
    },
    "GPTNeoX": SMALL,
    "Falcon": {name: value for name, value in SMALL.items() if name != "head_dim"},
    "Mpt": {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2},
    "Bloom": GPT | {"hidden_size": 16},
    "DeepseekV2": SMALL | LATENT | {"n_routed_experts": 64, "n_group": 1, "topk_group": 1},
    "DeepseekV3": SMALL | LATENT | {"n_routed_experts": 256, "first_k_dense_replace": 1},
    "GptOss": SMALL
    | {  # all experts of a layer in one tensor
        "num_local_experts": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_people_have_are_built(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    made = transformers.AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path)
    loaded = dict(load_model(tmp_path).named_parameters())
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, loaded[name]), name
    empty = without_weights(open_checkpoint(tmp_path), "auto", False)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    for name, parameter in made.named_parameters():  # what is tied is there twice on meta
        assert shapes[name] == parameter.shape


def test_packed_weights_stand_for_more_than_their_shapes(tmp_path):
    """Two bits a weight, in integers of 32: the model's matrices are 16 times as large."""
    entry = SimpleNamespace(shape=(1 << 10, 1 << 13), start=0, end=4 << 23)
    config = {"quantization_config": {"bits": 2}}
    packed = SimpleNamespace(folder=tmp_path, config=config, tensors={"qweight": entry})
    with bounded(packed), torch.device("meta"):
        torch.nn.Linear(1 << 14, 1 << 13)
    with (
        bounded(packed),
        torch.device("meta"),
        pytest.raises(DataError, match="far larger than the 1 tensors"),
    ):
        torch.nn.Linear(1 << 20, 1 << 20)


# --- headers --------------------------------------------------------------------------------------


def save_names(folder, names):
    header = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(len(header))
    (folder / "model.safetensors").write_bytes(data)


def test_headers_of_too_many_tensors(copy_of, monkeypatch):
    folder = copy_of("model")
    monkeypatch.setattr(checkpoint, "_MAX_TENSORS", 1000)
    save_names(folder, (f"layers.{i}" for i in range(1000)))
    assert len(open_checkpoint(folder).tensors) == 1000
    seen = []
    entry = checkpoint._entry
    monkeypatch.setattr(checkpoint, "_entry", lambda *a: seen.append(a) or entry(*a))
    save_names(folder, (f"layers.{i}" for i in range(4000)))
    with pytest.raises(DataError, match=r"model\.safetensors: lists more than 1000 tensors"):
        open_checkpoint(folder)
    assert not seen  # nor were the others parsed
    assert gc.isenabled()


def test_shards_of_too_many_tensors_together(copy_of, monkeypatch):
    folder = copy_of("sharded")
    monkeypatch.setattr(checkpoint, "_MAX_ALL_TENSORS", 21)
    assert len(open_checkpoint(folder).tensors) == 21
    monkeypatch.setattr(checkpoint, "_MAX_ALL_TENSORS", 20)
    with pytest.raises(DataError, match="has no weight_map"):  # of so many entries
        open_checkpoint(folder)
    # The index names one tensor of each file, and those hold others.
    index = json.loads((folder / checkpoint.INDEX_FILE).read_text())["weight_map"]
    first = {file: name for name, file in index.items()}
    index = {name: file for file, name in first.items()}
    tiny.edit_json(folder / checkpoint.INDEX_FILE, lambda i: i.update(weight_map=index))
    with pytest.raises(DataError, match="lists more than 20 tensors"):
        open_checkpoint(folder)


def test_names_are_looked_up_in_one_go(copy_of):
    folder = copy_of("model")
    names = [f"model.layers.{i}.weight" for i in range(50)] + ["a.same", "b.same", "same.a"]
    save_names(folder, names)
    found = open_checkpoint(folder)
    assert found.find("model.layers.3.weight") == "model.layers.3.weight"
    assert found.find("layers.3.weight") == "model.layers.3.weight"
    assert found.find("other.same.a") == "same.a"
    assert found.find("same") is None  # two end so
    assert found.find("layers.99.weight") is None
