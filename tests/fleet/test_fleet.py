"""Fleets on tiny models: the bits of prune, poisoned jobs, re-runs, shards, threads, progress."""

import dataclasses
import json
import re
import shutil
import sys
import threading

import fleets
import pytest
import tiny
import torch
from fleets import KINDS, as_prune, config, manifest, statuses, summary_of, times, weights_of
from safetensors.torch import load_file, save_file

from antidote_fast import DataError, UsageError
from antidote_fast.cli import entry
from antidote_fast.config.fleet import parse_shard
from antidote_fast.errors import AntidoteError, JobsSetAside
from antidote_fast.files.manifest import verify_folder
from antidote_fast.files.pruned_copy import write_pruned
from antidote_fast.fleet import fleet, worker
from antidote_fast.fleet import folder as fleet_folder
from antidote_fast.fleet.jobs import OVERRIDES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fleets.make(tmp_path_factory)


# --- the same as prune ----------------------------------------------------------------------------


def test_every_kind_of_adapter_is_pruned_as_prune_does(folders, tmp_path):
    out = tmp_path / "out"
    report = fleet.run(config(folders, out, save_norms=True, save_masks=True))
    assert set(statuses(report).values()) == {"done"}
    assert list(statuses(report)) == list(KINDS)
    for name in KINDS:
        theirs = as_prune(folders, name, tmp_path / name, save_norms=True, save_masks=True)
        mine = json.loads((out / name / "report.json").read_text())
        assert verify_folder(out / name) == []
        for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
            same = (out / name / file).read_bytes() == (tmp_path / name / file).read_bytes()
            assert same, (name, file)
        for file in ("norms.safetensors", "masks.safetensors"):  # metadata come in any order
            ours, others = load_file(out / name / file), load_file(tmp_path / name / file)
            assert list(ours) == list(others)
            assert all(torch.equal(ours[key], others[key]) for key in ours), (name, file)
        assert {p.name for p in (out / name).iterdir()} == {
            p.name for p in (tmp_path / name).iterdir()
        }
        assert set(mine) == set(theirs)
        for key in ("inputs", "num_tokens", "num_truncated", "achieved", "backend", "seed"):
            assert mine[key] == theirs[key], (name, key)
        changed = {"output_dir"}
        assert {k: v for k, v in mine["config"].items() if k not in changed} == {
            k: v for k, v in theirs["config"].items() if k not in changed
        }
        drop = ("seconds",)
        for ours, other in zip(mine["layers"], theirs["layers"], strict=True):
            other = {**other, "shape": list(other["shape"])}
            assert {k: v for k, v in ours.items() if k not in drop} == {
                k: v for k, v in other.items() if k not in drop
            }
        removed = load_file(out / name / "adapter_model.safetensors")
        before = load_file(folders.adapters / name / "adapter_model.safetensors")
        assert any(not torch.equal(removed[key], before[key]) for key in before)


def test_overrides_of_a_job_are_those_of_prune(folders, tmp_path):
    special = {
        "dataset": "other.jsonl",
        "ratio": 0.5,
        "scope": "global",
        "targets": ["lora_B"],
        "ignore": ["re:.*layers\\.0\\..*"],
        "response_only": True,
        "aggregation": "mean",
        "num_calibration_samples": 2,
        "max_seq_length": 40,
        "seed": 3,
    }
    assert set(special) < set(OVERRIDES)
    jobs = manifest(
        folders.root,
        {"adapter": "adapters/plain", "name": "one", **special},
        {"adapter": "adapters/plain2", "score": "magnitude", "scope": "tensor"},
        {"adapter": "adapters/plain", "name": "three", "score": "random", "seed": 4},
        {"adapter": "adapters/plain", "name": "four"},
        name="special.jsonl",
    )
    out = tmp_path / "out"
    fleet.run(config(folders, out, jobs))
    special["dataset"] = str(folders.root / "other.jsonl")
    as_prune(folders, "plain", tmp_path / "1", **special)
    as_prune(folders, "plain2", tmp_path / "2", score="magnitude", scope="tensor")
    as_prune(folders, "plain", tmp_path / "3", score="random", seed=4)
    as_prune(folders, "plain", tmp_path / "4")
    for name, same in (("one", "1"), ("plain2", "2"), ("three", "3"), ("four", "4")):
        assert weights_of(out / name) == weights_of(tmp_path / same), name


# --- poisoned jobs --------------------------------------------------------------------------------


