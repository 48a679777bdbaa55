"""The sweep command: its folder, its plan, its refusals, and the prune that it recommends."""

import csv
import json
import shlex

import pytest
import stages
import sweeps
import texts
import tiny
import torch
from stages import HARM, last_line, tree
from sweeps import VAL, Script, config_of, fields

from antidote_fast.cli import entry, inspect
from antidote_fast.cli.show import summary
from antidote_fast.config.sweep import RATIOS, SweepConfig
from antidote_fast.errors import UsageError
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.experiments import candidates, sweep
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.manifest import verify_folder
from antidote_fast.norms.activation_norms import ActivationNorms


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    stages.briefly(monkeypatch)


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    return sweeps.make(folders, tmp_path_factory.mktemp("sweep"))


def falling(x):
    """A harmful score that falls with the share of weights that changed."""
    return round(80 - 50 * x, 2)


def test_the_folder_and_what_is_said_of_it(made, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "evaluate_model", Script(hs=falling))
    report = sweep.run(config_of(made, tmp_path / "out", scopes=["row", "tensor"]))
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert verify_folder(out) == []
    assert {p.name for p in out.iterdir()} == {
        *("report.json", "rows.csv", "curve.png", "norms.safetensors", "COMPLETE.json")
    }
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    unpruned, *lines = csv.DictReader((out / "rows.csv").read_text().splitlines())
    assert list(unpruned)[:5] == ["model", "score", "scope", "ratio", "achieved"]
    assert (unpruned["model"], unpruned["score"]) == ("unpruned", "")
    # 16 of 20: Wilson's interval goes from 58.4 to 91.9.
    names = ("harmful_score", "harmful_score_low", "harmful_score_high", "harmful_num_prompts")
    assert [float(unpruned[name]) for name in names] == [80, 58.4, 91.93, 20]
    assert len(lines) == len(report["rows"]) == 4
    assert [float(line["achieved"]) for line in lines] == [r["achieved"] for r in report["rows"]]
    assert report["clean"] is None
    text = summary(report, out)
    assert report["command"] in text.splitlines()[-2]
    best = report["recommended"]
    [line] = [line for line in text.splitlines() if "<- recommended" in line]
    assert line.endswith("  <- recommended  broken: 1")
    assert line.split()[:3] == [best["score"], best["scope"], f"{best['ratio']:g}"]
    assert f"{best['harmful_score']:.1f}" in line
    assert "make w100" not in (out / "report.json").read_text()
    found, problems = inspect.inspect(out)
    assert (found["stage"], problems) == ("sweep", [])


