"""What a stage would refuse, its plan refuses in the same words and with the same exit code."""

import errno
import os
import shutil

import pytest
import stages
import tiny
from stages import fleet_words, last_line, stage_words, tree

from antidote_fast.cli import entry
from antidote_fast.config import flags
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.fleet import fleet
from antidote_fast.models import footprint
from antidote_fast.planning.dry_run import plan


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    stages.briefly(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base, an adapter, data and norms."""
    return stages.make(tmp_path_factory.mktemp("dry"))


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
    code = entry.main([*words, "--dry_run"])
    planned = capsys.readouterr()
    assert code in (2, 3, 4)
    assert entry.main(words) == code
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
    assert entry.main([*words, "--dry_run"]) == 3
    planned = last_line(capsys.readouterr().err)
    assert entry.main(words) == 3
    assert last_line(capsys.readouterr().err) == planned
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["calibrate", "prune", "align", "finetune", "evaluate"])
def test_what_cannot_fit_is_refused_before_weights_load(stage, made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(footprint, "available_memory", lambda: 50_000)
    words = [*stage_words(made, stage), "--output_dir", str(tmp_path / "out")]
    assert entry.main([*words, "--dry_run"]) == 1
    planned = capsys.readouterr()
    assert planned.out.startswith(f"plan of {stage}")  # the numbers first
    assert entry.main(words) == 1
    refused = last_line(capsys.readouterr().err)
    assert refused == last_line(planned.err)
    assert "50 kB are available on cpu" in refused
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["prune", "prune norms", "align", "finetune full"])
def test_a_full_disk_is_refused_before_the_work(stage, made, tmp_path, capsys, monkeypatch):
    disk = type("Usage", (), {"free": 1000, "total": 10**9})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    words = [*stage_words(made, stage), "--output_dir", str(tmp_path / "out")]
    assert entry.main([*words, "--dry_run"]) == 1
    planned = capsys.readouterr().err
    assert entry.main(words) == 1
    for text in (planned, capsys.readouterr().err):
        assert "0.00 GB needed, 0.00 GB free on its disk" in text
    assert not list(tmp_path.iterdir())


def test_too_little_memory_for_a_block_ends_a_plan_as_it_ends_the_stage(made, tmp_path, capsys):
    words = [*stage_words(made, "prune stream"), "--output_dir", str(tmp_path / "out")]
    words += ["--max_memory", "1MB"]
    for more in (["--dry_run"], []):
        assert entry.main([*words, *more]) == 1
        line = last_line(capsys.readouterr().err)
        assert "max_memory='1MB': 1 MB is less than the " in line
    assert not (tmp_path / "out").exists()


def test_a_fleet_that_is_refused_ends_a_plan_alike(made, tmp_path):
    words = fleet_words(made, tmp_path, [{"adapter": "x", "colour": 1}])
    config, _ = flags.from_words(FleetConfig, words[1:], "fleet")
    with pytest.raises(DataError, match="colour") as planned:
        plan(config)
    with pytest.raises(DataError) as refused:
        fleet.run(config)
    assert str(planned.value) == str(refused.value)


def test_a_fleet_whose_base_cannot_fit_ends_a_plan_alike(made, tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "available_memory", lambda: 50_000)
    words = fleet_words(made, tmp_path, [{"adapter": str(made / "adapter")}])
    config, _ = flags.from_words(FleetConfig, words[1:], "fleet")
    planned = plan(config).refusal
    assert "its weights need 94.8 kB of memory, and 50 kB are available on cpu" in planned
    with pytest.raises(AntidoteError) as refused:
        fleet.run(config)
    assert str(refused.value) == planned


def stopped(config):
    """Leave what a streamed run leaves that was interrupted before its first block ended."""
    from antidote_fast.errors import Interrupted
    from antidote_fast.stages.inputs import open_inputs

    def begin():
        with open_inputs(config).run_folder() as run:
            run.save({"next": 1})
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        begin()


def test_a_run_that_was_interrupted_there_is_planned_with_resume_alone(made, tmp_path, capsys):
    words = [*stage_words(made, "prune stream"), "--output_dir", str(tmp_path / "out")]
    config, _ = flags.from_words(PruneConfig, words[1:], "prune")
    stopped(config)
    before = tree(tmp_path)
    for more in (["--dry_run"], []):
        assert entry.main([*words, *more]) == 3
        assert "a run was interrupted there; pass resume" in capsys.readouterr().err
    assert entry.main([*words, "--resume", "--dry_run"]) == 0
    assert "goes on where a run was interrupted" in capsys.readouterr().out
    for more in (["--dry_run"], []):
        assert entry.main([*words, "--resume", "--ratio", "0.2", *more]) == 3
        assert "other" in last_line(capsys.readouterr().err)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stage", ["prune stream", "prune adapter", "prune norms", "calibrate"])
def test_what_is_whole_is_left_with_resume(stage, made, tmp_path, capsys):
    words = [*stage_words(made, stage), "--output_dir", str(tmp_path / "out")]
    assert entry.main([*words, "--quiet"]) == 0
    capsys.readouterr()
    assert entry.main([*words, "--resume", "--dry_run"]) == 0
    assert "nothing would be done" in capsys.readouterr().out
    assert entry.main([*words, "--dry_run"]) == 3
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_plan_takes_little_of_a_small_disk(made, tmp_path, capsys, monkeypatch):
    sizes = []
    disk = type("Usage", (), {"free": 1 << 18, "total": 1 << 18})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    words = [*stage_words(made, "prune adapter"), "--output_dir", str(tmp_path / "out")]
    assert entry.main([*words, "--dry_run"]) == 0
    assert set(sizes) == {(1 << 18) // 8}
    assert capsys.readouterr().out.startswith("plan of prune")


def test_a_disk_that_a_plan_cannot_try(made, tmp_path, capsys, monkeypatch):
    def full(fd):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    words = [*stage_words(made, "prune adapter"), "--output_dir", str(tmp_path / "out")]
    assert entry.main([*words, "--dry_run"]) == 1
    told = f"output_dir={str(tmp_path / 'out')!r}: {os.strerror(errno.EDQUOT)}; nothing was written"
    assert last_line(capsys.readouterr().err) == f"antidote-fast: {told}"
