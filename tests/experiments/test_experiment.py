"""The grid: cells, what they share, going on, choosing strengths, rows, and refusals."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import stages

from antidote_fast import AntidoteError, DataError, UsageError
from antidote_fast.cli import entry
from antidote_fast.config import flags
from antidote_fast.config.experiment import ExperimentConfig
from antidote_fast.experiments import experiment, grid, tables
from antidote_fast.files import places
from antidote_fast.stages import align, finetune, prune

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return stages.make_road(tmp_path_factory.mktemp("inputs"))


def values(inputs, out, **given):
    train = {"num_train_samples": None, "num_train_epochs": 1, "lora_r": 2, "learning_rate": 0.01}
    return {
        "model_name_or_path": str(inputs / "base"),
        "output_dir": str(out),
        "max_seq_length": 60,
        "align": {"dataset": str(inputs / "safe.jsonl"), "seed": 0, **train},
        "finetune": {
            "dataset": str(inputs / "task.jsonl"),
            "harmful_dataset": str(inputs / "harm.jsonl"),
            "poison_ratio": 0.5,
            **train,
        },
        "prune": {"dataset": str(inputs / "harm.jsonl"), "ratio": 0.2},
        "evaluate": {
            "harmful_dataset": str(inputs / "harm.jsonl"),
            "task_dataset": str(inputs / "task.jsonl"),
            "benign_dataset": str(inputs / "safe.jsonl"),
            "max_new_tokens": 2,
        },
        "levels": {
            "defense": {
                "repnoise": {"align.harmful_dataset": str(inputs / "harm.jsonl")},
                "lisa": {"finetune.safe_dataset": str(inputs / "safe.jsonl")},
            }
        },
        "grid": {"seed": [0]},
        "clean": False,
        **given,
    }


def config(inputs, out, **given):
    return flags.from_values(ExperimentConfig, values(inputs, out, **given), "experiment")


@pytest.fixture
def trained(monkeypatch):
    """Counts the stages that are really run."""
    counts = {"align": 0, "finetune": 0, "prune": 0}
    for module in (align, finetune, prune):
        name = module.__name__.rpartition(".")[2]

        def counted(stage, *, progress=False, run=module.run, name=name):
            counts[name] += 1
            return run(stage, progress=progress)

        monkeypatch.setattr(module, "run", counted)
    return counts


def test_cells_share_what_they_can_and_a_second_call_computes_nothing(inputs, tmp_path, trained):
    out = tmp_path / "out"
    settings = config(
        inputs,
        out,
        defenses=["sft", "vaccine", "repnoise", "lisa", "ldifs", "antidote"],
        grid=[
            {"learning_rate": [0.01], "seed": [0, 1]},
            {"learning_rate": [0.01, 0.001], "seed": [0]},
        ],
    )
    report = experiment.run(settings)
    # 3 points, one in both grids; SFT and Antidote share a training.
    assert (report["num_cells"], report["num_computed"], report["num_left"]) == (18, 18, 0)
    assert trained == {"align": 3, "finetune": 15, "prune": 3}
    rows = tables.read_csv(out / "rows.csv")
    assert len({row["cell"] for row in rows}) == 18
    assert {row["defense"] for row in rows} == set(settings.defenses)
    for row in rows:
        assert 0 <= row["harmful_score"] <= 100
        assert (row["prune_seconds"] is None) == (row["defense"] != "antidote")
        assert row["finetune_memory_bytes"] > 10**7
    strengths = {row["defense"]: row["strength"] for row in rows}
    assert strengths == {
        "sft": None,
        "vaccine": "vaccine_rho=2",
        "repnoise": "repnoise_alpha=0.1 repnoise_beta=0.001",
        "lisa": "lisa_rho=1",
        "ldifs": "ldifs_lambda=1",
        "antidote": "ratio=0.2",
    }
    text = (out / "tables.md").read_text()
    assert "By learning_rate" in text
    assert (out / "table-1.png").read_bytes().startswith(b"\x89PNG")

    before = (out / "rows.csv").read_bytes()
    again = experiment.run(settings)
    assert again["num_computed"] == 0
    assert sum(trained.values()) == 21
    assert (out / "rows.csv").read_bytes() == before


def test_what_was_made_with_checkpoints_is_done(inputs, tmp_path, trained):
    """Stages run with resume where they keep checkpoints, and their reports say so."""
    given = values(inputs, tmp_path / "out", defenses=["antidote"])
    given["finetune"]["save_steps"] = 1
    report = experiment.run(flags.from_values(ExperimentConfig, given, "x"))
    assert report["num_computed"] == 1
    made = dict(trained)
    assert experiment.run(flags.from_values(ExperimentConfig, given, "x"))["num_computed"] == 0
    (tmp_path / "out/rows.csv").unlink()  # the stages alone tell
    experiment.run(flags.from_values(ExperimentConfig, given, "x"))
    given["finetune"]["save_steps"] = 2  # nor does it matter how often
    assert experiment.run(flags.from_values(ExperimentConfig, given, "x"))["num_computed"] == 0
    assert trained == made


def test_finished_experiments_at_once(inputs, tmp_path, trained):
    """One after the other, or one line that says so; and none where it cannot be written."""
    out = tmp_path / "out"
    settings = config(inputs, out, defenses=["sft"], overwrite=False)
    experiment.run(settings)
    found = []

    def again():
        try:
            found.append(experiment.run(settings)["num_computed"])
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    busy = f"DataError: output_dir={str(out)!r}: another experiment is at work there"
    assert set(found) <= {0, busy}
    assert 0 in found
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []
    with (
        places.locked_file(out / ".experiment.lock", None),
        pytest.raises(DataError, match="another experiment is at work there"),
    ):
        experiment.run(settings)
    assert experiment.run(settings)["num_computed"] == 0


def test_an_experiment_that_cannot_be_written(inputs, tmp_path, trained, monkeypatch):
    def rename(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "rename", rename)
    for stages_folder in (None, str(tmp_path / "stages")):
        settings = config(inputs, tmp_path / "out", defenses=["sft"], stages=stages_folder)
        with pytest.raises(DataError, match="Invalid cross-device link; nothing was written"):
            experiment.run(settings)
    assert (trained["align"], list(tmp_path.iterdir())) == (0, [])


def test_a_grid_in_pieces_and_on_another_machine(inputs, tmp_path, trained):
    out = tmp_path / "out"
    grid_of = {"learning_rate": [0.01, 0.001, 0.0001]}
    first = experiment.run(config(inputs, out, defenses=["sft"], grid=grid_of, max_cells=2))
    assert (first["num_computed"], first["num_left"]) == (2, 1)
    assert trained == {"align": 1, "finetune": 2, "prune": 0}
    elsewhere = tmp_path / "elsewhere"
    rest = experiment.run(
        config(inputs, elsewhere, defenses=["sft"], grid=grid_of, rows=str(out / "rows.csv"))
    )
    assert (rest["num_computed"], rest["num_left"]) == (1, 0)
    assert trained == {"align": 2, "finetune": 3, "prune": 0}
    rows = tables.read_csv(elsewhere / "rows.csv")
    assert [row["learning_rate"] for row in rows] == grid_of["learning_rate"]
    assert rows[:2] == tables.read_csv(out / "rows.csv")


def test_experiments_may_share_their_stages(inputs, tmp_path, trained):
    shared = {"stages": str(tmp_path / "stages"), "defenses": ["sft"]}
    experiment.run(config(inputs, tmp_path / "one", **shared))
    other = config(inputs, tmp_path / "two", **shared, grid={"learning_rate": [0.01, 0.001]})
    assert experiment.run(other)["num_computed"] == 2
    assert trained == {"align": 1, "finetune": 2, "prune": 0}
    assert not (tmp_path / "two/stages").exists()


def test_an_interruption_keeps_what_is_whole(inputs, tmp_path, trained, monkeypatch):
    run = finetune.run

    def stop(*args, **kwargs):
        if trained["finetune"] == 1:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(finetune, "run", stop)
    settings = config(inputs, tmp_path / "out", defenses=["sft"], grid={"seed": [0, 1]})
    with pytest.raises(KeyboardInterrupt):
        experiment.run(settings)
    assert len(tables.read_csv(tmp_path / "out/rows.csv")) == 1
    monkeypatch.setattr(finetune, "run", run)
    assert experiment.run(settings)["num_computed"] == 1
    assert trained == {"align": 1, "finetune": 2, "prune": 0}


def test_changed_data_are_noticed(inputs, tmp_path, trained):
    data = tmp_path / "task.jsonl"
    data.write_text((inputs / "task.jsonl").read_text())
    given = values(inputs, tmp_path / "out", defenses=["sft"])
    given["finetune"]["dataset"] = str(data)
    experiment.run(flags.from_values(ExperimentConfig, given, "x"))
    data.write_text("\n".join(map(json.dumps, stages.TASK[::-1])))
    with pytest.raises(DataError, match="exists and is not empty"):
        experiment.run(flags.from_values(ExperimentConfig, given, "x"))
    experiment.run(flags.from_values(ExperimentConfig, given | {"overwrite": True}, "x"))
    assert trained == {"align": 1, "finetune": 3, "prune": 0}  # one of them was refused
    assert len(tables.read_csv(tmp_path / "out/rows.csv")) == 1


def test_strengths_are_chosen_on_another_seed_and_used(inputs, tmp_path, monkeypatch):
    scores = {0.1: (40.0, 50.0), 0.5: (10.0, 45.0), 0.9: (0.0, 0.0)}
    rows = experiment._row

    def scored(cell, reports):
        row = rows(cell, reports)
        if cell.role == "tune":
            ratio = cell.stages["prune"].ratio
            row["harmful_score"], row["finetune_accuracy"] = scores[ratio]
        return row

    monkeypatch.setattr(experiment, "_row", scored)
    settings = config(
        inputs,
        tmp_path / "out",
        grid={"learning_rate": [0.01, 0.001], "seed": [0, 1]},
        tune={
            "seed": 9,
            "at": {"learning_rate": 0.01},
            "evaluate": {"harmful_dataset": str(inputs / "safe.jsonl")},
            "strengths": {"antidote": {"prune.ratio": [0.1, 0.5, 0.9]}},
        },
    )
    started = experiment.run(
        ExperimentConfig(**{**vars(settings), "max_cells": 1, "output_dir": str(tmp_path / "p")})
    )
    assert (started["chosen"], started["num_left"]) == ({}, 10)
    report = experiment.run(settings)
    assert report["chosen"] == {"antidote": {"prune.ratio": 0.5}}
    found = tables.read_csv(tmp_path / "out/rows.csv")
    tried = [row for row in found if row["role"] == "tune"]
    assert [(row["seed"], row["strength"]) for row in tried] == [
        (9, f"ratio={ratio}") for ratio in (0.1, 0.5, 0.9)
    ]
    used = [r for r in found if r["role"] == "test" and r["defense"] == "antidote"]
    assert len(used) == 4
    assert {row["strength"] for row in used} == {"ratio=0.5"}
    assert "9" not in (tmp_path / "out/tables.md").read_text().split("SFT")[0]


def test_a_cell_that_cannot_be_made_does_not_end_the_others(inputs, tmp_path, capsys):
    settings = values(inputs, tmp_path / "out", defenses=["sft"])
    settings["finetune"]["num_train_epochs"] = 20
    settings["grid"] = {"learning_rate": [1e30, 0.01]}
    file = tmp_path / "e.yaml"
    file.write_text(json.dumps(settings))
    assert entry.main(["experiment", str(file)]) == 5
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["num_computed"], report["num_left"]) == (1, 0)
    [line] = report["failed"]
    assert "learning_rate=1e+30" in line
    assert "the loss is" in line
    shown = capsys.readouterr()
    assert line in shown.out
    assert "1 failed" in shown.out
    assert "1 of 2 cells could not be made, the first: sft (test), learning_rate=1e+30" in shown.err


def test_every_setting_has_a_row_without_poison(inputs, tmp_path, trained):
    """SFT at p = 0, of as many records and from the same alignment; it is never pruned."""
    out = tmp_path / "out"
    grids = {"learning_rate": [0.01, 0.001], "alpha": [0.1, 0.2]}
    given = values(inputs, out, defenses=["antidote"], grid=grids, clean=True)
    given["finetune"]["num_train_samples"] = 6
    settings = flags.from_values(ExperimentConfig, given, "x")
    report = experiment.run(settings)
    assert (report["num_cells"], report["num_computed"]) == (6, 6)
    assert trained == {"align": 1, "finetune": 4, "prune": 4}
    rows = tables.read_csv(out / "rows.csv")
    assert [row["defense"] for row in rows] == ["clean"] * 2 + ["antidote"] * 4
    assert [row["alpha"] for row in rows[:2]] == [None, None]
    assert all(row["harmful_prompts"] == 6 and row["task_prompts"] == 6 for row in rows)
    assert all(row["benign_prompts"] == 4 and 0 <= row["helped_rate"] <= 100 for row in rows)
    assert experiment.run(settings)["num_computed"] == 0
    tables_ = (out / "tables.md").read_text()
    assert tables_.count("| SFT, p = 0 |") == 4  # two tables of two blocks
    assert "], 1" not in tables_
    clean, *_, pruned = grid.cells_of(settings, {})
    assert list(clean.stages) == ["align", "finetune", "evaluate"]
    tuned, attacked = (cell.stages["finetune"] for cell in (clean, pruned))
    assert (tuned.poison_ratio, tuned.harmful_dataset) == (0, None)
    assert tuned.num_train_samples == attacked.num_train_samples == 6
    assert clean.keys["align"] == pruned.keys["align"]


def test_sft_at_a_poison_ratio_of_0_is_not_made_twice(inputs, tmp_path):
    ratios = {"poison_ratio": [0.5, 0], "seed": [1, 2]}
    given = values(inputs, tmp_path / "out", defenses=["sft", "lisa"], grid=ratios, clean=True)
    given["finetune"]["num_train_samples"] = 6
    cells = grid.cells_of(flags.from_values(ExperimentConfig, given, "x"), {})
    assert [cell.axes["defense"] for cell in cells] == ["sft"] * 4 + ["lisa"] * 4
    given["defenses"] = ["lisa"]
    cells = grid.cells_of(flags.from_values(ExperimentConfig, given, "x"), {})
    assert [cell.axes["defense"] for cell in cells] == ["clean"] * 2 + ["lisa"] * 4
    assert [cell.axes for cell in cells[:2]] == [{"defense": "clean", "seed": s} for s in (1, 2)]


def test_too_few_task_records_for_the_row_without_poison_are_refused(inputs, tmp_path, trained):
    given = values(inputs, tmp_path / "out", defenses=["sft"], clean=True)  # 12, of which 6 harm
    with pytest.raises(DataError, match="has 6 records, and 12 are needed for the model without"):
        experiment.run(flags.from_values(ExperimentConfig, given, "x"))
    assert (trained["align"], (tmp_path / "out").exists()) == (0, False)


def test_one_alignment_for_all_seeds_or_one_for_each(inputs, tmp_path):
    given = values(inputs, tmp_path / "out", defenses=["sft", "antidote"], seed=7)
    given["grid"] = {"seed": [1, 2, 3]}

    def seeds(**changes):
        cells = grid.cells_of(flags.from_values(ExperimentConfig, given | changes, "x"), {})
        found = {(cell.stages["align"].seed, cell.stages["finetune"].seed) for cell in cells}
        assert len({cell.keys["align"] for cell in cells}) == len({seed for seed, _ in found})
        return found

    assert seeds() == {(0, 1), (0, 2), (0, 3)}  # align.seed is 0
    del given["align"]["seed"]
    assert seeds() == {(7, 1), (7, 2), (7, 3)}
    assert seeds(align_seeds=True) == {(1, 1), (2, 2), (3, 3)}


def test_a_defense_is_followed_by_antidote(inputs, tmp_path):
    settings = config(inputs, tmp_path / "out", defenses=["lisa", "lisa+antidote"])
    lisa, both = grid.cells_of(settings, {})
    assert both.keys["finetune"] == lisa.keys["finetune"]
    assert both.stages["finetune"].defense == "lisa"
    assert both.stages["evaluate"].adapter == both.stages["prune"].output_dir
    assert both.strength == "lisa_rho=1 ratio=0.2"
    assert experiment.run(settings)["num_computed"] == 2


def test_full_tuning_and_no_alignment(inputs, tmp_path, trained):
    given = values(inputs, tmp_path / "out", align=None, defenses=["ldifs", "antidote"])
    given["finetune"]["tuning"] = "full"
    report = experiment.run(flags.from_values(ExperimentConfig, given, "x"))
    assert report["num_computed"] == 2
    assert trained == {"align": 0, "finetune": 2, "prune": 1}


def test_keys_do_not_depend_on_where_things_lie_or_on_checkpoints(inputs, tmp_path):
    one = grid.cells_of(config(inputs, tmp_path / "a"), {})
    given = values(inputs, tmp_path / "b/c")
    given["finetune"]["save_steps"] = 3
    other = grid.cells_of(flags.from_values(ExperimentConfig, given, "x"), {})
    assert [cell.keys for cell in one] == [cell.keys for cell in other]
    given["finetune"]["weight_decay"] = 0.0
    changed = grid.cells_of(flags.from_values(ExperimentConfig, given, "x"), {})
    assert [cell.keys["align"] for cell in one] == [cell.keys["align"] for cell in changed]
    assert not {cell.key for cell in one} & {cell.key for cell in changed}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"grid": {"learning_rat": [1]}}, UsageError, "learning_rat: is no axis; did you mean"),
        ({"grid": {"learning_rate": 0.1}}, UsageError, "grid.learning_rate=0.1: must be a list"),
        ({"grid": {"learning_rate": []}}, UsageError, r"grid.learning_rate=\[\]: must be a list"),
        ({"grid": {"learning_rate": [-1]}}, UsageError, "learning_rate=-1.0: must be greater"),
        ({"grid": {"finetune.lorar": [1]}}, UsageError, "lorar: finetune has no such flag"),
        ({"grid": {"judge.x": [1]}}, UsageError, "judge.x: must be a flag as section.flag"),
        ({"grid": {"prune.adapter": ["x"]}}, UsageError, "prune.adapter: must be a flag"),
        ({"prune": {"norms": "x", "adapter": "y"}}, UsageError, "prune.adapter='y': is set by the"),
        ({"prune": None}, UsageError, "prune=null: must be given with defense antidote"),
        ({"defenses": ["vaccine"], "align": None}, UsageError, "align=null: must be given with"),
        ({"defenses": ["vacine"]}, UsageError, "defenses='vacine': must be among sft"),
        ({"defenses": ["repnoise"], "levels": {}}, UsageError, "harmful_dataset=None: must be"),
        ({"grid": {"task": ["b"]}, "levels": {"task": {"a": {}}}}, UsageError, "among levels.task"),
        ({"tune": {"seed": 0}}, UsageError, "tune.seed=0: must be an integer that is no seed"),
        ({"tune": {"sed": 7}}, UsageError, "tune.sed: is none of"),
        ({"tune": {"seed": 7, "strengths": {"lisa": {}}}}, UsageError, "lisa: must be among def"),
        (
            {"tune": {"seed": 7, "strengths": {"antidote": {"prune.ratio": 1}}}},
            UsageError,
            "must be lists of values by flag",
        ),
        ({"tables": [{"title": "x", "across": "epochs"}]}, UsageError, "across='epochs': must be"),
        ({"evaluate": {"harmful_dataset": "no.jsonl"}}, DataError, "no.jsonl: no such file"),
        ({"max_cells": 0}, UsageError, "max_cells=0: must be greater than 0"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(given, error, says, inputs, tmp_path):
    with pytest.raises(error, match=says):
        experiment.run(config(inputs, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds 'mine\.txt', which no experiment made"):
        experiment.run(config(inputs, tmp_path / "out"))
    with pytest.raises(DataError, match="exists and is not a folder"):
        experiment.run(config(inputs, tmp_path / "out/mine.txt"))


# --- files ----------------------------------------------------------------------------------------


def test_a_file_extends_another_and_flags_override_both(inputs, tmp_path):
    under = values(inputs, tmp_path / "out", grid={"learning_rate": [1]})
    (tmp_path / "under.yaml").write_text(json.dumps(under))
    (tmp_path / "over.yaml").write_text(
        "extends: under.yaml\n"
        "grid: {learning_rate: [1e-4, 5e-4]}\n"
        "finetune: {weight_decay: 0.5}\n"
        'tables: [{title: "T1: x", across: learning_rate}]\n'
    )
    words = [str(tmp_path / "over.yaml"), "--prune.ratio", "0.3", "--seed", "4"]
    found, _ = flags.from_words(ExperimentConfig, words, "experiment")
    assert found.grid == {"learning_rate": [1e-4, 5e-4]}
    assert found.finetune["weight_decay"] == 0.5
    assert found.finetune["lora_r"] == 2
    assert (found.prune["ratio"], found.seed) == (0.3, 4)
    assert found.tables == [{"title": "T1: x", "across": "learning_rate"}]
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    with pytest.raises(UsageError, match=r"extends='loop\.yaml': must be a file, 4 deep"):
        flags.from_words(ExperimentConfig, [str(tmp_path / "loop.yaml")], "experiment")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UsageError, match="must be a mapping of flags"):
        flags.from_words(ExperimentConfig, [str(tmp_path / "list.yaml")], "experiment")


def test_dry_run_plans_each_stage_and_writes_nothing(inputs, tmp_path, capsys):
    settings = values(inputs, tmp_path / "out", grid={"learning_rate": [0.1, 0.01]})
    file = tmp_path / "e.yaml"
    file.write_text(json.dumps(settings))
    assert entry.main(["experiment", str(file), "--dry_run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["parts"]) == 1 + 2 + 2 + 4
    assert "4 cells, 0 strengths to try, 9 stages" in plan["notes"]
    assert plan["flops"] > 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(AntidoteError):
        flags.from_words(ExperimentConfig, [], "experiment")


def test_dry_run_of_a_demo_makes_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["experiment", str(ROOT / "experiments/smollm2/t3.yaml"), "--dry_run"]
    assert entry.main(words) == 3
    assert "demo-cache: is not there yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
