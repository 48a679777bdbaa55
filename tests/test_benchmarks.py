"""The benchmarks and the GPU check on tiny tensors: what runs, and what is not printed."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ONCE = ("--runs", "1", "--rotated", "1")


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def gpu_check(*arguments):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_check.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )


def test_every_step_runs_on_tiny_tensors(tmp_path):
    out = tmp_path / "deep" / "check.json"
    done = gpu_check("--dry_run", "--out", out)
    found = json.loads(out.read_text())
    failed = [step["tail"] for step in found["steps"] if step["status"] != "passed"]
    assert failed == []
    assert done.returncode == 0, done.stderr
    assert found["torch"] == torch.__version__
    rows = {step["name"].split()[0]: step.get("rows") for step in found["steps"]}
    assert {row["case"] for row in rows["prune"]} == {
        *("row", "tensor", "preserve", "base", "2:4", "mask")
    }
    for name in ("prune", "prune_many", "norms"):
        ours = [row for row in rows[name] if row["name"] == "antidote_fast"]
        assert all(row["us"] > 0 and row["runs"] == 2 for row in ours)
        assert len(ours) == (6 if name == "prune" else 1)
        assert any("ours is faster x" in row for row in rows[name])
    if importlib.util.find_spec("triton"):
        assert {row["operation"] for row in rows["fusion"]} == {"rms_norm", "swiglu"}
        assert any(row["name"] == "collect fused" for row in rows["oneshot"])
    timed = {row["name"] for row in rows["oneshot"]}
    assert timed >= {"bare", "collect", "prune_model_", "oneshot, live model", "oneshot, folder"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = gpu_check("--out", tmp_path / "check.json")
    assert done.returncode == 2
    [line] = done.stdout.splitlines()
    assert line.startswith("gpu-check: there is no GPU here: ")
    assert not (tmp_path / "check.json").exists()


def test_a_step_that_fails_or_hangs_is_recorded_and_not_the_end(tmp_path, benchmarks):
    check = benchmarks("gpu_check")
    program = "import time; print('begun', flush=True); time.sleep(60)"
    hang = check.Step("hang", [sys.executable, "-c", program], 2)
    record = check.run(hang, 100, tmp_path)
    assert record["status"] == "timed out"
    assert record["tail"] == "begun\n"
    wrong = check.Step("wrong", [sys.executable, "-c", "raise SystemExit('no')"], 60)
    assert check.run(wrong, 100, tmp_path)["status"] == "failed"
    assert check.run(wrong, 5, tmp_path)["status"] == "skipped"
    assert check.run(check.Step("absent", [], 60), 100, tmp_path)["status"] == "skipped"


def test_no_time_is_printed_for_a_wrong_result(benchmarks, monkeypatch, capsys):
    bench = benchmarks("bench_prune")
    arguments = ["--device", "cpu", "--backend", "reference", "--shape", "4x32", *ONCE]
    arguments += ["--ratio", "0.2"]
    bench.main(arguments)
    assert "name=antidote_fast" in capsys.readouterr().out
    monkeypatch.setattr(bench, "ours", lambda weight, operands, backend: weight.zero_())
    with pytest.raises(AssertionError, match="differs from the stable sort"):
        bench.main(arguments)
    assert "us=" not in capsys.readouterr().out


def test_a_peer_that_fails_is_noted_and_the_others_are_timed(benchmarks, monkeypatch, capsys):
    bench, peers = benchmarks("bench_prune"), benchmarks("peers")

    def fails(weight, operands):
        raise RuntimeError("no such kernel\nand more")

    table = {"sort chain": lambda: peers.sort_chain, "broken": lambda: fails}
    monkeypatch.setattr(peers, "names", lambda compile_too: table)
    bench.main(
        ["--device", "cpu", "--shape", "4x32", "--runs", "1", "--ratio", "0.2", "--rotated", "1"]
    )
    printed = capsys.readouterr().out
    assert "name=broken  why=RuntimeError: no such kernel\n" in printed
    assert "name=sort chain  us=" in printed


def test_turns_are_restored_before_any_of_them_is_timed(benchmarks):
    common = benchmarks("common")
    seen = []
    turns = {name: (lambda i, name=name: seen.append((name, i))) for name in ("ours", "peer")}
    watch = common.Stopwatch(torch.device("cpu"))
    common.take_turns(watch, turns, 2, 3, lambda i: seen.append(("restore", i)), {"peer": 1})
    assert seen == [
        *(("restore", 0), ("restore", 1), ("ours", 0), ("ours", 1)),
        *(("restore", 0), ("peer", 0)),
        *(("restore", 0), ("ours", 0)),
    ]
    assert [watch.row(name)["runs"] for name in watch] == [3, 1]


def test_a_gpu_is_timed_by_its_events(benchmarks, monkeypatch):
    """The code for GPUs on a stand-in that has a clock: each call takes 2 ms, each wait 1."""
    common = benchmarks("common")
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, last):
            return last.at - self.at

    def advance(ticks):
        clock[0] += ticks

    properties = types.SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=132)
    module = types.SimpleNamespace(
        Event=Event,
        _sleep=lambda ticks: advance(1),
        synchronize=lambda device: None,
        get_device_properties=lambda device: properties,
        get_device_name=lambda device: "A GPU",
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    device = torch.device("cuda", 0)
    watch = common.Stopwatch(device)
    common.take_turns(watch, {"ours": lambda i: advance(2)}, 3, 4, lambda i: advance(100))
    row = watch.row("ours")
    assert (row["us"], row["us_p90"], row["runs"]) == (2000.0, 2000.0, 4)
    assert row["host_us"] > 0
    assert common.rotation(32 << 20, device) == 7  # 224 MB: past four times the L2
    about = common.machine(device)
    assert (about["device"], about["processors"], about["l2_mb"]) == ("A GPU", 132, 50.0)
    properties.L2_cache_size = 0
    assert common.rotation(32 << 20, device) == 8
