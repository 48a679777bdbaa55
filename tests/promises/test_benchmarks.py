"""The benchmarks and the GPU check on tiny tensors: what runs, and what is not printed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import forked
import pytest
import tiny
import torch

from antidote_fast import ActivationNorms, Selection, backends, find_targets, prune_mask

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ONCE = ("--runs", "1", "--rotated", "1")


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class ForkedStep(forked.Process):
    """What gpu_check starts, forked: its steps mostly import."""

    def __init__(self, command, *, cwd, env, **streams):
        assert command[0] == sys.executable
        super().__init__(*command[1:], cwd=cwd, environment=env)

    def communicate(self, timeout):
        return "".join(super().communicate(timeout=timeout)), None


def test_every_step_runs_on_tiny_tensors(tmp_path, benchmarks, monkeypatch):
    check = benchmarks("gpu_check")
    mostly = vars(subprocess) | {"Popen": ForkedStep}
    monkeypatch.setattr(check, "subprocess", types.SimpleNamespace(**mostly))
    out = tmp_path / "deep" / "check.json"
    code = check.main(["--dry_run", "--out", str(out)])
    found = json.loads(out.read_text())
    failed = [step["tail"] for step in found["steps"] if step["status"] != "passed"]
    assert failed == []
    assert code == 0
    assert found["torch"] == torch.__version__
    rows = {}
    for step in found["steps"]:
        rows.setdefault(step["name"].split()[0], []).extend(step.get("rows", []))
    assert {row["case"] for row in rows["prune"]} == {
        *("row", "tensor", "preserve", "base", "2:4", "mask")
    }
    for name in ("prune", "prune_many", "norms", "linear"):
        ours = [row for row in rows[name] if row["name"] == "antidote_fast"]
        assert all(row["us"] > 0 and row["runs"] == 2 for row in ours)
        assert len(ours) == (6 if name == "prune" else 1)
        assert any("ours is faster x" in row for row in rows[name])
    assert any(row.get("weights") == 7 for row in rows["prune_many"])  # a layer's linears
    if importlib.util.find_spec("triton"):
        assert {row["operation"] for row in rows["fusion"]} == {"rms_norm", "swiglu"}
        assert any(row["name"] == "collect fused" for row in rows["oneshot"])
    timed = {row["name"] for row in rows["oneshot"]}
    assert timed >= {"bare", "collect", "prune_model_", "oneshot, live model", "oneshot, folder"}
    assert timed >= {"collect + prune_model_", "official layer replay"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_check.py", "--out", tmp_path / "check.json"],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
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


def test_both_backends_are_checked_with_every_tool(benchmarks, monkeypatch):
    check = benchmarks("gpu_check")
    monkeypatch.setattr(check, "architecture", lambda: "90")
    monkeypatch.delenv("ANTIDOTE_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(check.os, "access", lambda path, mode: True)
    steps = {step.name: step for step in check.steps()}
    assert steps["build"].environment == {"ANTIDOTE_CUDA_ARCHS": "90"}
    for backend in check.BACKENDS:
        files = " ".join(map(str, steps[f"tests {backend}"].command))
        assert f"tests/backends/test_{backend}.py" in files
        assert "_compile" not in files
        assert f"memcheck {backend}" in steps
    for tool in ("racecheck", "synccheck"):
        command = " ".join(map(str, steps[f"{tool} cuda"].command))
        assert f"--tool {tool} --error-exitcode 9" in command
        assert command.endswith("--ops cuda --backend cuda")
    begun = [step.name.split()[0] for step in check.steps() if step.rows]
    wanted = ["shared_atomics", "prune", "prune", "prune_many", "prune_many", "norms", "linear"]
    assert begun[: len(wanted)] == wanted
    monkeypatch.setattr(check.os, "access", lambda path, mode: False)
    assert check.sanitizer("racecheck", "cuda", 9).command == []


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


@pytest.mark.parametrize("case", ["revert", "preserve+revert"])
def test_reverting_is_compared_with_the_stable_sort(case, benchmarks, monkeypatch, capsys):
    bench = benchmarks("bench_prune")
    arguments = ["--device", "cpu", "--backend", "reference", "--shape", "4x32", *ONCE]
    arguments += ["--ratio", "0.2", "--case", case]
    bench.main(arguments)
    assert f"case={case}  shape=4x32" in capsys.readouterr().out
    real = bench.ours

    def scores_the_weights(weight, operands, backend):
        plain = dataclasses.replace(operands.selection, score_delta=False)
        return real(weight, dataclasses.replace(operands, selection=plain), backend)

    monkeypatch.setattr(bench, "ours", scores_the_weights)
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


def test_a_backend_that_cannot_run_is_noted_and_the_others_are_timed(
    benchmarks, monkeypatch, capsys
):
    bench = benchmarks("bench_norms")
    load = backends.load

    def without_triton(name):
        return load(name) if name != "triton" else (load(name)[0], "triton is not installed")

    monkeypatch.setattr(backends, "load", without_triton)
    arguments = ["--device", "cpu", "--shape", "8x32", *ONCE]
    bench.main([*arguments, "--backends", "reference", "triton"])
    printed = capsys.readouterr().out
    assert "name=antidote_fast triton  why=backend='triton': triton is not installed\n" in printed
    assert "name=antidote_fast reference  us=" in printed
    assert "ours reference is faster x=" in printed
    with pytest.raises(SystemExit, match="none of --backends triton triton can run here"):
        bench.main([*arguments, "--backends", "triton", "triton"])


@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("name", ["bench_prune", "bench_prune_many", "bench_linear"])
def test_a_replayed_graph_is_compared_before_it_is_timed(
    name, is_right, benchmarks, monkeypatch, capsys
):
    """On a stand-in for graphs: one that runs the call, one that does nothing."""
    bench, common = benchmarks(name), benchmarks("common")

    def graphs(device, backend, calls, report, about, tables):
        return [types.SimpleNamespace(replay=c if is_right else lambda: None) for c in calls]

    monkeypatch.setattr(common, "graphs", graphs)
    arguments = ["--device", "cpu", "--backend", "reference", "--ratio", "0.2", *ONCE]
    arguments += ["--graph"]
    if name == "bench_linear":
        arguments += ["--shape", "4x32", "--tokens", "8"]
    elif name == "bench_prune":
        arguments += ["--shape", "4x32"]
    else:
        arguments += ["--shrink", "512", "--layers", "1", "--rank", "2", "--adapter", "qkv"]
    if is_right:
        bench.main(arguments)
        assert "name=antidote_fast, graph  us=" in capsys.readouterr().out
        return
    with pytest.raises(
        AssertionError, match=r"antidote_fast, graph: .*differs from the stable sort"
    ):
        bench.main(arguments)
    assert "us=" not in capsys.readouterr().out


def test_a_call_that_no_graph_takes_is_noted(benchmarks, monkeypatch):
    common = benchmarks("common")
    noted, streams = [], []
    report = types.SimpleNamespace(note=lambda **what: noted.append(what))

    def refuses(device, call):
        raise RuntimeError("not while capturing\nand more")

    monkeypatch.setattr(common, "captured", refuses)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the one before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    chosen = types.SimpleNamespace(NAME="triton")
    monkeypatch.setattr(backends, "select", lambda name, device_type: chosen)
    for device, tables in (("cuda", False), ("cpu", False), ("cuda", True)):
        made = common.graphs(torch.device(device), None, [print], report, {"name": "x"}, tables)
        assert made == []
    assert streams == ["the one before"] * 2
    reasons = [what["why"] for what in noted]
    assert reasons[:2] == ["not while capturing", "there are no CUDA graphs on cpu"]
    assert reasons[2].startswith("its table lies in memory")


def test_the_official_replay_gives_our_norms_and_masks(benchmarks):
    """Sequences of different lengths, as in its data."""
    official = benchmarks("official")
    model = tiny.build(layers=3)
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(3, tiny.VOCAB, (1, length), generator=generator) for length in (7, 12, 5)
    ]
    means = official.collect(model, sequences, "all-linear")
    ours = ActivationNorms.collect(
        model, [{"input_ids": ids} for ids in sequences], targets="all-linear"
    )
    found = find_targets(model, "all-linear")
    before = {target.key: target.weight.detach().clone() for target in found}
    assert len(means) == len(found) == 21
    masks = official.prune_by(model, means, 0.2, "all-linear")
    for target in found:
        norm = means[target.key].sqrt()
        torch.testing.assert_close(
            norm, ours.act_norm(target.key) / len(sequences) ** 0.5, rtol=1e-3, atol=0
        )
        expected = prune_mask(before[target.key], norm, Selection(0.2)).to_bool()
        assert torch.equal(masks[target.key], expected)
        left = torch.where(expected, 0.0, before[target.key])
        assert torch.equal(target.weight, left)
    assert official.select(torch.randn(1, 10), torch.ones(10), 0.8).sum() == 9  # not a ceiling


def test_shared_atomics_compile_and_need_a_gpu(tmp_path, benchmarks):
    bench = benchmarks("bench_shared_atomics")
    if bench.find_nvcc() is None:
        pytest.skip("no nvcc was found")
    program = bench.compiled(bench.find_nvcc(), "90", tmp_path)
    if torch.cuda.is_available():
        return
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "there is no GPU here\n"


@pytest.mark.parametrize("has_nvcc", [True, False])
def test_without_what_it_needs_the_atomics_benchmark_says_so(
    has_nvcc, benchmarks, monkeypatch, capsys
):
    bench = benchmarks("bench_shared_atomics")
    monkeypatch.setattr(bench, "find_nvcc", lambda: "nvcc" if has_nvcc else None)
    assert bench.main(["--device", "cpu"]) == 2
    reason = "there is no NVIDIA GPU here" if has_nvcc else "no nvcc was found"
    assert capsys.readouterr().out == f"bench_shared_atomics: {reason}\n"


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


def test_a_streamed_model_is_timed_once_its_masks_are_right(tmp_path, benchmarks, capsys):
    bench = benchmarks("bench_stream")
    model = tmp_path / "model"
    bench.main(["--shape", "tiny", "--model", str(model), "--targets", "qkv", "--sequences", "4"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert "shape=tiny" in row
    assert "matrices=3 of a block, times 2" in row
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_made_model_loads_and_its_records_have_the_length_asked_for(tmp_path, benchmarks):
    from antidote_fast.data.batches import make_batches
    from antidote_fast.data.load import load_records
    from antidote_fast.models.loading import load_model, load_tokenizer

    maker = benchmarks("make_model")
    folder = tmp_path / "model"
    maker.main([str(folder), "--shape", "tiny", "--shard_gb", "0.00002", "--sequences", "5"])
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load_model(folder)
    assert model.dtype == torch.bfloat16
    assert 0.01 < model.model.layers[0].mlp.up_proj.weight.float().std() < 0.03
    records = load_records(str(folder / "calibration.jsonl"))
    batches = make_batches(records, load_tokenizer(folder), batch_size=5)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(5, 128)]
    assert int(batches[0]["attention_mask"].sum()) == 5 * 128


def test_a_fleet_is_timed_once_its_outputs_are_those_of_prune(benchmarks, capsys):
    bench = benchmarks("bench_fleet")
    words = ["--tiny", "--sizes", "4x40", "--adapters", "3", "--processes", "1"]
    bench.main([*words, "--part", "2", "--rounds", "1"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert "sequences=4  tokens=40" in row
    assert "adapters=3" in row


def test_a_fleet_that_differs_from_prune_is_not_timed(tmp_path, benchmarks):
    for name in ("fleet", "prune"):
        (tmp_path / name / "job").mkdir(parents=True)
        (tmp_path / name / "job" / "adapter_model.safetensors").write_text(name)
    with pytest.raises(SystemExit, match="job: fleet and prune differ"):
        benchmarks("bench_fleet").check_same(
            [types.SimpleNamespace(name="job")], tmp_path / "fleet", tmp_path / "prune"
        )
