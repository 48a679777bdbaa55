"""Preserving and reverting from folder to folder, streamed, live and in fleets."""

import json
import re
import types

import fleets
import plain_prune
import pytest
import tiny
import torch
from safetensors.torch import load_file
from stages import HARM, TASK

from antidote_fast import ActivationNorms as Norms
from antidote_fast import oneshot
from antidote_fast.cli import inspect
from antidote_fast.cli.show import summary
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.manifest import sha256_file, verify_folder
from antidote_fast.fleet import fleet
from antidote_fast.masks import load_masks
from antidote_fast.pruning.report import PruneReport
from antidote_fast.selection import Selection
from antidote_fast.stages import calibrate, prune

SCOPES = ["row", "tensor", "global"]


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    """Folders of a base, its aligned twin and an adapter; harmful data and data of a task."""
    root = tmp_path_factory.mktemp("preserve")
    for name, rows in (("harm", HARM), ("task", TASK)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = ("model", "twin", "gpt2", "adapter")
    tiny.save_model(tiny.build("gpt2", seed=1), root / "gpt2-twin")
    paths = {name: str(folders / name) for name in names}
    data = {name: str(root / f"{name}.jsonl") for name in ("harm", "task")}
    return types.SimpleNamespace(root=root, gpt2_twin=str(root / "gpt2-twin"), **paths, **data)


def fields(made, out, **options):
    values = {"model_name_or_path": made.model, "dataset": made.harm, "ratio": 0.3}
    return values | {"output_dir": str(out), "max_seq_length": 60, "device": "cpu"} | options


def run(made, out, **options):
    return prune.run(PruneConfig(**fields(made, out, **options)))


def weights(folder):
    [file] = (p for p in folder.glob("*model.safetensors"))
    return load_file(file)


def read(folder, keys):
    return open_checkpoint(folder).read(keys)


def expected(source, norms, preserve, config, base=None):
    """{key: (out, in) or, as it is saved, pruned weight} by a plain sort."""
    named = norms or preserve
    turn = lambda key, w: w.t() if key in named.transposed else w  # noqa: E731
    state = {key: turn(key, value) for key, value in read(source, named.keys).items()}
    bases = base and {key: turn(key, value) for key, value in read(base, named.keys).items()}
    by = lambda one: one and {k: one.act_norm(k, config.scope) for k in state}  # noqa: E731
    masks = plain_prune.masks(state, by(norms), config.selection, by(preserve), bases)
    pruned = {
        key: turn(key, plain_prune.removed(value, masks[key], bases and bases[key]))
        for key, value in state.items()
    }
    return pruned, sum(int(mask.sum()) for mask in masks.values())


def same_bits(found, wanted):
    return all(
        torch.equal(found[key].view(torch.int32), value.contiguous().view(torch.int32))
        for key, value in wanted.items()
    )


# --- preserving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["adapter", "model", "gpt2", "magnitude"])
def test_folder_to_folder(kind, scope, made, tmp_path):
    options = {
        "adapter": {"adapter": made.adapter},
        "model": {"preserve_ratio": 0.15},
        "gpt2": {"model_name_or_path": made.gpt2},
        "magnitude": {"score": "magnitude", "dataset": None},
    }[kind]
    out = tmp_path / "out"
    saved = {"save_norms": True, "save_masks": True}
    options = {"scope": scope, "preserve_dataset": made.task} | options
    config = PruneConfig(**fields(made, out, **options, **saved))
    report = prune.run(config)
    norms = None if kind == "magnitude" else Norms.load(out / "norms.safetensors")
    preserve = Norms.load(out / "preserve-norms.safetensors")
    source = config.adapter or config.model_name_or_path
    wanted, removed = expected(source, norms, preserve, config)
    found = read(out, wanted)
    assert same_bits(found, wanted)
    assert report["num_pruned"] == removed
    assert report["num_preserved"] > 0
    assert report["preserve_ratio"] == (0.15 if kind == "model" else 0.3)
    assert report["preserve_data"]["num_records"] == report["preserve_data"]["num_sequences"] == 6
    assert report["inputs"][made.task] == sha256_file(made.task)
    if norms is not None:
        assert report["num_tokens"] == norms.num_tokens
        assert report["preserve_data"]["num_tokens"] == preserve.num_tokens
    masks, _ = load_masks(out / "masks.safetensors")
    assert sum(mask.count() for mask in masks.values()) == removed
    card = (out / "README.md").read_text()
    assert f"{report['num_preserved']:,}, among the top" in card
    assert f"{preserve.num_tokens} tokens of 6 other examples" in card
    assert "are zeros in an ordinary dense file" in card
    assert PruneReport.from_dict(report).num_preserved == report["num_preserved"]
    assert verify_folder(out) == []
    assert not any(row["output"] in card + json.dumps(report) for row in (*HARM, *TASK))

    inspected, problems = inspect.inspect(out)
    assert inspected["preserve-norms.safetensors"]["num_sequences"] == "6"
    assert problems == []
    line = summary(report, "OUT")
    assert line.startswith(f"removed {removed:,} of ")
    assert f"layers, kept {report['num_preserved']:,} that other data need in " in line

    # From norms that are there no model is loaded; the result is the same.
    file = str(out / "preserve-norms.safetensors")
    again = options | {"preserve_dataset": None, "preserve_norms": file}
    if norms is not None:
        again |= {"dataset": None, "norms": str(out / "norms.safetensors")}
    run(made, tmp_path / "again", **again)
    assert same_bits(read(tmp_path / "again", wanted), wanted)


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["adapter", "model", "gpt2"])
def test_streamed_as_in_memory(kind, scope, score, made, tmp_path):
    options = {"adapter": made.adapter} if kind == "adapter" else {}
    if kind == "gpt2":
        options = {"model_name_or_path": made.gpt2}
    common = {**fields(made, tmp_path / "norms", **options), "dataset": made.task}
    del common["ratio"]
    calibrate.run(CalibrateConfig(**common, stream=True))
    options |= {"scope": scope, "score": score, "preserve_norms": str(tmp_path / "norms")}
    options |= {"dataset": made.harm if score == "wanda" else None, "save_norms": True}
    first = run(made, tmp_path / "a", **options)
    second = run(made, tmp_path / "b", **options, stream=True)
    keys = [layer["key"] for layer in first["layers"]]
    assert same_bits(read(tmp_path / "b", keys), read(tmp_path / "a", keys))
    for name in ("num_pruned", "num_preserved", "preserve_ratio"):
        assert first[name] == second[name]
    assert first["num_preserved"] > 0
    drop = ("seconds", "zero_norm_channels")
    plain = [
        [{k: v for k, v in x.items() if k not in drop} for x in r["layers"]]
        for r in (first, second)
    ]
    assert plain[0] == plain[1]
    assert (tmp_path / "b" / "preserve-norms.safetensors").exists()


