"""report.json: what was read, with which versions, and values that JSON can hold."""

import dataclasses
import hashlib
import json
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import antidote_fast
from antidote_fast.config.prune import PruneConfig
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
    monkeypatch.setattr(
        provenance, "_versions", provenance._versions.__wrapped__
    )  # without its cache
    found = provenance.versions()
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
                provenance.replace_report(tmp_path, "experiment", Config(), {"x": 1})
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
