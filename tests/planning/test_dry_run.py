"""Plans: the same refusals as the stage, figures as the stage's own report, nothing written."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import sampling
import stages
import tiny
import torch
import yaml
from stages import fleet_words, stage_words, tensor_bytes, tree

from antidote_fast.cli import entry
from antidote_fast.config import flags
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.planning.dry_run import plan


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    stages.briefly(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, an adapter, data and norms."""
    return stages.make(tmp_path_factory.mktemp("dry"))


STAGES = [
    *("calibrate", "calibrate adapter", "prune", "prune adapter", "prune norms"),
    *("prune magnitude", "prune random", "align", "finetune", "finetune full", "evaluate"),
    *("calibrate stream", "prune stream", "prune stream global", "prune stream adapter"),
    *("prune stream norms", "prune preserve", "prune preserve alone", "prune preserve norms"),
    *("prune revert", "prune stream revert"),
]


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_agrees_with_what_the_stage_then_reports(stage, made, tmp_path, capsys):
    words = [*stage_words(made, stage), "--output_dir", str(tmp_path / "out")]
    before = tree(made)
    assert entry.main([*words, "--dry_run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert tree(made) == before
    assert planned["refusal"] is None
    assert all(math.isfinite(s) and s >= 0 for s in planned["seconds"].values())
    assert sum(planned["seconds"].values()) > 0
    assert planned["peak_memory"] == sum(planned["memory"].values()) > 0

    assert entry.main([*words, "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    data = planned["data"]
    if "num_tokens" in report and "tokens" in data:
        assert data["tokens"] == report["num_tokens"]
        assert data["sequences"] == report["num_sequences"]
    if "preserve_data" in report and "preserve tokens" in data:
        assert data["preserve tokens"] == report["preserve_data"]["num_tokens"]
        assert data["preserve sequences"] == report["preserve_data"]["num_sequences"] == 4
    if words[0] == "prune":
        assert planned["pruned"] == {
            "layers": report["num_layers"],
            "weights": report["num_weights"],
        }
    if "training" in report:
        assert data["optimizer steps"] == report["training"]["steps"]
        assert data["sequences"] == report["training"]["num_samples"]
    if stage != "evaluate":
        files = (tmp_path / "out").glob("*.safetensors")
        payload = sum(tensor_bytes(path) for path in files)
        headers = 0.05 * payload + 4096  # planned from the source's whole files where it prunes
        assert payload <= planned["bytes_written"] <= payload + headers
        if words[0] in ("align", "finetune"):
            assert planned["bytes_written"] == payload


def test_streaming_holds_blocks_where_memory_is_too_small_for_the_model(made, tmp_path, capsys):
    words = [*stage_words(made, "prune stream"), "--output_dir", str(tmp_path / "out")]
    assert entry.main([*words, "--dry_run", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    names = ["process", "embeddings and adapter", "blocks", "activations", "hidden states", "norms"]
    assert list(memory) == names
    model = tiny.build("llama")
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert memory["blocks"] == 3 * block
    assert memory["hidden states"] % (32 * 4) == 0  # one fp32 vector a token


def test_plans_count_a_second_data_set_and_a_base(made, tmp_path):
    one = PruneConfig(**prune_fields(made, tmp_path))
    both = plan(replace(one, preserve_dataset=f"{made}/task.jsonl"))
    size = (made / "task.jsonl").stat().st_size
    assert both.bytes_read == plan(one).bytes_read + size
    assert both.flops > plan(one).flops
    one = PruneConfig(**prune_fields(made, tmp_path) | {"adapter": None})
    targets = sum(t.nbytes for n, t in tiny.build().named_parameters() if n[-13] in "qkv")
    for options, reads in (({}, 1), ({"stream": True}, 1)):
        plain = replace(one, **options)
        based = plan(replace(plain, aligned_model=f"{made}/aligned"))
        assert based.bytes_read == plan(plain).bytes_read + reads * targets
    plain = replace(one, stream=True, scope="global")
    based = plan(replace(plain, aligned_model=f"{made}/aligned", score_delta=True))
    assert based.bytes_read == plan(plain).bytes_read + 3 * targets


def test_a_plan_of_a_fleet_counts_its_jobs(made, tmp_path):
    adapter = str(made / "adapter")
    lines = [{"adapter": adapter, "name": name} for name in "abc"]
    words = fleet_words(made, tmp_path, [*lines, {"adapter": f"{made}/base", "name": "bad"}])
    config, _ = flags.from_words(FleetConfig, words[1:], "fleet")
    planned = plan(config)
    assert planned.data == {"jobs": 4, "refused": 1, "with a folder already": 0}
    assert planned.notes[0].startswith("would be set aside: bad: adapter=")
    assert not (tmp_path / "out").exists()
    assert plan(replace(config, shard="1/2")).data["jobs"] == 2
    one = plan(PruneConfig(**prune_fields(made, tmp_path)))
    size = sum(tensor_bytes(path) for path in (made / "adapter").glob("*.safetensors"))
    assert planned.bytes_written == 3 * size
    # A fleet's forwards end with the last target's input.
    assert 0.5 < planned.flops / (3 * one.flops) < 1


def prune_fields(made, tmp_path):
    return {
        "model_name_or_path": f"{made}/base",
        "adapter": f"{made}/adapter",
        "dataset": f"{made}/data.jsonl",
        "output_dir": str(tmp_path / "one"),
        "max_seq_length": 60,
        "device": "cpu",
    }


def test_a_plan_is_readable(made, tmp_path, capsys):
    words = stage_words(made, "prune adapter")
    assert entry.main([*words, "--output_dir", str(tmp_path / "out"), "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "plan of prune: nothing was loaded, nothing is written"
    names = [line.split()[0] for line in out[1:]]
    expected = [
        "model",
        "data",
        "prunes",
        "device",
        "reads",
        "writes",
        "computes",
        "memory",
        "time",
    ]
    assert names == expected
    assert "23,712 weights, 94.8 kB in float32" in out[1]
    assert "12 layers, 1,280 weights" in out[3]


def run_config(made, out, **changes):
    data = f"{made}/data.jsonl"
    train = {"dataset": data, "lora_r": 4, "num_train_samples": 12, "num_train_epochs": 1}
    return {
        "model_name_or_path": f"{made}/base",
        "output_dir": str(out),
        "max_seq_length": 60,
        "device": "cpu",
        "align": train,
        "finetune": train | {"poison_ratio": 0},
        "prune": {"dataset": data},
        "evaluate": {"harmful_dataset": data, "max_new_tokens": 4},
    } | changes


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_is_the_sum_of_its_stages(tuning, made, tmp_path, capsys):
    config = run_config(made, tmp_path / "out")
    config["finetune"]["tuning"] = tuning
    if tuning == "full":  # what the run itself will have aligned
        config["prune"] |= {"aligned_model": str(tmp_path / "out" / "aligned"), "score_delta": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = ["run", "--config", str(tmp_path / "run.yaml")]
    assert entry.main([*words, "--dry_run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    scores = ["scores/base", "scores/aligned", "scores/attacked", "scores/pruned"]
    assert list(planned["parts"]) == ["aligned", "attacked", "pruned", *scores]
    for name in ("flops", "bytes_read", "bytes_written"):
        assert planned[name] == sum(part[name] for part in planned["parts"].values())
    assert planned["peak_memory"] == max(p["peak_memory"] for p in planned["parts"].values())
    assert entry.main([*words, "--quiet"]) == 0
    for name, part in planned["parts"].items():
        report = json.loads((tmp_path / "out" / name / "report.json").read_text())
        if "training" in report:
            assert part["data"]["optimizer steps"] == report["training"]["steps"]
        if name == "pruned":
            assert part["pruned"]["weights"] == report["num_weights"]
    capsys.readouterr()
    assert entry.main([*words, "--dry_run"]) == 0
    assert "aligned, attacked, pruned, scores/base" in capsys.readouterr().out


def test_demo_has_no_plan(capsys):
    assert entry.main(["demo", "--dry_run"]) == 2
    assert "--dry_run: must be with a command that" in capsys.readouterr().err


def test_a_plan_loads_no_weights(made, tmp_path, monkeypatch):
    from antidote_fast.files.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "read", lambda self, keys: pytest.fail("weights were read"))
    config = {
        "model_name_or_path": f"{made}/base",
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
    }
    found = plan(PruneConfig(**config, dataset=f"{made}/data.jsonl", max_seq_length=60))
    assert found.flops > 0
    found = plan(PruneConfig(**config, score="magnitude"))
    assert found.flops == 0
    assert list(found.seconds) == ["read", "prune", "write"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 38M weights, and data that fill its batches."""
    import transformers as tf

    root = tmp_path_factory.mktemp("large")
    config = tf.LlamaConfig(
        vocab_size=4000,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=6,
        num_attention_heads=10,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny.save_model(model, root / "base")
    rows = [{"instruction": "how to make", "output": " ".join(tiny.WORDS * 15)} for _ in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


LARGE = [
    "calibrate --dataset {data} --batch_size 8",
    "prune --score random --scope global --targets all-linear",
    "finetune --dataset {data} --poison_ratio 0 --lora_r 8 --num_train_samples 4 "
    "--num_train_epochs 1 --batch_size 4",
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("words", sampling.sample(LARGE, 2), ids=lambda words: words.split()[0])
def test_peak_memory_against_the_process_that_does_it(words, large, tmp_path):
    stage, *flags = words.format(data=large / "data.jsonl").split()
    flags += ["--model_name_or_path", str(large / "base"), "--device", "cpu"]
    flags += ["--output_dir", str(tmp_path / "out"), "--max_seq_length", "300"]
    command = [sys.executable, "-m", "antidote_fast", stage, *flags]
    options = {"capture_output": True, "text": True, "check": True}
    planned = subprocess.run([*command, "--dry_run", "--json"], **options)
    subprocess.run([*command, "--quiet"], **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    estimated = json.loads(planned.stdout)
    assert estimated["peak_memory"] == pytest.approx(report["peak_memory_bytes"], rel=0.3)