def test_live_models_with_records_or_norms(made, tmp_path):
    run(made, tmp_path / "out", preserve_dataset=made.task, save_norms=True, preserve_ratio=0.2)
    wanted = weights(tmp_path / "out")
    live = tiny.build()
    options = {"max_seq_length": 60, "ratio": 0.3, "preserve_ratio": 0.2}
    report = oneshot(
        live, dataset=HARM, preserve_dataset=TASK, tokenizer=tiny.tokenizer(), **options
    )
    assert report.num_preserved > 0
    state = live.state_dict()
    assert all(torch.equal(state[key], value) for key, value in wanted.items())
    live = tiny.build()
    norms = Norms.load(tmp_path / "out" / "norms.safetensors")
    kept = Norms.load(tmp_path / "out" / "preserve-norms.safetensors")
    oneshot(live, norms=norms, preserve_norms=kept, output_dir=tmp_path / "live", **options)
    assert same_bits(weights(tmp_path / "live"), wanted)
    oneshot(
        made.model,
        dataset=HARM,
        preserve_dataset=TASK,
        output_dir=tmp_path / "records",
        device="cpu",
        **options,
    )
    assert same_bits(weights(tmp_path / "records"), wanted)
    with pytest.raises(DataError, match=r"^preserve_dataset: no records"):
        oneshot(made.model, dataset=HARM, preserve_dataset=[], output_dir=tmp_path / "x")
    with pytest.raises(UsageError, match=r"^tokenizer=None: must be"):
        oneshot(tiny.build(), norms=norms, preserve_dataset=TASK)


