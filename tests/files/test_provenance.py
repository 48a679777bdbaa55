"""report.json: what was read, with which versions, and values that JSON can hold."""

import dataclasses
import hashlib
import json
import mmap
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import antidote_fast
from antidote_fast.config.base import fields_by
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.config.train import AlignConfig, FinetuneConfig
from antidote_fast.files import provenance
from antidote_fast.files.commit import output_folder

CONFIG = PruneConfig(model_name_or_path="m", output_dir="o", dataset="d", seed=3)


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_inputs_are_hashed_by_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("rows")
    (tmp_path / "model" / "nested").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "large").write_text("0123456789")
    monkeypatch.setattr(provenance, "_MAX_HASHED_BYTES", 9)
    with output_folder(tmp_path / "ours") as folder:
        (folder / "weights").write_text("0123456789")
    found = provenance.hash_inputs(
        [None, "hub/name", *(str(tmp_path / name) for name in ("data.jsonl", "model", "ours"))]
    )
    assert found == {
        f"{tmp_path}/data.jsonl": sha("rows"),
        f"{tmp_path}/model/config.json": sha("{}"),
        f"{tmp_path}/model/large": "10 bytes, not hashed",
        f"{tmp_path}/ours/weights": sha("0123456789"),  # from its COMPLETE.json, at any size
    }


def test_a_report_is_written_and_read_back(tmp_path):
    results = {"loss": torch.tensor(0.5), "count": np.int64(3), "where": Path("a/b")}
    report = provenance.write_report(tmp_path, "prune", CONFIG, results)
    read = provenance.read_report(tmp_path)
    assert (read["loss"], read["count"], read["where"]) == (0.5, 3, "a/b")
    assert read["config"]["ratio"] == CONFIG.ratio
    assert (read["schema_version"], read["stage"], read["seed"]) == (1, "prune", 3)
    assert read["versions"]["torch"] == torch.__version__
    assert read["peak_memory_bytes"] > 10 << 20
    assert report.keys() == read.keys()


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_what_json_cannot_hold_is_a_mistake(value, tmp_path):
    with pytest.raises((TypeError, ValueError)):
        provenance.write_report(tmp_path, "prune", CONFIG, {"value": value})
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema_version": 2}'])
def test_a_report_of_another_kind_is_none(text, tmp_path):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert provenance.read_report(tmp_path) is None


def test_versions_of_a_checkout_and_of_what_is_missing(monkeypatch):
    def missing(name):
        raise provenance.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.importlib.metadata, "version", missing)
    found = provenance.versions.__wrapped__()  # without its cache
    assert found["antidote-fast"] == antidote_fast.__version__
    assert found["torch"] is None
    json.dumps(found)


def test_peak_memory_is_of_this_process_alone():
    """What a process was forked from does not count."""
    code = "from antidote_fast.system.memory import peak_memory_bytes as peak; print(peak())"
    size = 1 << 30
    with mmap.mmap(-1, size) as large:
        for start in range(0, size, 4096):
            large[start] = 1
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 10 << 20 < int(found.stdout) < size


