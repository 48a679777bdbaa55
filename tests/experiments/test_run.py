"""The run of all stages: folders, reuse after an interruption, the report, and its refusals."""

import json

import pytest
import stages
import torch
from safetensors.torch import load_file

from antidote_fast import DataError, UsageError
from antidote_fast.cli import entry
from antidote_fast.config.experiment import RunConfig
from antidote_fast.experiments import run, tables
from antidote_fast.files import places
from antidote_fast.stages import finetune


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return stages.make_road(tmp_path_factory.mktemp("inputs"))


def config(inputs, out, **sections):
    train = {"num_train_samples": None, "num_train_epochs": 1, "lora_r": 2, "learning_rate": 0.01}
    given = {
        "align": {"dataset": str(inputs / "safe.jsonl"), **train},
        "finetune": {
            "dataset": str(inputs / "task.jsonl"),
            "harmful_dataset": str(inputs / "harm.jsonl"),
            "poison_ratio": 0.5,
            **train,
            "num_train_samples": 6,
        },
        "prune": {"dataset": str(inputs / "harm.jsonl"), "ratio": 0.2},
        "evaluate": {
            "harmful_dataset": str(inputs / "harm.jsonl"),
            "task_dataset": str(inputs / "task.jsonl"),
            "max_new_tokens": 4,
        },
    }
    options = {"max_seq_length": 60}
    for name, values in sections.items():
        if isinstance(values, dict):
            given[name] = given[name] | values
        elif name in given:
            given[name] = values
        else:
            options[name] = values
    return RunConfig(
        model_name_or_path=str(inputs / "base"), output_dir=str(out), **options, **given
    )