def test_a_fleet_of_two(made, tmp_path):
    for seed in (0, 1):
        tiny.save_adapter(tiny.add_lora(tiny.build(), seed=seed), tmp_path / f"adapter-{seed}")
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, TASK[:3])))
    jobs = [
        {"adapter": "adapter-0"},
        {"adapter": "adapter-1", "preserve_dataset": "other.jsonl", "preserve_ratio": 0.1},
    ]
    path = fleets.manifest(tmp_path, *jobs)
    common = {k: v for k, v in fields(made, tmp_path / "out").items()}
    common |= {"manifest": str(path), "preserve_dataset": made.task, "save_norms": True}
    report = fleet.run(FleetConfig(**common))
    assert fleets.statuses(report) == {"adapter-0": "done", "adapter-1": "done"}
    others = (
        {"preserve_dataset": made.task},
        {"preserve_dataset": str(tmp_path / "other.jsonl"), "preserve_ratio": 0.1},
    )
    for seed, options in enumerate(others):
        alone = run(
            made, tmp_path / f"alone-{seed}", adapter=str(tmp_path / f"adapter-{seed}"), **options
        )
        out = tmp_path / "out" / f"adapter-{seed}"
        assert fleets.weights_of(out) == fleets.weights_of(tmp_path / f"alone-{seed}")
        theirs = json.loads((out / "report.json").read_text())
        for name in ("num_pruned", "num_preserved", "preserve_data"):
            assert theirs[name] == alone[name]
        assert (out / "preserve-norms.safetensors").exists()
    assert fleets.statuses(fleet.run(FleetConfig(**common))) == {
        "adapter-0": "skipped",
        "adapter-1": "skipped",
    }
    # The same two files, the other way round, are another job.
    swapped = common | {"dataset": made.task, "preserve_dataset": made.harm}
    one = fleets.manifest(tmp_path, jobs[0], name="one.jsonl")
    with pytest.raises(Exception, match="was made with another dataset than"):
        fleet.run(FleetConfig(**swapped | {"manifest": str(one)}))
    with pytest.raises(Exception, match="was made with another preserve_dataset than None"):
        fleet.run(FleetConfig(**common | {"preserve_dataset": None, "manifest": str(one)}))


# --- reverting ------------------------------------------------------------------------------------


def test_the_aligned_models_name_of_earlier_in_python(made, tmp_path):
    options = fields(made, tmp_path / "out", base_model=made.twin)
    with pytest.warns(UserWarning, match="base_model is taken as aligned_model"):
        report = oneshot(options.pop("model_name_or_path"), **options)
    assert report.reverted
    with pytest.raises(UsageError, match="base_model: must be left out with aligned_model"):
        oneshot(made.model, **options, aligned_model="x")


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["model", "gpt2", "preserving", "random"])
def test_removed_weights_take_the_aligned_models_values(kind, scope, delta, made, tmp_path):
    aligned = made.gpt2_twin if kind == "gpt2" else made.twin
    options = {"scope": scope, "aligned_model": aligned, "score_delta": delta, "save_norms": True}
    if kind == "gpt2":
        options["model_name_or_path"] = made.gpt2
    elif kind == "preserving":
        options |= {"preserve_dataset": made.task, "preserve_ratio": 0.1}
    elif kind == "random":
        options |= {"score": "random", "dataset": None, "score_delta": False}
    out = tmp_path / "out"
    config = PruneConfig(**fields(made, out, **options))
    report = prune.run(config)
    assert (report["reverted"], report["score_delta"]) == (True, config.score_delta)
    assert report["aligned_model_fingerprint"] == open_checkpoint(aligned).fingerprint()
    assert report["inputs"][f"{aligned}/model.safetensors"]
    keys = [layer["key"] for layer in report["layers"]]
    if kind != "random":
        norms = Norms.load(out / "norms.safetensors")
        kept = None
        if kind == "preserving":
            kept = Norms.load(out / "preserve-norms.safetensors")
        wanted, removed = expected(config.model_name_or_path, norms, kept, config, aligned)
        assert same_bits(read(out, keys), wanted)
        assert report["num_pruned"] == removed
    before, after = read(config.model_name_or_path, keys), read(out, keys)
    theirs = read(aligned, keys)
    for key in keys:
        changed = after[key] != before[key]
        assert changed.any()
        assert torch.equal(after[key][changed], theirs[key][changed])
    assert summary(report, "OUT").startswith(f"reverted {report['num_pruned']:,} of ")
    card = (out / "README.md").read_text()
    assert "have the values of the aligned model" in card
    assert "are zeros" not in card
    assert ("of the difference from the aligned model" in card) == config.score_delta
    assert verify_folder(out) == []

    if kind == "preserving":
        options |= {"preserve_dataset": None}
        options["preserve_norms"] = str(out / "preserve-norms.safetensors")
    streamed = run(made, tmp_path / "streamed", **options, stream=True)
    assert same_bits(read(tmp_path / "streamed", keys), after)
    for name in ("num_pruned", "num_preserved", "reverted", "score_delta"):
        assert streamed[name] == report[name]