def poison(folders, root):
    """{name: what its reason says} of adapters that no prune could take."""
    root.mkdir()

    def copy(name):
        shutil.copytree(folders.adapters / "plain", root / name)
        return root / name / "adapter_model.safetensors"

    tensors = load_file(folders.adapters / "plain" / "adapter_model.safetensors")
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key] * torch.nan}, copy("nan"))
    save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, copy("zero"))
    tiny.truncate(copy("cut"))
    copy("pickle").rename(root / "pickle" / "adapter_model.bin")
    save_file({k: v for k, v in tensors.items() if k != key}, copy("lacking"))
    save_file({k: v[:, :-1].clone() for k, v in tensors.items()}, copy("narrow"))
    config_file = copy("ia3").parent / "adapter_config.json"
    tiny.edit_json(config_file, lambda c: c.update(peft_type="IA3"))
    (copy("text").parent / "adapter_config.json").write_text("{not json")
    tiny.save_adapter(tiny.add_lora(tiny.build(layers=3)), root / "layers")
    tiny.save_model(tiny.build(), root / "model")
    return {
        "nan": "NaN or infinity",
        "zero": "norms are all zero|activation norms are zero",
        "cut": "is truncated",
        "pickle": "only safetensors are read",
        "lacking": "lacks lora_A",
        "narrow": "ranks|adapts",
        "ia3": "type IA3",
        "text": "is not valid JSON",
        "layers": "which the base .* lacks",
        "model": "is a whole model",
        "missing": "no such folder",
    }


def test_poisoned_jobs_are_set_aside_and_the_rest_is_done(folders, tmp_path, capsys):
    reasons = poison(folders, tmp_path / "bad")
    jobs, clean = [], ["plain", "dora", "plain2", "saved", "after"]
    for number, name in enumerate(reasons):
        jobs.append({"adapter": str(tmp_path / "bad" / name)})
        good = clean[number % len(clean)]
        jobs.append({"adapter": f"adapters/{good}", "name": f"good{number}"})
    path = manifest(folders.root, *jobs, name="poisoned.jsonl")
    out = tmp_path / "out"
    settings = config(folders, out, path)
    with pytest.raises(JobsSetAside, match=rf"{len(reasons)} of {len(jobs)} jobs") as raised:
        fleet.run(settings)
    report = raised.value.report
    assert report == summary_of(out)
    assert report["counts"]["failed"] == len(reasons)
    assert report["counts"]["done"] == len(reasons)
    for name, says in reasons.items():
        record = json.loads((out / "failed" / f"{name}.json").read_text())
        assert "\n" not in record["reason"]
        assert record["exit_code"] == 3, record
        assert re.search(says, record["reason"]), (name, record["reason"])
        assert not (out / name).exists()
    for good in clean:
        as_prune(folders, good, tmp_path / good)
    for number in range(len(reasons)):
        good = clean[number % len(clean)]
        assert weights_of(out / f"good{number}") == weights_of(tmp_path / good), good
    # Set right, the one job is done and its record gone; nothing else is done again.
    shutil.rmtree(tmp_path / "bad" / "nan")
    shutil.copytree(folders.adapters / "plain", tmp_path / "bad" / "nan")
    words = [f"--{k}={v}" for k, v in dataclasses.asdict(settings).items() if k in _GIVEN]
    capsys.readouterr()
    assert entry.main(["fleet", *words]) == 5
    captured = capsys.readouterr()
    assert f"1 of {len(jobs)} adapters pruned" in captured.out
    assert f"{len(reasons)} were done before, {len(reasons) - 1} set aside" in captured.out
    assert f"{len(reasons) - 1} of {len(jobs)} jobs are set aside, zero first:" in captured.err
    assert not (out / "failed" / "nan.json").exists()
    assert weights_of(out / "nan") == weights_of(tmp_path / "plain")


_GIVEN = ("model_name_or_path", "manifest", "dataset", "output_dir", "ratio")


def test_the_wrong_base_is_told_by_its_fingerprint(folders, tmp_path):
    tiny.save_model(tiny.build(seed=9), tmp_path / "other-base")
    # The adapters' config names the base by no folder; one pruned by this tool records it.
    as_prune(folders, "plain", tmp_path / "done")
    path = manifest(tmp_path, {"adapter": "done", "name": "again"})
    other = str(tmp_path / "other-base")
    with pytest.raises(JobsSetAside, match="was made for another base model"):
        fleet.run(config(folders, tmp_path / "out", path, model_name_or_path=other))


def test_an_adapter_changed_after_it_was_written_is_set_aside(folders, tmp_path):
    as_prune(folders, "plain", tmp_path / "done")
    file = tmp_path / "done" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    path = manifest(tmp_path, {"adapter": "done", "name": "again"})
    with pytest.raises(JobsSetAside, match=r"adapter_model\.safetensors: contents changed since"):
        fleet.run(config(folders, tmp_path / "out", path))