def test_a_clean_adapter_is_measured_once_and_stands_in_everything_shown(
    made, tmp_path, monkeypatch
):
    measured = []

    def measure(model, tokenizer, **options):
        (name,) = {"harmful", "task_records", "benign"} & set(options)
        assert options["templates"] == ("alpaca",)
        targets = {k: v.clone() for k, v in model.state_dict().items() if ".lora_" in k}
        measured.append((name, targets))
        metrics = {
            "harmful": {"harmful_score": 3.0 if len(measured) == 3 else 90.0},
            "task_records": {"finetune_accuracy": 90.0},
            "benign": {"helped_rate": 85.0, "benign_refusal_rate": 10.0},
        }[name]
        return metrics | {name.removesuffix("_records"): {"num_prompts": 20, "num_records": 20}}

    monkeypatch.setattr(candidates, "evaluate_model", measure)
    clean = tmp_path / "clean"
    model = tiny.add_lora(tiny.build("llama"), seed=5)
    tiny.save_adapter(model, clean)
    benign = f"{made.root}/benign.jsonl"
    config = config_of(made, tmp_path / "out", clean_adapter=str(clean), benign_dataset=benign)
    report = sweep.run(config)
    assert [name for name, _ in measured[:3]] == ["task_records", "benign", "harmful"]
    saved = open_checkpoint(clean)
    for name, value in saved.read(list(saved.tensors)).items():
        assert torch.equal(measured[0][1][name.replace(".weight", ".default.weight")], value)
    assert report["clean"]["harmful_score"] == 3
    assert report["unpruned"]["harmful_score"] == 90
    rows = list(csv.DictReader((tmp_path / "out" / "rows.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["clean", "unpruned", "pruned", "pruned"]
    assert [float(row["harmful_score"]) for row in rows] == [3, 90, 90, 90]
    lines = [line.split() for line in summary(report, "out").splitlines()]
    assert lines[1] == ["clean", "3.0", "90.0", "85.0", "10.0"]
    assert lines[2] == ["unpruned", "90.0", "90.0", "85.0", "10.0"]


def test_no_recommendation_is_said(made, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "evaluate_model", Script())
    report = sweep.run(config_of(made, tmp_path / "out", scores=["random"], save_norms=False))
    assert (report["recommended"], report["command"]) == (None, None)
    lines = summary(report, "out").splitlines()
    assert lines[-2] == (
        "recommended: none, none of the 2 candidates within the budget lowers the harmful score"
    )
    assert report["calibration"] == {}
    assert not (tmp_path / "out" / "norms.safetensors").exists()


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("kind", ["adapter", "full", "revert", "preserve", "random"])
def test_the_command_it_prints_makes_what_it_measured(
    kind, saved, made, tmp_path, monkeypatch, capsys
):
    script = Script(hs=falling)
    monkeypatch.setattr(candidates, "evaluate_model", script)
    options = {"save_norms": saved, "max_accuracy_drop": 0, "scopes": ["row", "global"]}
    if kind == "revert":
        options |= {"aligned_model": made.twin, "score_delta": "true"}
        options |= {"targets": ["q_proj", "down_proj"], "ignore": ["re:.*layers.1.mlp"]}
    if kind == "preserve":
        options |= {"scores": ["wanda-preserve"], "preserve_dataset": f"{made.root}/keep.jsonl"}
    if kind == "random":
        options |= {"scores": ["random"], "seed": 3}
    if kind == "full":
        options |= {"scores": ["wanda-response", "magnitude"], "aggregation": "mean"}
    out = tmp_path / "the sweep's"
    values = fields(made, out, adapter=kind in ("adapter", "preserve"), **options)
    assert entry.main(["sweep", *sweeps.words(values)]) == 0
    report = json.loads((out / "report.json").read_text())
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2] == f"  {report['command']}"
    assert ("--norms" in report["command"]) == (saved and kind != "random")
    assert ("--dataset" in report["command"]) == (not saved and kind != "random")
    command, *line = shlex.split(report["command"])
    assert command == "antidote-fast"
    assert entry.main(line) == 0
    pruned = tmp_path / "the sweep's-pruned"
    best, found = report["recommended"], json.loads((pruned / "report.json").read_text())
    for name in ("achieved", "num_pruned", "scope", "ratio"):
        assert found[name] == best[name]
    measured = script.seen[1 + report["rows"].index(best)]
    measured = {name.replace(".default.", "."): value for name, value in measured.items()}
    files = open_checkpoint(pruned)
    assert len(files.tensors) >= 12
    for name, value in files.read(list(files.tensors)).items():
        assert value.view(measured[name].dtype).equal(measured[name]), name


def test_the_flags_on_the_command_line(made, tmp_path):
    config = SweepConfig(**fields(made, tmp_path, ratios=[0.3, 0.1, 0.3], scopes=["row", "row"]))
    assert (config.ratios, config.scopes, config.scores) == ([0.1, 0.3], ["row"], ["wanda"])
    values = fields(made, tmp_path)
    del values["ratios"]
    assert SweepConfig(**values).ratios == list(RATIOS)
    assert config.evaluation().judge == "refusal"


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"ratios": []}, "ratios=[]: must be at least one value"),
        ({"scopes": []}, "scopes=[]: must be at least one value"),
        ({"scores": []}, "scores=[]: must be at least one value"),
        ({"ratios": [0.1, 0]}, "ratios=0: must be in (0, 1]"),
        ({"ratios": [1.5]}, "ratios=1.5: must be in (0, 1]"),
        ({"ratios": [float("nan")]}, "ratios=nan: must be in (0, 1]"),
        ({"scopes": ["column"]}, "scopes='column': must be among row, tensor, global"),
        (
            {"scores": ["wanda", "owl"]},
            "scores='owl': must be among wanda, wanda-response, wanda-preserve, magnitude, "
            "random, gate",
        ),
        (
            {"scores": ["wanda-preserve"]},
            "preserve_dataset=None: must be a file or hub name with score wanda-preserve",
        ),
        (
            {"preserve_dataset": "keep.jsonl"},
            "preserve_dataset='keep.jsonl': must be left out without score wanda-preserve or gate",
        ),
        ({"dataset": None}, "dataset=None: must be a file or hub name with score wanda"),
        ({"max_accuracy_drop": -1}, "max_accuracy_drop=-1: must be in [0, 100]"),
        (
            {"max_refusal_rise": 101, "benign_dataset": "b"},
            "max_refusal_rise=101: must be in [0, 100]",
        ),
        ({"max_refusal_rise": 2}, "max_refusal_rise=2: must be left out without benign_dataset"),
        ({"max_helped_drop": 2}, "max_helped_drop=2: must be left out without benign_dataset"),
        (
            {"max_helped_drop": -1, "benign_dataset": "b"},
            "max_helped_drop=-1: must be in [0, 100]",
        ),
        (
            {"clean_adapter": "c", "adapter": None},
            "clean_adapter='c': must be left out without adapter: it is another adapter of the "
            "same model",
        ),
        ({"num_samples": 0}, "num_samples=0: must be greater than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be greater than 0"),
        ({"num_calibration_samples": 0}, "num_calibration_samples=0: must be greater than 0"),
        ({"score_delta": True}, "score_delta=True: must be left out without aligned_model"),
        (
            {"score_delta": True, "aligned_model": "b", "adapter": None, "scores": ["random"]},
            "score_delta=True: must be left out with score random",
        ),
        (
            {"aligned_model": "b"},
            "aligned_model='b': must be left out with adapter, whose zero already falls back to "
            "the aligned model",
        ),
    ],
)
def test_values_are_refused_in_one_line(options, line, made, tmp_path):
    with pytest.raises(UsageError) as refused:
        config_of(made, tmp_path / "out", **options)
    assert str(refused.value) == line


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"harmful_dataset": "{root}/mixed.jsonl"}, 3, "{common}"),
        ({"benign_dataset": "{root}/keep.jsonl"}, 3, "{kept}"),
        ({"harmful_dataset": "{root}/none.jsonl"}, 3, "{root}/none.jsonl: no such file"),
        ({"task": "sst2"}, 3, "task sst2: the output of record 1 is none of negative, positive"),
        ({"judge": "{root}/none"}, 3, "{root}/none"),
        ({"harmful_labels": ["bad"]}, 2, "harmful_labels=['bad']: must be left out with judge="),
        ({"max_new_tokens": 60}, 2, "max_new_tokens=60: must be at most"),
        ({"adapter": "{model}"}, 3, "is a whole model, not an adapter"),
        ({"clean_adapter": "{model}"}, 3, "clean_adapter='{model}': is a whole model, not an"),
        ({"backend": "none"}, 2, "none"),
        ({"output_dir": "{model}"}, 3, "exists and is not empty"),
        ({"targets": ["nothing_like_it"]}, 4, "nothing to prune"),
        ({"scores": ["magnitude"], "targets": ["nothing_like_it"]}, 4, "nothing to prune"),
        ({"task": "alpaca"}, 2, "--task"),
        ({"ratios": ["much"]}, 2, "--ratios"),
    ],
)
def test_files_and_data_are_refused_before_weights_load(
    options, code, says, dry, made, tmp_path, monkeypatch, capsys
):
    mixed = made.root / "mixed.jsonl"
    mixed.write_text("\n".join(map(json.dumps, [*VAL, {**HARM[0], "output": "a"}, HARM[1]])))
    harm = f"{made.root}/harm.jsonl"
    placed = {
        "root": made.root,
        "model": made.model,
        "common": f"harmful_dataset='{mixed}': 2 of its 8 prompts are in dataset='{harm}', which "
        "calibrates; must be held out from it",
        "kept": f"benign_dataset='{made.root}/keep.jsonl': 4 of its 4 prompts are in "
        f"preserve_dataset='{made.root}/keep.jsonl'",
    }
    values = fields(made, tmp_path / "out") | options
    if "benign_dataset" in values:
        values |= {"scores": ["wanda-preserve"], "preserve_dataset": f"{made.root}/keep.jsonl"}
    for name, value in values.items():
        values[name] = value.format(**placed) if isinstance(value, str) else value
    monkeypatch.setattr(candidates, "evaluate_model", None)
    if "targets" not in options:
        monkeypatch.setattr(sweep, "load_model", None)
    assert entry.main(["sweep", *sweeps.words(values), *dry]) == code
    found = capsys.readouterr()
    assert found.out == "" or dry
    assert says.format(**placed) in last_line(found.err)
    assert not list(tmp_path.iterdir())