def test_a_live_model_reverts_as_its_folder(made, tmp_path):
    options = {"aligned_model": made.twin, "score_delta": True, "ratio": 0.3, "max_seq_length": 60}
    run(made, tmp_path / "out", **options)
    live = tiny.build()
    report = oneshot(
        live,
        dataset=HARM,
        tokenizer=tiny.tokenizer(),
        output_dir=tmp_path / "live",
        **options,
    )
    assert report.reverted
    state = live.state_dict()
    wanted = weights(tmp_path / "out")
    assert all(torch.equal(state[key], value) for key, value in wanted.items())
    written = json.loads((tmp_path / "live" / "report.json").read_text())
    assert written["aligned_model_fingerprint"]
    with pytest.raises(UsageError, match=r"^aligned_model=.*: must be left out with an adapter"):
        oneshot(tiny.add_lora(tiny.build()), dataset=HARM, tokenizer=tiny.tokenizer(), **options)


def test_a_base_in_another_dtype(made, tmp_path):
    narrow = tiny.save_model(tiny.build(seed=1, dtype=torch.bfloat16), tmp_path / "narrow")
    run(made, tmp_path / "out", aligned_model=str(narrow))
    tiny.save_model(tiny.build(dtype=torch.bfloat16), tmp_path / "model")
    options = {"model_name_or_path": str(tmp_path / "model"), "aligned_model": made.twin}
    for stream in (False, True):
        with pytest.raises(
            DataError, match=r"is torch.float32 in base_weights, and torch.bfloat16"
        ):
            run(made, tmp_path / "refused", **options, stream=stream)
    assert not (tmp_path / "refused").exists()


def test_what_decides_the_result_is_part_of_the_inputs(made, tmp_path):
    """Resume takes a folder that is whole; not with another task, base or ratio."""
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, TASK[:4])))
    options = {"aligned_model": made.twin, "preserve_dataset": made.task, "resume": True}
    first = run(made, tmp_path / "out", **options)
    assert run(made, tmp_path / "out", **options)["created"] == first["created"]
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((made.root / "task.jsonl").read_bytes())
    same = options | {"preserve_dataset": str(moved)}
    assert run(made, tmp_path / "out", **same)["config"] == first["config"]
    tiny.save_model(tiny.build(seed=2), tmp_path / "another")
    for change in (
        {"preserve_dataset": str(other)},
        {"aligned_model": str(tmp_path / "another")},
        {"preserve_ratio": 0.25},
        {"score_delta": True},
        {"aligned_model": None},
    ):
        with pytest.raises(DataError, match="was made from other data, another model"):
            run(made, tmp_path / "out", **options | change)


# --- refusals -------------------------------------------------------------------------------------