def test_reports_that_are_replaced_at_once(tmp_path):
    Config = dataclasses.make_dataclass("Config", [("seed", int, 0)])
    failures = []

    def job():
        try:
            for _ in range(10):
                provenance.write_report(tmp_path, "experiment", Config(), {"x": 1}, grows=True)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=job) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert provenance.read_report(tmp_path)["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


# --- was this made as it would be made now? -------------------------------------------------------

# What does not decide a stage's result. A new field decides it by its value unless it says so.
ASIDE = {
    "output_dir": "where the result goes",
    "overwrite": "what may lie there",
    "resume": "an interrupted run ends in the same files",
    "save_steps": "as above",
    "max_memory": "what does not fit goes to disk, and comes back",
    "judge_cache": "what a judge said is the same, asked again or read there",
}
# Of these it is what lies there that counts, not the name.
CONTENTS = {
    *("model_name_or_path", "adapter", "aligned_model", "reference_model"),
    *("dataset", "harmful_dataset", "safe_dataset", "ordinary_dataset", "preserve_dataset"),
    *("task_dataset", "benign_dataset", "drift_dataset", "norms", "preserve_norms"),
    *("held_out_from", "compare_with"),
}


def test_what_decides_no_result_is_thought_about():
    stages = (AlignConfig, FinetuneConfig, CalibrateConfig, PruneConfig, EvaluateConfig)
    for what, names in (("nothing", set(ASIDE)), ("contents", CONTENTS)):
        assert {field.name for stage in stages for field in fields_by(stage, what)} == names


@pytest.fixture
def made(tmp_path):
    """(folder, config): the output of a prune of a model's and two data sets' files."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for name in ("harmful", "task"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    config = PruneConfig(
        model_name_or_path=str(tmp_path / "base"),
        output_dir=str(tmp_path / "out"),
        dataset=f"{tmp_path}/harmful.jsonl:unsafe",
        preserve_dataset=str(tmp_path / "task.jsonl"),
    )
    with output_folder(config.output_dir, base_fingerprint="f") as folder:
        (folder / "weights").write_text("0123456789")
        inputs = provenance.input_files(config)
        provenance.write_report(folder, "prune", config, {}, inputs)
    return tmp_path / "out", config


def test_the_same_again_is_done_wherever_it_lies(made, tmp_path):
    folder, config = made
    assert provenance.difference(folder, config) is None
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere")
    shutil.move(tmp_path / "harmful.jsonl", tmp_path / "h.jsonl")
    (tmp_path / "elsewhere" / "notes.log").write_text("no stage reads it")
    folder.rename(tmp_path / "moved")
    moved = dataclasses.replace(
        config,
        model_name_or_path=str(tmp_path / "elsewhere"),
        output_dir=str(tmp_path / "moved"),
        dataset=f"{tmp_path}/h.jsonl:unsafe",
        overwrite=True,
        resume=True,
    )
    assert provenance.is_done(tmp_path / "moved", moved)
    assert not provenance.is_done(folder, config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ratio": 0.2}, "was made with ratio=0.1, not 0.2"),
        ({"targets": ["q_proj"]}, r"was made with targets=None, not \['q_proj'\]"),
        ({"dataset": "{0}/harmful.jsonl:safe"}, "was made with another dataset than"),
        ({"dataset": "org/name"}, "was made with another dataset than 'org/name'"),
        (
            {"dataset": "{0}/task.jsonl", "preserve_dataset": "{0}/harmful.jsonl"},
            "was made with another dataset than",
        ),
        ({"preserve_dataset": None}, "was made with another preserve_dataset than None"),
        ({"aligned_model": "{0}/base"}, "was made with another aligned_model than"),
    ],
    ids=str,
)
def test_other_settings_and_inputs_are_told_by_name(change, says, made, tmp_path):
    folder, config = made
    values = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    config = dataclasses.replace(config, **values)
    assert re.match(says, provenance.difference(folder, config))
    hashes = provenance.hash_inputs(provenance.input_files(config))
    assert re.match(says, provenance.difference(folder, config, hashes, "f"))
    assert not provenance.is_done(folder, config)


def test_other_contents_are_told_by_name(made, tmp_path):
    folder, config = made
    (tmp_path / "base" / "config.json").write_text('{"a": 1}')
    assert provenance.difference(folder, config) == "was made from another 'config.json'"
    hashes = provenance.hash_inputs(provenance.input_files(config))
    assert provenance.difference(folder, config, hashes, "f") is None  # the fingerprint counts
    assert "another base model" in provenance.difference(folder, config, hashes, "g")
    (tmp_path / "task.jsonl").unlink()
    assert not provenance.is_done(folder, config)


def test_inputs_that_a_manifest_lists_are_hashed_again(made, tmp_path):
    folder, config = made
    with output_folder(tmp_path / "ours") as base:
        (base / "config.json").write_text("{}")
    config = dataclasses.replace(config, model_name_or_path=str(tmp_path / "ours"))
    assert provenance.is_done(folder, config)
    (tmp_path / "ours" / "config.json").write_text("[]")  # of the same size
    assert not provenance.is_done(folder, config)


def test_a_folder_that_is_not_whole(made):
    folder, config = made
    (folder / "weights").write_text("9876543210")
    hashes = provenance.hash_inputs(provenance.input_files(config))
    assert provenance.difference(folder, config, hashes) is None  # sizes alone are compared
    assert provenance.difference(folder, config) == "is not whole: weights: contents changed"
    (folder / "weights").write_text("0")
    assert provenance.difference(folder, config, hashes) == (
        "is not whole: weights has 1 bytes, not 10"
    )
    (folder / "weights").unlink()
    assert provenance.difference(folder, config, hashes) == "is not whole: weights is missing"
    (folder / "COMPLETE.json").unlink()
    assert provenance.difference(folder, config) == "is not whole"


def test_a_folder_of_another_release(made, monkeypatch):
    """A flag that is new since counts at its default, one that is gone where it was given."""
    folder, config = made
    read = provenance.read_report

    def without(gone, **more):
        def changed(folder):
            report = read(folder)
            report["config"] = {k: v for k, v in report["config"].items() if k != gone} | more
            return report

        monkeypatch.setattr(provenance, "read_report", changed)

    without("gate_steps", old_flag=None)
    assert provenance.is_done(folder, config)
    without("aligned_model", base_model=None)  # its name then
    assert provenance.is_done(folder, config)
    without("seed", old_flag=3)
    assert provenance.difference(folder, config) == "was made with old_flag=3, not None"
    monkeypatch.setattr(provenance, "read_report", lambda folder: {"stage": "prune"})
    assert provenance.difference(folder, config) == "was not written by prune"


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"dataset": 3, "ratio": 0.1}},
        {"config": {"dataset": {"a": 1}, "model_name_or_path": ["x"]}},
        {"inputs": {"a\0b": {"not": "a hash"}, "": None}},
        {"inputs": []},
        {"config": None},
        {"stage": None},
    ],
    ids=str,
)
def test_a_report_that_says_nonsense_is_no_answer(change, made):
    folder, config = made
    report = json.loads((folder / "report.json").read_text())
    for name, value in change.items():
        report[name] = report[name] | value if isinstance(value, dict) else value
    text = json.dumps(report)
    (folder / "report.json").write_text(text)
    tiny.edit_json(
        folder / "COMPLETE.json", lambda m: m["files"]["report.json"].update(bytes=len(text))
    )
    hashes = provenance.hash_inputs(provenance.input_files(config))
    provenance.difference(folder, config, hashes, "f")
    assert not provenance.is_done(folder, config)
