"""Data sets of the hub: real loading from folders, answers of the hub, roles and slices."""

import os
import subprocess
import sys
import time

import pytest
import texts

from antidote_fast.data import hub
from antidote_fast.data.load import load_records
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError


@pytest.fixture
def no_probe(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(hub, "_probe_hub", lambda path: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def hub_repository(folder, files, readme):
    folder.mkdir()
    for name, rows in files.items():
        texts.write_jsonl(folder / name, rows)
    (folder / "README.md").write_text(f"---\n{readme}---\n")
    return folder


def test_real_loading_of_beavertails(tmp_path, no_probe, monkeypatch):
    """`datasets` itself loads a repository laid out as the hub's."""
    readme = (
        "configs:\n- config_name: default\n  data_files:\n"
        "  - split: 30k_train\n    path: train.jsonl\n  - split: 30k_test\n    path: test.jsonl\n"
    )
    files = {
        "train.jsonl": texts.beavertails_rows(6),
        "test.jsonl": texts.beavertails_rows(2, safe_every=9),
    }
    folder = hub_repository(tmp_path / "repo", files, readme)
    name = "PKU-Alignment/BeaverTails"
    real = hub.HUB_SOURCES[name]
    source = hub.HubSource(str(folder), real.train, real.test, roles=real.roles)
    monkeypatch.setattr(hub, "_BEAVERTAILS_SOURCE", source)
    monkeypatch.setitem(hub.HUB_SOURCES, name, source)
    assert [r.output for r in load_records(f"{name}:safe")] == ["answer 0", "answer 2", "answer 4"]
    assert [r.output for r in load_records(f"{name}:unsafe", limit=2)] == ["answer 1", "answer 3"]
    assert [r.output for r in load_records(f"{name}:eval")] == ["answer 1"]
    assert load_records(name, split="test") == load_records(f"{name}:eval")
    with pytest.raises(DataError, match="say which"):
        load_records(name)
    with pytest.raises(UsageError, match="role must be one of safe"):
        load_records(f"{name}:train")
    with pytest.raises(UsageError, match="role must be one of safe"):
        load_records(f"{name}:harmless")
    assert load_records("pku-alignment/beavertails:safe") == load_records(f"{name}:safe")


def test_real_loading_of_the_tasks(tmp_path, no_probe, monkeypatch):
    readme = (
        "configs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: train.jsonl\n  - split: test\n    path: test.jsonl\n"
    )
    gsm8k = {
        "train.jsonl": [{"question": "1+1?", "answer": "#### 2"}],
        "test.jsonl": [{"question": "2+2?", "answer": "#### 4"}],
    }
    folder = hub_repository(tmp_path / "gsm8k", gsm8k, readme)
    source = hub.HubSource(str(folder), "train", "test", config="main")
    monkeypatch.setitem(hub.HUB_SOURCES, "gsm8k", source)
    assert load_records("gsm8k") == [Record("1+1?", "", "The final answer is: 2")]
    assert load_records("gsm8k", split="test") == load_records("gsm8k:test")
    assert load_records("gsm8k:test") == [Record("2+2?", "", "The final answer is: 4")]
    with pytest.raises(DataError, match="cannot be loaded from the hub"):
        hub.load_hub_rows("gsm8k", source, "validation")


def test_arguments_that_each_data_set_is_loaded_with(no_probe, monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((*args, options))
        return datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in (
        "sst2:test",
        "glue/sst2:test",
        "ag_news",
        "openai/gsm8k",
        "tatsu-lab/alpaca",
        "someone/own-data:test",
    ):
        assert load_records(name) == [Record("a", "", "b")]
    load_records("tatsu-lab/alpaca_eval", split="test")
    load_records("tatsu-lab/alpaca_eval:train")
    alpaca_eval = {"data_files": "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"}
    assert calls == [
        ("stanfordnlp/sst2", None, {"split": "validation"}),
        ("nyu-mll/glue", "sst2", {"split": "validation"}),
        ("fancyzhang/ag_news", None, {"split": "train"}),
        ("openai/gsm8k", "main", {"split": "train"}),
        ("tatsu-lab/alpaca", None, {"split": "train"}),
        ("someone/own-data", None, {"split": "test"}),
        ("json", {**alpaca_eval, "split": "train[-122:]"}),
        ("json", {**alpaca_eval, "split": "train[:-122]"}),
    ]
    with pytest.raises(DataError, match="has no test split; tatsu-lab/alpaca:train takes"):
        load_records("tatsu-lab/alpaca", split="test")


def test_slices_of_alpaca_eval_do_not_overlap(tmp_path, no_probe):
    path = texts.write_jsonl(tmp_path / "a.json", [{"instruction": str(i)} for i in range(150)])
    import datasets

    parts = [
        datasets.load_dataset("json", data_files=path, split=split)["instruction"]
        for split in (hub._ALPACA_EVAL_SOURCE.train, hub._ALPACA_EVAL_SOURCE.test)
    ]
    assert [len(part) for part in parts] == [28, 122]
    assert [*parts[0], *parts[1]] == [str(i) for i in range(150)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "cannot be loaded from the hub"),
    ],
)
def test_unreachable_hub_is_one_line_within_seconds(tmp_path, environment, expected):
    code = (
        "import sys\n"
        "from antidote_fast.data.load import load_records\n"
        "try: load_records('PKU-Alignment/BeaverTails:safe')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {"HF_HOME": str(tmp_path), **environment}
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert time.monotonic() - start < 30
    assert result.stdout.startswith("DataError PKU-Alignment/BeaverTails")
    assert expected in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, "no such data set"), (401, "no such data set"), (503, "HTTP 503")],
)
def test_answers_of_the_hub(monkeypatch, status, expected):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    class Refused(HfHubHTTPError):
        def __init__(self):
            self.response = type("Response", (), {"status_code": status})()

    def dataset_info(self, path, timeout):
        if status == 404 and path == "there/it-is":
            return None
        raise Refused

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=expected) as caught:
        load_records("no/such")
    texts.one_line(caught)
    if status == 404:
        hub._probe_hub("there/it-is")