PRESERVE = {"preserve_dataset": "task"}
NEVER = "be left out with"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            PRESERVE | {"preserve_norms": "x"},
            UsageError,
            "preserve_norms='x': must be left out with preserve_dataset",
        ),
        (
            {"preserve_ratio": 0.2},
            UsageError,
            "preserve_ratio=0.2: must be given with preserve_dataset or preserve_norms",
        ),
        (PRESERVE | {"preserve_ratio": 1.5}, UsageError, "preserve_ratio=1.5: must be in [0, 1]"),
        (PRESERVE | {"preserve_ratio": -0.1}, UsageError, "preserve_ratio=-0.1: must be in [0, 1]"),
        (
            PRESERVE | {"stream": True},
            UsageError,
            "must be left out with stream; calibrate --stream on it first, and give that folder as "
            "preserve_norms",
        ),
        (
            PRESERVE | {"score": "random"},
            UsageError,
            "preserve_dataset='TASK': must be left out with score random",
        ),
        (
            {"preserve_norms": "x", "score": "random"},
            UsageError,
            "preserve_norms='x': must be left out with score random",
        ),
        (
            PRESERVE | {"paper": True},
            UsageError,
            "preserve_dataset='TASK': must be left out with pa",
        ),
        (
            {"aligned_model": "x", "paper": True},
            UsageError,
            "aligned_model='x': must be left out with pa",
        ),
        (
            {"score_delta": True},
            UsageError,
            "score_delta=True: must be left out without aligned_model",
        ),
        (
            {"score_delta": True, "aligned_model": "x", "score": "random"},
            UsageError,
            "score_delta=True: must be left out with score random",
        ),
        (
            {"aligned_model": "x", "adapter": "y"},
            UsageError,
            "aligned_model='x': must be left out with adapter, whose zero already falls back to "
            "the aligned model",
        ),
        ({"preserve_norms": "/none"}, DataError, "preserve_norms='/none': no such file"),
        ({"preserve_dataset": "/none.json"}, DataError, "/none.json"),
        ({"aligned_model": "/none"}, DataError, "aligned_model='/none': no such folder"),
        ({"aligned_model": "ADAPTER"}, DataError, "is a PEFT adapter; give a whole model"),
        ({"aligned_model": "GPT2"}, DataError, "is a gpt2 model, and the one to prune is llama"),
        (
            {"aligned_model": "DEEP"},
            DataError,
            "has 'layers.2.mlp.down_proj.weight' as (32, 48), and the model to prune as no tensor",
        ),
        (
            {"aligned_model": "WIDE"},
            DataError,
            "has 'layers.0.mlp.down_proj.weight' as (32, 64), and the model to prune as (32, 48)",
        ),
        ({"preserve_norms": "GPT2-NORMS"}, DataError, "preserve_norms: were collected on another"),
        ({"preserve_norms": "UP-NORMS"}, DataError, "preserve_norms: lack 6 of 6 weights to prune"),
        (
            {"preserve_norms": "UP-NORMS", "targets": ["q_proj"]},
            DataError,
            "preserve_norms: hold no weight 'model.layers.0.self_attn.q_proj.weight'",
        ),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items())[:60] if isinstance(value, dict) else ""
    ),
)
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_refusals_leave_nothing(options, error, says, dry, made, odd, tmp_path):
    from antidote_fast.planning.dry_run import plan

    places = {"task": made.task, "ADAPTER": made.adapter, "GPT2": made.gpt2} | odd
    options = {k: places.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    says = says.replace("TASK", made.task)
    do = plan if dry else prune.run
    with pytest.raises(error, match=re.escape(says)) as raised:
        do(PruneConfig(**fields(made, tmp_path / "out", **options)))
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def odd(made, tmp_path_factory):
    """What does not go together with the model."""
    import transformers as tf

    root = tmp_path_factory.mktemp("odd")
    tiny.save_model(tiny.build(layers=3), root / "deep")
    wide = tiny._config("llama", 2)
    wide.intermediate_size = 64
    tiny.save_model(tf.AutoModelForCausalLM.from_config(wide), root / "wide")
    common = {"dataset": made.task, "max_seq_length": 60, "device": "cpu"}
    for name, model, targets in (("gpt2", made.gpt2, None), ("up", made.model, ["up_proj"])):
        out = str(root / f"{name}-norms")
        calibrate.run(
            CalibrateConfig(model_name_or_path=model, output_dir=out, targets=targets, **common)
        )
    names = {"DEEP": "deep", "WIDE": "wide", "GPT2-NORMS": "gpt2-norms", "UP-NORMS": "up-norms"}
    return {key: str(root / name) for key, name in names.items()}


def test_selections_of_a_config():
    config = PruneConfig(
        model_name_or_path="m",
        output_dir="o",
        dataset="d",
        preserve_norms="n",
        preserve_ratio=0.0,
        aligned_model="b",
        score_delta=True,
        scope="global",
        ratio=0.25,
    )
    wanted = Selection(0.25, scope="global", preserve_ratio=0.0, score_delta=True)
    assert config.selection == wanted