def test_a_missing_plot_library_is_told_before_anything_is_computed(made, tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name, name=name)

    monkeypatch.setattr(sweep.importlib, "import_module", absent)
    with pytest.raises(ImportError, match="matplotlib"):
        sweep.run(config_of(made, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# --- interrupted, planned -------------------------------------------------------------------------


def test_an_interrupted_sweep_leaves_nothing(made, tmp_path, monkeypatch, capsys):
    script = Script()

    def stop(*args, **options):
        if len(script.calls) == 4:
            raise KeyboardInterrupt
        return script(*args, **options)

    monkeypatch.setattr(candidates, "evaluate_model", stop)
    assert entry.main(["sweep", *sweeps.words(fields(made, tmp_path / "out"))]) == 75
    assert len(script.calls) == 4
    assert "nothing is left half-written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_agrees_with_the_report(made, tmp_path, monkeypatch, capsys):
    values = fields(
        *(made, tmp_path / "out"),
        scores=["wanda", "wanda-response", "wanda-preserve"],
        scopes=["row", "global"],
        preserve_dataset=f"{made.root}/keep.jsonl",
        benign_dataset=f"{made.root}/benign.jsonl",
    )
    before = tree(made.root)
    assert entry.main(["sweep", *sweeps.words(values), "--dry_run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert tree(made.root) == before
    assert (planned["stage"], planned["refusal"]) == ("sweep", None)
    assert planned["data"]["candidates"] == 12
    assert planned["notes"][-1].startswith("at most 13 evaluations, of the unpruned model and each")
    parts = planned["parts"]
    assert list(parts) == ["evaluate", "norms, all", "norms, response", "norms, preserve"]
    one = fields(made, tmp_path / "out", ratios=[0.1], benign_dataset=values["benign_dataset"])
    assert entry.main(["sweep", *sweeps.words(one), "--dry_run", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["parts"]["evaluate"]["flops"]
    assert parts["evaluate"]["flops"] * 2 == alone * 13
    with_clean = [*sweeps.words(one), "--clean_adapter", made.adapter, "--dry_run", "--json"]
    assert entry.main(["sweep", *with_clean]) == 0
    clean = json.loads(capsys.readouterr().out)
    assert clean["parts"]["evaluate"]["flops"] * 2 == alone * 3
    assert clean["notes"][-1].startswith("at most 3 evaluations, of the unpruned model, the clean")
    assert planned["flops"] == sum(part["flops"] for part in parts.values())

    monkeypatch.setattr(candidates, "evaluate_model", Script())
    assert entry.main(["sweep", *sweeps.words(values), "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for kind, counts in report["calibration"].items():
        data = parts[f"norms, {kind}"]["data"]
        assert data["sequences"] == counts["num_sequences"]
    assert parts["norms, all"]["data"]["tokens"] == report["calibration"]["all"]["num_tokens"]
    sets = [told for named in report["datasets"].values() for told in named.values()]
    prompts = sum(told["num_records"] for told in sets)
    assert planned["data"]["prompts"] == prompts == 6 + 5 + 3
    norms = [ActivationNorms.load(path) for path in (tmp_path / "out").glob("*norms*.safetensors")]
    written = sum(4 * sums.numel() for each in norms for sums in each.sq_sum.values())
    assert planned["bytes_written"] == written
    targets = open_checkpoint(made.adapter)
    size = sum(value.nbytes for value in targets.read(list(targets.tensors)).values())
    assert planned["memory"]["copy of the targets"] == size


def test_ordinary_prompts_beside_a_judge_of_harm_are_judged_as_evaluate_does(
    made, tmp_path, monkeypatch
):
    judge = texts.llama(labels=["safe", "unsafe"], seed=3)
    judge = texts.save(judge, tmp_path / "judge", texts.byte_tokenizer())
    script, used = Script(), []

    def evaluate_model(model, tokenizer, *, judges, **options):
        used.append(judges)
        return script(model, tokenizer, **options)

    monkeypatch.setattr(candidates, "evaluate_model", evaluate_model)
    options = {"scores": ["random"], "judge": judge, "benign_dataset": f"{made.root}/benign.jsonl"}
    sweep.run(config_of(made, tmp_path / "out", **options, harmful_labels=["unsafe"]))
    rows = (made.root / "adapter-task.jsonl").read_text().splitlines()
    labels = dict.fromkeys(json.loads(row)["output"] for row in rows)
    for judges in used:
        assert list(judges) == [judge, "refusal"]
        assert judges["refusal"].labels == PhraseJudge(labels=[*labels]).labels
