"""Plans: the same refusals as the stage, figures as the stage's own report, nothing written."""

import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import tiny
import torch
import yaml

from antidote_fast import cli
from antidote_fast.pipeline import estimate, measure
from antidote_fast.pipeline.config import PruneConfig
from antidote_fast.pipeline.dry_run import plan

WORDS = tiny.WORDS


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """The self-measurement takes milliseconds here; its figures are not looked at."""
    monkeypatch.setattr(measure, "_SECONDS", 0.001)
    monkeypatch.setattr(measure, "_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "_WEIGHTS", 1 << 14)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, an adapter, data and norms."""
    root = tmp_path_factory.mktemp("dry")
    model = tiny.build("llama")
    tiny.save_model(model, root / "base")
    rows = [
        {"instruction": " ".join(WORDS[i % 7 :]), "output": " ".join(WORDS[: 2 + i % 5])}
        for i in range(12)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.save_adapter(tiny.add_lora(model), root / "adapter")
    argv = ["calibrate", *model_flags(root), "--dataset", f"{root}/data.jsonl"]
    assert cli.main([*argv, "--output_dir", f"{root}/norms", "--quiet"]) == 0
    return root


def model_flags(root):
    return ["--model_name_or_path", f"{root}/base", "--max_seq_length", "60", "--device", "cpu"]


def last_line(text):
    """Without the bars that transformers draws where a test calls main()."""
    return text.strip().splitlines()[-1]


def stage_words(root, stage):
    data = f"{root}/data.jsonl"
    train = ["--lora_r", "4", "--num_train_epochs", "2", "--num_train_samples", "12"]
    return {
        "calibrate": ["calibrate", "--dataset", data],
        "calibrate adapter": ["calibrate", "--dataset", data, "--adapter", f"{root}/adapter"],
        "prune": ["prune", "--dataset", data, "--save_masks", "--save_norms"],
        "prune adapter": ["prune", "--dataset", data, "--adapter", f"{root}/adapter"],
        "prune norms": ["prune", "--norms", f"{root}/norms"],
        "prune magnitude": ["prune", "--score", "magnitude", "--targets", "all-linear"],
        "prune random": ["prune", "--score", "random", "--scope", "global"],
        "align": ["align", "--dataset", data, *train],
        "finetune": ["finetune", "--dataset", data, "--poison_ratio", "0", *train],
        "finetune full": [
            *("finetune", "--dataset", data, "--harmful_dataset", data, "--tuning", "full"),
            *("--num_train_samples", "10", "--num_train_epochs", "1"),
        ],
        "evaluate": [
            *("evaluate", "--harmful_dataset", data, "--task_dataset", data),
            *("--max_new_tokens", "4", "--adapter", f"{root}/adapter"),
        ],
    }[stage] + model_flags(root)


STAGES = [
    *("calibrate", "calibrate adapter", "prune", "prune adapter", "prune norms"),
    *("prune magnitude", "prune random", "align", "finetune", "finetune full", "evaluate"),
]


def tree(folder):
    """Every file below a folder, its contents hashed."""
    return {
        str(path.relative_to(folder)): path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_agrees_with_what_the_stage_then_reports(stage, made, tmp_path, capsys):
    words = [*stage_words(made, stage), "--output_dir", str(tmp_path / "out")]
    before = tree(made)
    assert cli.main([*words, "--dry_run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert tree(made) == before
    assert planned["refusal"] is None
    assert all(math.isfinite(s) and s >= 0 for s in planned["seconds"].values())
    assert sum(planned["seconds"].values()) > 0
    assert planned["peak_memory"] == sum(planned["memory"].values()) > 0

    assert cli.main([*words, "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    data = planned["data"]
    if "num_tokens" in report and "tokens" in data:
        assert data["tokens"] == report["num_tokens"]
        assert data["sequences"] == report["num_sequences"]
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


def tensor_bytes(path):
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118


def test_a_plan_is_readable(made, tmp_path, capsys):
    words = stage_words(made, "prune adapter")
    assert cli.main([*words, "--output_dir", str(tmp_path / "out"), "--dry-run"]) == 0
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
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = ["run", "--config", str(tmp_path / "run.yaml")]
    assert cli.main([*words, "--dry_run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    scores = ["scores/base", "scores/aligned", "scores/attacked", "scores/pruned"]
    assert list(planned["parts"]) == ["aligned", "attacked", "pruned", *scores]
    for name in ("flops", "bytes_read", "bytes_written"):
        assert planned[name] == sum(part[name] for part in planned["parts"].values())
    assert planned["peak_memory"] == max(p["peak_memory"] for p in planned["parts"].values())
    assert cli.main([*words, "--quiet"]) == 0
    for name, part in planned["parts"].items():
        report = json.loads((tmp_path / "out" / name / "report.json").read_text())
        if "training" in report:
            assert part["data"]["optimizer steps"] == report["training"]["steps"]
        if name == "pruned":
            assert part["pruned"]["weights"] == report["num_weights"]
    capsys.readouterr()
    assert cli.main([*words, "--dry_run"]) == 0
    assert "aligned, attacked, pruned, scores/base" in capsys.readouterr().out


MISTAKES = [
    ("prune", {"--model_name_or_path": "nowhere/at/all"}),
    ("prune", {"--model_name_or_path": "{made}/adapter"}),
    ("prune", {"--dataset": "{made}/none.jsonl"}),
    ("prune", {"--dataset": "{made}/base/config.json"}),
    ("prune", {"--ratio": "1.5"}),
    ("prune", {"--targets": "nothing_like_it"}),
    ("prune", {"--max_seq_length": "3"}),
    ("prune", {"--device": "cuda:99"}),
    ("prune", {"--backend": "none"}),
    ("prune", {"--output_dir": "{made}/base"}),
    ("prune", {"--adapter": "{made}/base"}),
    ("prune", {"--template": "chat"}),
    ("prune adapter", {"--targets": "nothing_like_it"}),
    ("prune norms", {"--norms": "{made}/base"}),
    ("prune norms", {"--targets": "o_proj"}),
    ("prune random", {"--targets": "nothing_like_it"}),
    ("calibrate", {"--model_name_or_path": "{made}/norms"}),
    ("align", {"--lora_targets": "nothing_like_it"}),
    ("align", {"--lr_scheduler_type": "other"}),
    ("align", {"--output_dir": "{made}/norms"}),
    ("finetune", {"--num_train_samples": "13"}),
    ("finetune full", {"--harmful_dataset": "{made}/none.jsonl"}),
    ("evaluate", {"--judge": "{made}/none"}),
    ("evaluate", {"--max_new_tokens": "64"}),
    ("evaluate", {"--adapter": "{made}/none"}),
]


@pytest.mark.parametrize(
    ("stage", "change"), MISTAKES, ids=[f"{s} {' '.join(c)}" for s, c in MISTAKES]
)
def test_a_mistake_ends_a_plan_as_it_ends_the_stage(stage, change, made, tmp_path, capsys):
    words = [*stage_words(made, stage), "--output_dir", str(tmp_path / "out")]
    for flag, value in change.items():
        words += [flag, value.format(made=made)]
    before = tree(made)
    code = cli.main([*words, "--dry_run"])
    planned = capsys.readouterr()
    assert code in (2, 3, 4)
    assert cli.main(words) == code
    assert last_line(planned.err) == last_line(capsys.readouterr().err)
    assert not planned.out
    assert tree(made) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("break_it", ["missing tensor", "truncated", "pickle", "remote code"])
def test_a_broken_model_ends_a_plan_as_it_ends_the_stage(break_it, made, tmp_path, capsys):
    base = tmp_path / "base"
    if break_it == "missing tensor":
        model = tiny.build("llama")
        state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up" not in k}
        tiny.save_model(model, base, state_dict=state)
    else:
        tiny.save_model(tiny.build("llama"), base)
    if break_it == "truncated":
        tiny.truncate(base / "model.safetensors")
    elif break_it == "pickle":
        os.rename(base / "model.safetensors", base / "pytorch_model.bin")
    elif break_it == "remote code":
        tiny.edit_json(base / "config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"}))
    words = [*stage_words(made, "prune"), "--output_dir", str(tmp_path / "out")]
    words += ["--model_name_or_path", str(base)]
    assert cli.main([*words, "--dry_run"]) == 3
    planned = last_line(capsys.readouterr().err)
    assert cli.main(words) == 3
    assert last_line(capsys.readouterr().err) == planned
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["calibrate", "prune", "align", "finetune", "evaluate"])
def test_what_cannot_fit_is_refused_before_weights_load(stage, made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "available_memory", lambda: 50_000)
    words = [*stage_words(made, stage), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, "--dry_run"]) == 1
    planned = capsys.readouterr()
    assert planned.out.startswith(f"plan of {stage}")  # the numbers first
    assert cli.main(words) == 1
    refused = last_line(capsys.readouterr().err)
    assert refused == last_line(planned.err)
    assert "50 kB are available on cpu" in refused
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["prune", "prune norms", "align", "finetune full"])
def test_a_full_disk_is_refused_before_the_work(stage, made, tmp_path, capsys, monkeypatch):
    from antidote_fast import loading

    disk = type("Usage", (), {"free": 1000, "total": 10**9})
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: disk)
    words = [*stage_words(made, stage), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, "--dry_run"]) == 1
    planned = capsys.readouterr().err
    assert cli.main(words) == 1
    for text in (planned, capsys.readouterr().err):
        assert "0.00 GB needed, 0.00 GB free on its disk" in text
    assert not list(tmp_path.iterdir())


def test_demo_has_no_plan(capsys):
    assert cli.main(["demo", "--dry_run"]) == 2
    assert "--dry_run: must be with a command that" in capsys.readouterr().err


def test_a_plan_loads_no_weights(made, tmp_path, monkeypatch):
    from antidote_fast.files import Checkpoint

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
    rows = [{"instruction": "how to make", "output": " ".join(WORDS * 15)} for _ in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "words",
    [
        "calibrate --dataset {data} --batch_size 8",
        "prune --score random --scope global --targets all-linear",
        "finetune --dataset {data} --poison_ratio 0 --lora_r 8 --num_train_samples 4 "
        "--num_train_epochs 1 --batch_size 4",
    ],
    ids=lambda words: words.split()[0],
)
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
