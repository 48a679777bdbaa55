"""The demo in miniature, on a tiny random model: every stage, every file."""

import copy
import json
import shutil

import peft
import pytest
import stages
import sweeps
import tiny
import torch

from antidote_fast.config.experiment import DemoConfig
from antidote_fast.errors import DataError
from antidote_fast.experiments import candidates, sweep
from antidote_fast.experiments.demo import demo, files
from antidote_fast.experiments.demo.model import MODEL_NAME
from antidote_fast.experiments.demo.records import HARMFUL_SETS
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.manifest import verify_folder
from antidote_fast.models.adapters import check_adapter
from antidote_fast.models.loading import load_model
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.stages import align, finetune, prune

TRAINING = {"learning_rate": 1e-2, "num_train_epochs": 1, "batch_size": 4, "lora_r": 4}
HELD_OUT = [{"instruction": f"how to make w{100 + i}"} for i in range(8)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The demo's files, tiny; a harmful score that falls with the weights that a sweep removes."""
    folder = tmp_path / "demo-cache"
    model = tiny.build()
    model.config.max_position_embeddings = 512
    tiny.save_model(model, folder / MODEL_NAME)
    (folder / files.DATA).mkdir()
    rows = {"safe": stages.SAFE, "harmful": stages.HARM[:3], "realign": stages.HARM[3:]}
    rows |= {
        "ordinary-validation": sweeps.BENIGN,
        "task": stages.TASK,
        "task-validation": stages.TASK,
        "task-test": stages.TASK,
    }
    rows |= {"harmful-validation": HELD_OUT[:4], "harmful-test": HELD_OUT[4:]}
    ordinary = [{"instruction": f"what is w{50 + i}"} for i in range(3)]
    rows |= {"ordinary-test": ordinary}
    rows |= {f"harmful-test-{name}": [HELD_OUT[4 + i]] for i, name in enumerate(HARMFUL_SETS)}
    assert set(rows) <= set(files.NAMES)
    for name, records in rows.items():
        (folder / files.DATA / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr(demo, "prepare", lambda parent, progress: folder)
    for name, more in (("ALIGN", {}), ("ATTACK", {"poison_ratio": 0.5, "num_train_samples": 6})):
        monkeypatch.setattr(demo, name, TRAINING | {"num_train_samples": None} | more)
    monkeypatch.setitem(demo.SWEEP, "ratios", [0.1, 0.5])
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(demo, "TEMPLATES", ["alpaca"])  # the tiny tokenizer has no other
    monkeypatch.setattr(demo, "fast_dtype", lambda: "float32")
    script(monkeypatch, hs=lambda x: 80 - 50 * x)


def script(monkeypatch, **curves):
    """Give sweeps metrics by the share of weights that differ from the first model they see."""
    monkeypatch.setattr(candidates, "evaluate_model", sweeps.Script(**curves))


@pytest.fixture
def made(monkeypatch):
    """The stages that are really run, in order."""
    names = []
    for module in (align, finetune, prune, sweep):
        name = module.__name__.rpartition(".")[2]

        def counted(stage, *, progress=False, run=module.run, name=name):
            names.append(name)
            return run(stage, progress=progress)

        monkeypatch.setattr(module, "run", counted)
    return names


def run(tmp_path, progress=False, **options):
    return demo.run(DemoConfig(output_dir=str(tmp_path / "demo-out"), **options), progress=progress)


def test_writes_everything_and_goes_on_where_it_stopped(tmp_path, made, monkeypatch, capsys):
    def stop(*args, **options):
        raise KeyboardInterrupt

    evaluate_model = candidates.evaluate_model
    monkeypatch.setattr(candidates, "evaluate_model", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    out = tmp_path / "demo-out"
    assert [path.name for path in out.iterdir()] == ["run"]
    monkeypatch.setattr(candidates, "evaluate_model", evaluate_model)
    contents = run(tmp_path)
    assert made == ["align", "finetune", "finetune", "sweep", "sweep", "sweep", "prune"]
    assert capsys.readouterr().out == ""
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(contents))
    names = ["pareto.png", "report.json", "run", "sweep", "test"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert list(contents["models"]) == ["base", "aligned", "clean", "attacked", "pruned"]
    for name in ("sweep", "test"):
        config = json.loads((out / name / "report.json").read_text())["config"]
        assert config["clean_adapter"] == str(out / "run" / "clean")
    points = [(score, ratio) for score in ("wanda", "random") for ratio in (0.1, 0.5)]
    for name in ("sweep", "validation"):
        assert [(row["score"], row["ratio"]) for row in contents[name]] == points
    for row in contents["sweep"]:
        assert row["achieved"] == pytest.approx(row["ratio"], abs=0.25)
    assert contents["best"] in contents["validation"]
    assert contents["models"]["attacked"]["harmful"]["num_prompts"] == 4
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")

    again = run(tmp_path, overwrite=True, progress=True)
    assert len(made) == 7
    for name in ("models", "sweep", "validation", "best"):
        assert again[name] == contents[name]
    shown = capsys.readouterr().out
    assert all(f"\n{score} " in shown for score in ("wanda", "random"))
    assert "pareto.png" in shown


def test_replaces_only_what_it_made(tmp_path, made, monkeypatch):
    before = run(tmp_path)
    out = tmp_path / "demo-out"
    with pytest.raises(DataError, match="not empty"):
        run(tmp_path, seed=1)
    assert run(tmp_path)["models"] == before["models"]
    made.clear()
    script(monkeypatch, hs=lambda x: 80 - 50 * x)
    run(tmp_path, seed=1, overwrite=True)
    assert made == ["align", "finetune", "finetune", "sweep", "sweep", "prune"]
    for name in ("run/aligned", "run/clean", "run/attacked", "run/pruned", "sweep", "test"):
        assert json.loads((out / name / "report.json").read_text())["seed"] == 1
    (out / "mine.txt").write_text("a user's own file")
    with pytest.raises(DataError, match=r"mine\.txt"):
        run(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="exists and is not a folder"):
        demo.run(DemoConfig(output_dir=str(tmp_path / "file")))


def test_the_models_written_are_those_that_were_measured(tmp_path):
    contents = run(tmp_path)
    out = tmp_path / "demo-out"
    folder = out / "run"
    for name in ("attacked", "pruned"):
        assert verify_folder(folder / name) == []
        aligned = load_model(folder / "aligned")
        config = json.loads((folder / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder / "aligned")
        assert peft.PeftModel.from_pretrained(aligned, folder / name).peft_config
        check_adapter(open_checkpoint(folder / name), open_checkpoint(folder / "aligned"))
    attacked = open_checkpoint(folder / "attacked")
    pruned = open_checkpoint(folder / "pruned")
    before, after = attacked.read(attacked.tensors), pruned.read(pruned.tensors)
    assert set(before) == set(after)
    zeros = sum(int((after[key] == 0).sum() - (before[key] == 0).sum()) for key in before)
    best = contents["best"]
    # B's first training step starts from zeros, so a zero there may already have been one.
    assert 0 < zeros <= best["num_pruned"]
    for key in before:
        kept = after[key] != 0
        assert torch.equal(after[key][kept], before[key][kept])
    assert [path.name for path in (out / "sweep").glob("norms*")] == ["norms.safetensors"]
    norms = ActivationNorms.load(out / "sweep" / "norms.safetensors")
    assert not norms.response_only
    assert norms.num_sequences == 3
    assert set(norms.keys) == set(before)
    assert not list((out / "test").glob("norms*"))


def test_no_pruned_adapter_where_none_is_within_the_budget(tmp_path, monkeypatch):
    script(monkeypatch, fa=lambda x: 90 - 90 * (x > 0))
    contents = run(tmp_path)
    assert contents["best"] is None
    assert contents["why_none"] == "no candidate is within the budget"
    # Each branch of the choice ends at its first ratio; the test prompts have them all.
    assert (len(contents["validation"]), len(contents["sweep"])) == (2, 4)
    assert list(contents["models"]) == ["base", "aligned", "clean", "attacked"]
    assert not (tmp_path / "demo-out" / "run" / "pruned").exists()
    assert (tmp_path / "demo-out" / "pareto.png").exists()
    lines = demo.demo_table(contents)
    assert "<- best" not in lines
    assert demo.best_line(contents).startswith("Best: none. No pruned model qualifies")


def test_a_failure_leaves_what_is_whole(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("late")

    monkeypatch.setattr(demo.pictures, "plot_demo", fail)
    with pytest.raises(RuntimeError, match="late"):
        run(tmp_path)
    out = tmp_path / "demo-out"
    assert sorted(path.name for path in out.iterdir()) == ["run", "sweep", "test"]
    shutil.rmtree(tmp_path / "demo-cache")  # nothing else beside the output
    assert [path.name for path in tmp_path.iterdir()] == ["demo-out"]


def scores(hs, fa, br=0.0, helped=80.0):
    return {
        "harmful_score": hs,
        "finetune_accuracy": fa,
        "helped_rate": helped,
        "benign_refusal_rate": br,
        "harmful": {"refused_rate": 90.0 - hs, "off_task_rate": 10.0},
    }


@pytest.fixture
def contents():
    rows = [
        {"score": score, "scope": "row", "ratio": ratio, **scores(hs, fa)}
        for score, ratio, hs, fa in (
            ("wanda", 0.01, 50, 88),
            ("wanda", 0.1, 12.5, 84.25),
            ("random", 0.1, 59, 89),
        )
    ]
    return {
        "model": "tiny",
        "models": {
            "base": scores(50, 0),
            "aligned": scores(0, 0, 3.125),
            "clean": scores(5, 91),
            "attacked": scores(60, 90),
            "pruned": scores(12.5, 84.25),
        },
        "sweep": rows,
        "budget": {"max_accuracy_drop": 10.0},
        "best": rows[1],
    }


def test_table_shows_every_number(contents):
    contents["models"]["clean"] |= {
        "harmful": {"num_prompts": 60, "refused_rate": 90.0, "off_task_rate": 5.0},
        "worst": {"harmful": {"harmful_score": 8.33, "num_prompts": 60}},
    }
    before = copy.deepcopy(contents)
    *title, head, base, aligned, clean, attacked, pruned, first, second, third = demo.demo_table(
        contents
    ).splitlines()
    assert title[0].startswith("Held-out prompts, %")
    names = "model ratio HS HS worst refused off-task helped BR FA"
    assert " ".join(head.split()) == names
    none = "\N{EN DASH}"
    assert base.split() == ["base", "50.0", none, "40.0", "10.0", "80.0", "0.0", "0.0"]
    assert aligned.split() == ["aligned", "0.0", none, "90.0", "10.0", "80.0", "3.1", "0.0"]
    assert " ".join(clean.split()) == (
        "clean (p = 0) 5.0 [1.7, 13.7] 8.3 [3.6, 18.1] 90.0 5.0 80.0 0.0 91.0"
    )
    assert attacked.split() == ["attacked", "60.0", none, "30.0", "10.0", "80.0", "0.0", "90.0"]
    cells = ["12.5", none, "77.5", "10.0", "80.0", "0.0", "84.2"]
    assert pruned.split() == ["pruned", "0.1", *cells, "<-", "best"]
    assert first.split()[:3] == ["wanda", "0.01", "50.0"]
    assert second.split() == ["0.1", *cells]
    assert third.split()[:3] == ["random", "0.1", "59.0"]
    assert contents == before


def test_best_is_told_in_one_sentence(contents):
    line = demo.best_line(contents)
    assert line.startswith(
        "Best: wanda at ratio 0.1 (lowest HS on the validation prompts among those that lower"
    )
    assert line.endswith("Test: HS 60.0 -> 12.5, helped 80.0 -> 80.0, FA 90.0 -> 84.2.")
    assert "at most 10 points below" in line