def test_what_no_job_could_do_without_ends_the_fleet(folders, tmp_path):
    out = tmp_path / "out"
    for options, says in (
        ({"dataset": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({"model_name_or_path": str(tmp_path / "none")}, "no such folder"),
        ({"model_name_or_path": str(folders.adapters / "plain")}, "is a PEFT adapter"),
    ):
        with pytest.raises(DataError, match=says):
            fleet.run(config(folders, out, **options))
    with pytest.raises(UsageError, match="backend"):
        fleet.run(config(folders, out, backend="none"))
    assert not out.exists()


# --- re-runs --------------------------------------------------------------------------------------


def test_a_rerun_skips_what_is_done_and_refuses_other_settings(folders, tmp_path):
    out = tmp_path / "out"
    path = manifest(
        folders.root, {"adapter": "adapters/plain"}, {"adapter": "adapters/dora"}, name="two.jsonl"
    )
    fleet.run(config(folders, out, path))
    before = times(out)
    report = fleet.run(config(folders, out, path))
    assert statuses(report) == {"plain": "skipped", "dora": "skipped"}
    assert times(out) == before
    for options, says in (
        ({"ratio": 0.4}, r"was made with ratio=0\.3, not 0\.4"),
        ({"targets": ["lora_A"]}, "was made with targets=None"),
        ({"dataset": str(folders.root / "other.jsonl")}, "was made with another dataset than"),
    ):
        with pytest.raises(JobsSetAside, match=says) as raised:
            fleet.run(config(folders, out, path, **options))
        assert raised.value.report["counts"]["failed"] == 2
    assert {
        p: p.stat().st_mtime_ns for p in out.rglob("*/*") if p.parent.name != "failed"
    } == before
    report = fleet.run(config(folders, out, path, ratio=0.4, overwrite=True))
    assert statuses(report) == {"plain": "done", "dora": "done"}
    assert not (out / "failed").exists()
    as_prune(folders, "dora", tmp_path / "dora", ratio=0.4)
    assert weights_of(out / "dora") == weights_of(tmp_path / "dora")


def test_a_folder_that_is_not_whole_or_not_ours_is_not_taken_for_done(folders, tmp_path):
    out = tmp_path / "out"
    path = manifest(folders.root, {"adapter": "adapters/plain"}, name="one.jsonl")
    fleet.run(config(folders, out, path))
    (out / "plain" / "README.md").unlink()
    with pytest.raises(JobsSetAside, match=r"is not whole: README\.md is missing"):
        fleet.run(config(folders, out, path))
    report = fleet.run(config(folders, out, path, overwrite=True))
    assert statuses(report) == {"plain": "done"}
    shutil.rmtree(out / "plain")
    (out / "plain").mkdir()
    (out / "plain" / "mine.txt").write_text("notes")
    for overwrite in (False, True):
        with pytest.raises(JobsSetAside, match=r"output_dir="):
            fleet.run(config(folders, out, path, overwrite=overwrite))
    assert (out / "plain" / "mine.txt").read_text() == "notes"


def test_an_adapter_or_base_that_changed_is_told(folders, tmp_path):
    shutil.copytree(folders.adapters / "plain", tmp_path / "a")
    path = manifest(tmp_path, {"adapter": "a"})
    out = tmp_path / "out"
    fleet.run(config(folders, out, path))
    shutil.copy(folders.adapters / "plain2" / "adapter_model.safetensors", tmp_path / "a")
    with pytest.raises(JobsSetAside, match="was made from another 'adapter_model"):
        fleet.run(config(folders, out, path))
    tiny.save_model(tiny.build(seed=9), tmp_path / "base2")
    with pytest.raises(JobsSetAside, match="was made for another base model"):
        fleet.run(config(folders, out, path, model_name_or_path=str(tmp_path / "base2")))


# --- shards and locks -----------------------------------------------------------------------------


def test_shards_are_apart_and_together_all(folders, tmp_path):
    out = tmp_path / "out"
    reports = [fleet.run(config(folders, out, shard=f"{i}/3")) for i in range(3)]
    names = [set(statuses(report)) for report in reports]
    assert set.union(*names) == set(KINDS)
    assert sum(map(len, names)) == len(KINDS)
    whole = tmp_path / "whole"
    fleet.run(config(folders, whole))
    for name in KINDS:
        assert weights_of(out / name) == weights_of(whole / name)
    assert [summary_of(out, f"summary-{i}-of-3.json")["counts"]["jobs"] for i in range(3)] == [
        5,
        5,
        4,
    ]
    assert statuses(fleet.run(config(folders, out))) == dict.fromkeys(KINDS, "skipped")
    report = fleet.run(config(folders, out, shard="20/30"))
    assert report["counts"] == {"jobs": 0, "done": 0, "skipped": 0, "failed": 0, "left": 0}


@pytest.mark.parametrize("text", ["", "1", "1/1", "4/4", "-1/4", "1/0", "a/b", "1/2/3", "9" * 99])
def test_shards_that_are_none(text):
    with pytest.raises(UsageError, match="shard="):
        parse_shard(text)


def test_a_second_fleet_on_the_same_shard_is_refused(folders, tmp_path):
    out = tmp_path / "out"
    with fleet_folder.locked(out, (0, 2)):
        with pytest.raises(DataError, match="another fleet is at work there"):
            fleet.run(config(folders, out, shard="0/2"))
        with pytest.raises(DataError, match="with shards of 2"):
            fleet.run(config(folders, out))
        fleet.run(config(folders, out, shard="1/2"))
    fleet.run(config(folders, out))


# --- threads --------------------------------------------------------------------------------------


def test_a_failure_in_any_thread_is_that_of_its_job(folders, tmp_path, monkeypatch):
    bad = {"_read": "plain2", "_add_norms": "rank", "_write": "dora"}
    for method, name in bad.items():
        real = getattr(worker.Worker, method)

        def failing(self, first, *rest, real=real, name=name):
            job = first if hasattr(first, "config") else first.job
            if job.name == name:
                raise KeyError(f"{name} is broken")
            return real(self, first, *rest)

        monkeypatch.setattr(worker.Worker, method, failing)
    out = tmp_path / "out"
    with pytest.raises(JobsSetAside) as raised:
        fleet.run(config(folders, out))
    report = raised.value.report
    failed = {job["name"]: job for job in report["jobs"] if job["status"] == "failed"}
    assert set(failed) == set(bad.values())
    for name, job in failed.items():
        assert job["reason"] == f"unexpected failure: KeyError: '{name} is broken'"
        assert job["exit_code"] == 1
    assert report["counts"]["done"] == len(KINDS) - 3
    assert [t.name for t in threading.enumerate() if t.name.startswith("fleet")] == []
    monkeypatch.undo()
    report = fleet.run(config(folders, out))
    assert {name for name, status in statuses(report).items() if status == "done"} == set(failed)


def test_a_full_disk_ends_the_fleet(folders, tmp_path, monkeypatch):
    real = write_pruned

    def full(adapter, folder, tensors):
        if adapter.folder.name == "alpha":
            raise OSError(28, "No space left on device")
        real(adapter, folder, tensors)

    monkeypatch.setattr(worker, "write_pruned", full)
    monkeypatch.setattr(worker, "has_room", lambda out, size: False)
    with pytest.raises(AntidoteError, match="No space left") as raised:
        fleet.run(config(folders, tmp_path / "out"))
    assert raised.value.exit_code == 1
    assert summary_of(tmp_path / "out")["counts"] == {
        "jobs": len(KINDS),
        "done": 2,
        "skipped": 0,
        "failed": 0,
        "left": len(KINDS) - 2,
    }
    assert not (tmp_path / "out" / "failed").exists()


# --- progress -------------------------------------------------------------------------------------


def test_progress_tells_done_failed_rate_and_what_is_left(folders, tmp_path, capsys):
    from antidote_fast.system.progress import count, json_lines

    path = manifest(
        folders.root, {"adapter": "adapters/plain"}, {"adapter": "none"}, name="p.jsonl"
    )
    with pytest.raises(JobsSetAside):
        fleet.run(config(folders, tmp_path / "out", path), progress=json_lines)
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert line["step"] == "fleet"
    assert (line["done"], line["total"], line["failed"]) == (2, 2, 1)
    assert line["adapters_per_hour"] > 0
    assert line["eta_seconds"] == 0
    with count(3, "fleet", json_lines, every=0.0) as show:
        show(1, failed=0, eta_seconds=None)
        show(2, failed=1, eta_seconds=5)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["done"] for line in lines] == [1, 2, 2]
    assert "eta_seconds" not in lines[0]
    assert lines[1]["eta_seconds"] == 5


def test_progress_on_a_terminal_and_with_tqdm(monkeypatch, capsys):
    from antidote_fast.system.progress import command_line_progress, count

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    with command_line_progress() as progress, count(3, "fleet", progress) as show:
        show(2, failed=1, adapters_per_hour=7200)
    err = capsys.readouterr().err
    assert "fleet, failed 1, adapters per hour 7200" in err
    assert "2/3" in err
    with count(3, "fleet", True) as show:
        show(3, failed=1)
    assert "3/3" in capsys.readouterr().err
    with count(3, "fleet", False) as show:
        show(3, failed=1)
    assert capsys.readouterr().err == ""


def test_room_is_what_can_be_taken(tmp_path):
    assert fleet_folder.has_room(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())
    assert not fleet_folder.has_room(tmp_path, 1 << 60)
    assert not fleet_folder.has_room(tmp_path / "not there", 1)