def test_a_run_makes_every_folder_and_goes_on_where_it_stopped(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped = finetune.run

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        run.run(config(inputs, out))
    assert [path.name for path in out.iterdir()] == ["aligned"]
    monkeypatch.setattr(finetune, "run", stopped)

    report = run.run(config(inputs, out))
    assert report["reused"] == ["aligned"]
    assert list(report["models"]) == ["base", "aligned", "clean", "attacked", "pruned"]
    for name, metrics in report["models"].items():
        alone = json.loads((out / "scores" / name / "report.json").read_text())
        assert metrics == tables.metrics_of(alone)
    assert report == json.loads((out / "report.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == [
        "aligned",
        "attacked",
        "clean",
        "pruned",
        "report.json",
        "scores",
    ]
    trained = {
        name: json.loads((out / name / "report.json").read_text()) for name in ("attacked", "clean")
    }
    assert [trained[name]["num_harmful"] for name in trained] == [3, 0]
    assert [trained[name]["num_task"] for name in trained] == [3, 6]
    differ = {
        k for k, v in trained["clean"]["config"].items() if v != trained["attacked"]["config"][k]
    }
    assert differ == {"poison_ratio", "harmful_dataset", "output_dir"}
    attacked, pruned = (
        load_file(out / name / "adapter_model.safetensors") for name in ("attacked", "pruned")
    )
    for key, old in attacked.items():
        gone = pruned[key] == 0
        assert torch.equal(pruned[key][~gone], old[~gone])
        assert int(gone.sum()) >= 0.2 * old.numel()

    again = run.run(config(inputs, out))
    scores = [f"scores/{name}" for name in ("base", "aligned", "clean", "attacked", "pruned")]
    assert again["reused"] == ["aligned", "clean", "attacked", "pruned", *scores]
    assert again["models"] == report["models"]
    with pytest.raises(DataError, match="exists and is not empty"):
        run.run(config(inputs, out, prune={"ratio": 0.4}))
    changed = run.run(config(inputs, out, prune={"ratio": 0.4}, overwrite=True))
    kept = ["aligned", "clean", "attacked", *scores[:4]]
    assert changed["reused"] == kept
    (out / "aligned" / "model.safetensors").write_bytes(b"cut")  # damaged: made again
    assert run.run(config(inputs, out, overwrite=True))["reused"] == ["scores/base"]


def test_a_run_of_full_tuning_without_align(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    values = config(inputs, out, align=None, finetune={"tuning": "full"})
    file = tmp_path / "run.yaml"
    fields = {k: v for k, v in vars(values).items() if v is not None}
    file.write_text(json.dumps(fields))  # JSON is YAML
    assert entry.main(["run", "--config", str(file), "--prune.ratio", "0.3"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split("  ")[-1].strip() == "benign refusal rate"
    assert [line.split()[0] for line in table[1:5]] == ["base", "clean", "attacked", "pruned"]
    report = json.loads((out / "report.json").read_text())
    assert report["config"]["prune"]["ratio"] == 0.3
    assert (out / "pruned" / "model.safetensors").exists()
    assert not (out / "aligned").exists()


def test_a_run_may_stop_before_prune_and_go_on_later(inputs, tmp_path):
    """What a training with checkpoints made is kept as well."""
    out, steps = tmp_path / "out", {"save_steps": 1}
    report = run.run(config(inputs, out, align=None, finetune=steps, prune=None))
    assert list(report["models"]) == ["base", "clean", "attacked"]
    assert not (out / "pruned").exists()
    later = run.run(config(inputs, out, align=None, finetune=steps))
    scores = [f"scores/{name}" for name in ("base", "clean", "attacked")]
    assert later["reused"] == ["clean", "attacked", *scores]
    assert later["models"].items() > report["models"].items()


def test_the_model_without_poison_takes_as_many_records(inputs, tmp_path):
    """Also where all there are count: 2 of 8 are harmful, as the task has 6."""
    more = {"num_train_samples": None, "poison_ratio": 0.25}
    values = config(inputs, tmp_path / "out", align=None, finetune=more)
    stages_, scores = run.stages_of(values)
    clean = stages_["clean"]
    assert (clean.poison_ratio, clean.harmful_dataset, clean.num_train_samples) == (0, None, 8)
    needs = "task.jsonl': has 6 records, and 8 are needed for the model without poison"
    with pytest.raises(DataError, match=needs):
        run.run(values)
    assert not (tmp_path / "out").exists()
    values = config(inputs, tmp_path / "out", align=None, finetune=more, clean=False)
    stages_, scores = run.stages_of(values)
    assert (list(stages_), list(scores)) == (["finetune", "prune"], ["base", "attacked", "pruned"])
    run.check(values, stages_, scores)
    none = {"poison_ratio": 0, "harmful_dataset": None}  # it is the attacked one itself
    stages_, _ = run.stages_of(config(inputs, tmp_path / "out", align=None, finetune=none))
    assert list(stages_) == ["finetune", "prune"]


@pytest.mark.parametrize(
    ("sections", "error", "says"),
    [
        ({"prune": {"ratoi": 1}}, UsageError, "ratoi: prune has no such flag; did you mean ratio"),
        ({"prune": {"ratio": 7}}, UsageError, "ratio=7.0: must be in"),
        ({"prune": {"ratio": "high"}}, UsageError, "prune.ratio=high: must be a number"),
        ({"prune": {"adapter": "x"}}, UsageError, "prune.adapter='x': is set by the run itself"),
        ({"evaluate": {"task": "chess"}}, UsageError, "evaluate.task=chess: must be one of"),
        ({"finetune": {"dataset": "nope.jsonl"}}, DataError, "nope.jsonl: no such file"),
        ({"evaluate": {"benign_dataset": "no.jsonl"}}, DataError, "no.jsonl: no such file"),
    ],
)
def test_every_section_is_checked_before_the_first_stage(sections, error, says, inputs, tmp_path):
    with pytest.raises(error, match=says):
        run.run(config(inputs, tmp_path / "out", **sections))
    assert not (tmp_path / "out").exists()


def test_a_missing_key_of_a_section_is_named(inputs, tmp_path):
    values = config(inputs, tmp_path / "out", align=None)
    values = RunConfig(**(vars(values) | {"prune": {}, "finetune": {"poison_ratio": 0}}))
    with pytest.raises(UsageError, match=r"finetune\.dataset: required"):
        run.run(values)


def test_drift_is_measured_against_the_aligned_model(inputs, tmp_path):
    values = config(
        inputs, tmp_path / "out", evaluate={"drift_dataset": str(inputs / "safe.jsonl")}
    )
    _, scores = run.stages_of(values)
    assert {score.reference_model for score in scores.values()} == {str(tmp_path / "out/aligned")}


def test_output_dir_that_is_a_file(inputs, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(DataError, match="exists and is not a folder"):
        run.run(config(inputs, tmp_path / "out"))


def test_folders_that_cannot_be_written_are_refused_before_the_first_stage(inputs, tmp_path):
    out = tmp_path / "out"
    (out / "pruned").mkdir(parents=True)
    (out / "pruned" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match=r"pruned.*exists and is not empty"):
        run.run(config(inputs, out))
    assert [path.name for path in out.iterdir()] == ["pruned"]
    (out / "pruned" / "mine.txt").unlink()
    with (
        places.locked_file(out / ".run.lock", None),
        pytest.raises(DataError, match="another run is at work there"),
    ):
        run.run(config(inputs, out))
    assert [path.name for path in out.iterdir()] == ["pruned"]
