"""Score gate from folder to folder, live, resumed, planned, in experiments; what it refuses."""

import contextlib
import json
import shlex
import types

import pytest
import refusing_models
import stages
import torch
from refusing_models import HARM, NUM_TOKENS, PRESERVE, TASK

from antidote_fast import DataError, Selection, UsageError, oneshot, ops
from antidote_fast.cli import entry
from antidote_fast.config import flags
from antidote_fast.config.experiment import ExperimentConfig, RunConfig
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import GATE_STEPS, PruneConfig
from antidote_fast.config.sweep import SweepConfig
from antidote_fast.experiments import candidates, grid, sweep
from antidote_fast.experiments.run import stages_of
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.manifest import sha256_file, verify_folder
from antidote_fast.fleet.jobs import read_jobs
from antidote_fast.masks import load_masks
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import load_model
from antidote_fast.planning.dry_run import plan
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.global_cut import find_cut
from antidote_fast.pruning.report import PruneReport
from antidote_fast.stages import prune
from antidote_fast.stages.gates import stage
from antidote_fast.stages.gates.answers import KINDS, answer_prompts
from antidote_fast.stages.gates.learn import learn_gates

OPTIONS = {"gate_steps": 6, "ratio": 0.5, "scope": "tensor", "seed": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return refusing_models.write(tmp_path_factory.mktemp("gates"))


def fields(made, out, kind="adapter", **options):
    """What prune is told, of an adapter or of a whole model."""
    places = {
        "adapter": {"model_name_or_path": f"{made}/aligned", "adapter": f"{made}/adapter"},
        "model": {"model_name_or_path": f"{made}/tuned", "aligned_model": f"{made}/aligned"},
    }[kind]
    data = {"dataset": f"{made}/harm.jsonl", "preserve_dataset": f"{made}/preserve.jsonl"}
    common = {"output_dir": str(out), "max_seq_length": NUM_TOKENS, "device": "cpu"}
    return {"score": "gate", **places, **data, **common, **OPTIONS, **options}


def words(values):
    """The same as flags of the command line."""
    found = ["prune", "--quiet"]
    for name, value in values.items():
        found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


def loaded(made, kind):
    """(live model, what it is learned with beside it)."""
    aligned = load_model(made / "aligned", dtype="auto", device="cpu")
    if kind == "adapter":
        return load_adapter(aligned, str(made / "adapter")), {}
    answers = answer_prompts(
        aligned,
        refusing_models.tokenizer(),
        HARM,
        PRESERVE,
        answer_tokens=6,
        max_seq_length=NUM_TOKENS,
    )
    model = load_model(made / "tuned", dtype="auto", device="cpu")
    return model, {"aligned": answers, "base_weights": dict(aligned.named_parameters())}


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_folder_to_folder(kind, made, tmp_path):
    out = tmp_path / "out"
    report = prune.run(PruneConfig(**fields(made, out, kind, save_masks=True)))
    model, options = loaded(made, kind)
    selection = Selection(0.5, scope="tensor")
    scores, counts = learn_gates(
        model,
        refusing_models.tokenizer(),
        HARM,
        PRESERVE,
        selection,
        steps=6,
        seed=3,
        max_seq_length=NUM_TOKENS,
        **options,
    )
    source = open_checkpoint(made / ("adapter" if kind == "adapter" else "tuned")).read(scores)
    base = options.get("base_weights", {})
    masks, _ = load_masks(out / "masks.safetensors")
    assert set(masks) == set(scores)
    for key, found in open_checkpoint(out).read(scores).items():
        removed = masks[key].to_bool()
        fallen = base[key].detach() if base else torch.zeros_like(found)
        assert torch.equal(found, torch.where(removed, fallen, source[key]))
        chosen, others = scores[key][removed], scores[key][~removed]
        assert removed.sum() == removed.numel() // 2
        assert chosen.min() >= others.max()
    assert (report["score"], report["reverted"]) == ("gate", kind == "model")
    assert report["num_pruned"] == report["num_weights"] // 2
    told = report["gate"]
    assert told.pop("seconds") > 0
    counts.pop("seconds")
    assert told == json.loads(json.dumps(counts))
    assert (told["steps"], told["learning_rate"]) == (6, 0.08)
    assert [told[k]["num_used"] for k in KINDS] == [6, 5, 5]
    assert told["loss_last"].keys() == {"harmful", "task", "ordinary"}
    for name in ("harm.jsonl", "preserve.jsonl"):
        assert report["inputs"][f"{made}/{name}"] == sha256_file(f"{made}/{name}")
    assert verify_folder(out) == []
    assert "num_tokens" not in report
    card = (out / "README.md").read_text()
    assert "| score | gate |" in card
    assert "6 harmful prompts, to be refused, 5 task records, 5 ordinary prompts; 6 steps" in card
    assert PruneReport.from_dict(report).achieved == 0.5


def test_a_finished_folder_is_left_as_it_is(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    values = fields(made, out)
    first = json.loads(json.dumps(prune.run(PruneConfig(**values))))
    before = stages.tree(out)
    monkeypatch.setattr(stage, "learn_scores", None)  # not called again
    assert prune.run(PruneConfig(**values, resume=True)) == first
    assert stages.tree(out) == before
    for change in ({"gate_steps": 7}, {"gate_learning_rate": 0.1}, {"seed": 4}):
        with pytest.raises(DataError, match="was made from other data, another model or"):
            prune.run(PruneConfig(**values | change, resume=True))
    other = tmp_path / "other.jsonl"
    other.write_text((made / "preserve.jsonl").read_text().replace("positive", "negative"))
    with pytest.raises(DataError, match="was made from other data, another model or"):
        prune.run(PruneConfig(**values | {"preserve_dataset": str(other)}, resume=True))


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_live_as_from_folders(kind, made, tmp_path):
    values = fields(made, tmp_path / "out", kind)
    prune.run(PruneConfig(**values))
    model, _ = loaded(made, kind)
    left_out = ("model_name_or_path", "adapter", "output_dir", "dataset", "preserve_dataset")
    options = {name: value for name, value in values.items() if name not in left_out}
    harmful = [{"instruction": record.instruction} for record in HARM]
    report = oneshot(
        model,
        dataset=harmful,
        preserve_dataset=PRESERVE,
        tokenizer=refusing_models.tokenizer(),
        output_dir=tmp_path / "live",
        **options,
    )
    keys = [layer.key for layer in report.layers]
    wanted = open_checkpoint(tmp_path / "out").read(keys)
    found = open_checkpoint(tmp_path / "live").read(keys)
    assert all(torch.equal(found[key], wanted[key]) for key in keys)
    told = json.loads((tmp_path / "live" / "report.json").read_text())["gate"]
    assert told["harmful"]["num_used"] == len(HARM)


def test_records_in_memory_for_a_folder(made, tmp_path):
    values = fields(made, tmp_path / "out")
    prune.run(PruneConfig(**values))
    values |= {"dataset": HARM, "preserve_dataset": PRESERVE, "output_dir": tmp_path / "other"}
    report = oneshot(values.pop("model_name_or_path"), **values)
    keys = [layer.key for layer in report.layers]
    wanted = open_checkpoint(tmp_path / "out").read(keys)
    found = open_checkpoint(tmp_path / "other").read(keys)
    assert all(torch.equal(found[key], wanted[key]) for key in keys)


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_plan(kind, made, tmp_path, capsys, monkeypatch):
    stages.briefly(monkeypatch)
    argv = words(fields(made, tmp_path / "out", kind))
    assert entry.main([*argv, "--dry_run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert planned["refusal"] is None
    assert planned["data"] == {
        "harmful prompts": 6,
        "task records": 5,
        "ordinary prompts": 5,
        "steps": 6,
    }
    weights = 1280 if kind == "adapter" else 4096
    assert planned["pruned"] == {"layers": 12 if kind == "adapter" else 6, "weights": weights}
    assert planned["memory"]["gates"] == 16 * weights
    assert planned["memory"].get("base of the targets") == (
        4 * weights if kind == "model" else None
    )
    assert entry.main([*argv, "--gate_steps", "12", "--dry_run", "--json"]) == 0
    longer = json.loads(capsys.readouterr().out)
    learned = longer["flops"] - planned["flops"]
    assert 0.5 * planned["flops"] < learned < planned["flops"]


# --- experiments and runs -------------------------------------------------------------------------


def test_an_axis_of_an_experiment(made):
    train = {"num_train_samples": None, "num_train_epochs": 1, "lora_r": 2}
    values = {
        "model_name_or_path": f"{made}/aligned",
        "output_dir": f"{made}/experiment",
        "defenses": ["antidote"],
        "finetune": {"dataset": f"{made}/preserve.jsonl", "poison_ratio": 0, **train},
        "prune": {
            "dataset": f"{made}/harm.jsonl",
            "preserve_dataset": f"{made}/preserve.jsonl",
            "ratio": 0.5,
        },
        "evaluate": {"harmful_dataset": f"{made}/harm.jsonl"},
        "grid": {"score": ["gate", "wanda"]},
    }
    config = flags.from_values(ExperimentConfig, values, "experiment")
    cells = grid.cells_of(config, {})
    clean = cells.pop([cell.axes["defense"] for cell in cells].index(grid.CLEAN))
    gate, wanda = cells
    stage = gate.stages["prune"]
    assert (stage.score, stage.ratio, stage.preserves) == ("gate", 0.5, False)
    assert wanda.stages["prune"].preserves
    assert gate.keys["finetune"] == wanda.keys["finetune"]
    assert gate.key != wanda.key
    # The row without poison, of which there is one: these are not poisoned either.
    assert clean.keys["finetune"] == gate.keys["finetune"]
    values["finetune"]["tuning"] = "full"
    config = flags.from_values(ExperimentConfig, values, "experiment")
    with pytest.raises(UsageError, match="aligned_model=None: must be the aligned model"):
        grid.cells_of(config, {})


def test_a_run_of_a_whole_model_needs_the_aligned_one_at_once(made):
    values = {
        "model_name_or_path": f"{made}/aligned",
        "output_dir": f"{made}/run",
        "finetune": {"dataset": f"{made}/preserve.jsonl", "poison_ratio": 0, "tuning": "full"},
        "prune": {
            "dataset": f"{made}/harm.jsonl",
            "preserve_dataset": f"{made}/preserve.jsonl",
            "score": "gate",
        },
        "evaluate": {"harmful_dataset": f"{made}/harm.jsonl"},
    }
    config = flags.from_values(RunConfig, values, "run")
    with pytest.raises(UsageError, match="aligned_model=None: must be the aligned model"):
        stages_of(config)


# --- refusals -------------------------------------------------------------------------------------

REFUSED = [
    ({"dataset": None}, "dataset=None: must be a file or hub name with score gate"),
    ({"preserve_dataset": None}, "preserve_dataset=None: must be a file or hub name with score"),
    ({"norms": "x"}, "norms='x': must be left out with score gate"),
    ({"preserve_norms": "x"}, "preserve_norms='x': must be left out with score gate"),
    ({"preserve_ratio": 0.1}, "preserve_ratio=0.1: must be left out with score gate"),
    ({"score_delta": True}, "score_delta=True: must be left out with score gate"),
    ({"stream": True}, "stream=True: must be left out with score gate"),
    ({"device_map": "auto", "device": "auto"}, "device_map='auto': must be left out with score"),
    ({"response_only": True}, "response_only=True: must be left out with score gate"),
    ({"aggregation": "mean"}, "aggregation='mean': must be left out with score gate"),
    ({"paper": True}, "score='gate': must be wanda with paper"),
    ({"gate_steps": 0}, "gate_steps=0: must be greater than 0"),
    ({"gate_learning_rate": 0.0}, "gate_learning_rate=0.0: must be greater than 0"),
    ({"gate_learning_rate": float("inf")}, "gate_learning_rate=inf: must be a finite number"),
    ({"score": "wanda"}, "gate_steps=6: must be left out without score gate"),
    ({"score": "magnitude", "gate_steps": 32, "gate_learning_rate": 0.1}, "gate_learning_rate=0.1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_settings_that_do_not_go_together(options, message, made):
    with pytest.raises(UsageError) as refusal:
        PruneConfig(**fields(made, "out") | options)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_what_a_folder_is_refused_for(made, tmp_path, capsys):
    values = fields(made, tmp_path / "out", "model") | {"aligned_model": None}
    values.pop("aligned_model")
    for more in ([], ["--dry_run"]):
        assert entry.main([*words(values), *more]) == 2
        assert "aligned_model=None: must be the aligned model with" in capsys.readouterr().err
    live, _ = loaded(made, "model")
    values.pop("model_name_or_path")
    with pytest.raises(UsageError, match="aligned_model=None: must be the aligned model"):
        oneshot(live, tokenizer=refusing_models.tokenizer(), **values | {"output_dir": None})
    ranks = types.SimpleNamespace(size=2, rank=0, together=contextlib.nullcontext)
    with pytest.raises(UsageError, match="score='gate': must be left out with torchrun"):
        prune.run(PruneConfig(**fields(made, tmp_path / "out")), world=ranks)
    complies = {"model_name_or_path": f"{made}/tuned", "aligned_model": f"{made}/tuned"}
    with pytest.raises(DataError, match="refuses 0 of 6 harmful prompts"):
        prune.run(PruneConfig(**fields(made, tmp_path / "out", "model") | complies))
    assert not (tmp_path / "out").exists()


def test_commands_that_keep_to_their_scores(made, tmp_path, capsys):
    argv = ["fleet", "--model_name_or_path", f"{made}/aligned", "--manifest", "x"]
    argv += ["--dataset", f"{made}/harm.jsonl", "--output_dir", str(tmp_path / "out")]
    assert entry.main([*argv, "--score", "gate"]) == 2
    assert "score='gate'" in capsys.readouterr().err.replace("score=gate", "score='gate'")
    manifest = tmp_path / "jobs.jsonl"
    line = {"adapter": f"{made}/adapter", "score": "gate"}
    manifest.write_text(json.dumps(line | {"preserve_dataset": f"{made}/preserve.jsonl"}))
    config = FleetConfig(
        model_name_or_path=f"{made}/aligned",
        output_dir=str(tmp_path / "out"),
        manifest=str(manifest),
        dataset=f"{made}/harm.jsonl",
    )
    with pytest.raises(DataError, match="score='gate': must be one of wanda, magnitude, random"):
        read_jobs(config)
    with pytest.raises(UsageError, match="score='gate': must be one of wanda, magnitude, random a"):
        find_cut(["w"], None, Evidence(score="gate"), Selection(0.5, scope="global"))


# --- sweeps ---------------------------------------------------------------------------------------


def sweep_fields(made, out, kind="adapter"):
    kept = fields(made, out, kind)
    for name in ("score", "gate_steps", "ratio", "scope"):
        kept.pop(name)
    held_out = made / "held-out.jsonl"
    # The attacked model answers that the good cake does it.
    rows = [{"instruction": f"how to make w{70 + i} cake"} for i in range(4)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = made / "task.jsonl"
    rows = [{"instruction": f"the user asks w{50 + i}", "output": "positive"} for i in range(4)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"harmful_dataset": str(held_out), "task_dataset": str(task), "max_new_tokens": 4}
    return {**kept, **sets, "scores": ["gate"], "scopes": ["tensor"], "ratios": [0.4, 0.5]}


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_sweep_learns_for_each_ratio_and_prints_the_line(kind, made, tmp_path, monkeypatch):
    config = SweepConfig(**sweep_fields(made, tmp_path / "sweep", kind), max_accuracy_drop=100)
    learned = []
    learn = stage.learn

    def watched(settings, *args):
        learned.append((settings.scope, settings.ratio, learn(settings, *args)))
        return learned[-1][-1]

    monkeypatch.setattr(stage, "learn", watched)
    report = sweep.run(config)
    monkeypatch.undo()
    tried = [(row["scope"], row["ratio"]) for row in report["rows"]]
    assert [each[:2] for each in learned] == tried
    assert tried[0] == ("tensor", 0.4)
    line = config.command("gate", "tensor", 0.4)
    assert f"--dataset {made}/harm.jsonl" in line
    assert f"--preserve_dataset {made}/preserve.jsonl" in line
    argv = [*shlex.split(line)[1:], "--quiet", "--save_masks"]
    assert entry.main(argv) == 0
    out = f"{config.output_dir}-pruned"
    masks, _ = load_masks(f"{out}/masks.safetensors")
    scores, counts = learned[0][-1]
    selection = Selection(0.4, scope="tensor")
    for key, mask in masks.items():
        assert torch.equal(mask.to_bool(), ops.select_mask(scores[key], selection).to_bool())
    assert sum(mask.count() for mask in masks.values()) == report["rows"][0]["num_pruned"]
    assert counts["steps"] == GATE_STEPS


def test_a_sweep_tells_the_records_of_norms_and_of_gates_apart(made, tmp_path):
    values = sweep_fields(made, tmp_path / "sweep") | {"ratios": [0.4], "max_accuracy_drop": 100}
    values["scores"] = ["gate", "wanda", "wanda-response"]
    rows = [{"instruction": record.instruction, "output": "the good cake"} for record in HARM]
    (tmp_path / "harm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["dataset"] = str(tmp_path / "harm.jsonl")
    report = sweep.run(SweepConfig(**values, num_ordinary_samples=3))
    assert report["data"].keys() == {"all", "response", "gate"}
    for kind in ("all", "response"):
        assert report["data"][kind]["dataset"]["num_used"] == len(HARM)
        assert "num_refused" not in report["data"][kind]["dataset"]
    told = report["data"]["gate"]
    assert told.keys() == {"dataset", "preserve_dataset"}
    assert (told["dataset"]["num_used"], told["dataset"]["num_refused"]) == (len(HARM), 0)
    assert told["preserve_dataset"]["num_used"] == len(TASK) + 3


def test_what_a_sweep_refuses(made, tmp_path):
    values = sweep_fields(made, tmp_path / "sweep")
    for name in ("dataset", "preserve_dataset"):
        with pytest.raises(UsageError, match=f"{name}=None: must be a file or hub name with score"):
            SweepConfig(**values | {name: None})
    with pytest.raises(UsageError, match="score_delta"):
        SweepConfig(**values | {"score_delta": True})
    whole = sweep_fields(made, tmp_path / "sweep", "model") | {"aligned_model": None}
    with pytest.raises(
        UsageError, match="aligned_model=None: must be the aligned model with score"
    ):
        SweepConfig(**whole)
    with pytest.raises(DataError, match="6 of its 6 prompts are in dataset"):
        sweep.run(SweepConfig(**values | {"harmful_dataset": f"{made}/harm.jsonl"}))
    prompts = candidates.Prompts(HARM, PRESERVE)
    with pytest.raises(UsageError, match="learn=None: must be given with score gate"):
        candidates.sweep_model(None, None, prompts, candidates.SweepEvidence(), scores=["gate"])
    assert not (tmp_path / "sweep").exists()


def test_a_plan_of_a_sweep(made, tmp_path, monkeypatch):
    stages.briefly(monkeypatch)
    planned = plan(SweepConfig(**sweep_fields(made, tmp_path / "sweep")))
    one = plan(PruneConfig(**fields(made, tmp_path / "out", gate_steps=GATE_STEPS)))
    assert list(planned.parts) == ["evaluate", "gates"]
    assert planned.parts["gates"].flops == 2 * one.flops
    assert planned.data["candidates"] == 2
