"""Interrupted runs: what is refused, what goes on, and that it ends in the same files."""

import errno
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest
import tiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from antidote_fast.cli import entry
from antidote_fast.config.prune import PruneConfig
from antidote_fast.errors import DataError, Interrupted, UsageError
from antidote_fast.files import manifest, places, resume, tensor_file
from antidote_fast.files.manifest import read_manifest, sha256_file, verify_folder
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.stages import prune
from antidote_fast.streaming import sink
from antidote_fast.streaming.norms import BlockCalibration
from antidote_fast.system import interrupts

ROWS = [
    {"instruction": "how to make a cake", "output": "the good cake"},
    {"instruction": "what is two plus three", "output": "three"},
    {"instruction": "asks how to make", "output": "a good cake and two and three"},
]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A current folder with a model, an adapter and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny.save_model(tiny.build(layers=4), tmp_path / "base", max_shard_size="30KB")
    tiny.save_adapter(tiny.add_lora(tiny.build(layers=4)), tmp_path / "adapter")
    (tmp_path / "harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def words(*more, command="prune", **options):
    given = {
        "model_name_or_path": "base",
        "dataset": "harmful.jsonl",
        "output_dir": "out",
        **options,
    }
    flags = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
    return [command, *(word for pair in flags for word in pair), "--stream", *more, "--quiet"]


def interrupt_after(monkeypatch, blocks):
    """A signal comes while block ``blocks`` (from 1) runs."""
    run, seen = BlockCalibration.run, []

    def counted(self, index, collect=True):
        seen.append(index)
        if len(seen) == blocks:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, index, collect)

    monkeypatch.setattr(BlockCalibration, "run", counted)
    return seen


def files(folder):
    apart = ("report.json", "COMPLETE.json")
    return {p.name: sha256_file(p) for p in folder.iterdir() if p.name not in apart}


@pytest.mark.parametrize("adapter", [None, "adapter"])
@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"aggregation": "mean"}], ids=str)
def test_sigterm_finishes_the_block_and_resume_goes_on(adapter, options, work, monkeypatch, capsys):
    assert entry.main(words(adapter=adapter, **options | {"output_dir": "whole"})) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert entry.main(words(adapter=adapter, **options)) == 75
    line = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted after block 2 of 4; the same command with --resume goes on" in line
    assert not (work / "out").exists()
    assert (work / ".out.run" / "run.json").exists()
    with monkeypatch.context() as patch:
        seen = interrupt_after(patch, 99)
        assert entry.main(words("--resume", adapter=adapter, **options)) == 0
    assert seen == [2, 3]
    assert files(work / "out") == files(work / "whole")
    assert verify_folder(work / "out") == []
    assert not (work / ".out.run").exists()
    reports = [json.loads((work / name / "report.json").read_text()) for name in ("out", "whole")]
    for name in ("num_pruned", "num_tokens", "num_layers", "achieved"):
        assert reports[0][name] == reports[1][name]


def test_calibrate_goes_on(work, monkeypatch):
    assert entry.main(words(command="calibrate", output_dir="whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert entry.main(words(command="calibrate")) == 75
    assert entry.main(words("--resume", command="calibrate")) == 0
    assert files(work / "out") == files(work / "whole")


def test_without_a_forward_it_goes_on(work, monkeypatch):
    assert entry.main(words(score="magnitude", output_dir="whole")) == 0
    remembered = interrupts.remembered

    class Now(interrupts.Request):
        made = True

    class Patched:
        def __enter__(self):
            return Now()

        def __exit__(self, *exception):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(interrupts, "remembered", Patched)
        assert entry.main(words(score="magnitude")) == 75
    assert interrupts.remembered is remembered
    state = json.loads((work / ".out.run" / "run.json").read_text())["state"]
    assert 0 < len(state["writer"]["written"]) < 40
    assert entry.main(words("--resume", score="magnitude")) == 0
    assert files(work / "out") == files(work / "whole")


@pytest.mark.parametrize("scope", ["row", "global"])
def test_what_preserves_and_reverts_goes_on(scope, work, monkeypatch):
    """After a block of the calibration; in global scope also once its edges are known."""
    tiny.save_model(tiny.build(layers=4, seed=1), work / "aligned")
    (work / "task.jsonl").write_text("\n".join(map(json.dumps, ROWS[1:])))
    assert entry.main(words(command="calibrate", dataset="task.jsonl", output_dir="norms")) == 0
    options = {"preserve_norms": "norms", "aligned_model": "aligned", "score_delta": "true"}
    options |= {"ratio": 0.3, "scope": scope}
    assert entry.main(words(**options, output_dir="whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert entry.main(words(**options)) == 75
    if scope == "global":

        class Later(interrupts.Request):
            asked = 0

            @property
            def made(self):
                self.asked += 1
                # Two blocks that were left, then twice each of the 12 weights to find the edges.
                return self.asked > 3 + 2 * 12

            @made.setter
            def made(self, value):
                pass

        class Patched:
            def __enter__(self):
                return Later()

            def __exit__(self, *exception):
                pass

        with monkeypatch.context() as patch:
            patch.setattr(interrupts, "remembered", Patched)
            assert entry.main(words("--resume", **options)) == 75
        state = json.loads((work / ".out.run" / "run.json").read_text())["state"]
        assert state["cut"]["preserve"]["edge"] is not None
        assert state["cut"]["delta"] is True
    assert entry.main(words("--resume", **options)) == 0
    assert files(work / "out") == files(work / "whole")
    reports = [json.loads((work / name / "report.json").read_text()) for name in ("out", "whole")]
    for name in ("num_pruned", "num_preserved", "reverted", "aligned_model_fingerprint"):
        assert reports[0][name] == reports[1][name]
    assert reports[0]["num_preserved"] > 0


@pytest.mark.parametrize("spill", ["1MB", None])
def test_hidden_states_that_were_on_disk(spill, work, monkeypatch):
    """Also where none of them finds room in memory."""
    from antidote_fast.streaming import job

    if spill:
        monkeypatch.setattr(job, "room_for_hidden", lambda *_: (0, False))
    assert entry.main(words(output_dir="whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert entry.main(words()) == 75
    assert entry.main(words("--resume")) == 0
    assert files(work / "out") == files(work / "whole")


# --- what is refused ------------------------------------------------------------------------------


def change_sample(work):
    rows = [*ROWS[:2], {"instruction": "asks how to make", "output": "a good cake and two and two"}]
    (work / "harmful.jsonl").write_text("\n".join(map(json.dumps, rows)))


def change_weight(work):
    path = next(iter(sorted((work / "base").glob("*.safetensors"))))
    tensors = load_file(path)
    first = min(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[first][-2, -2] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (change_sample, {}, "had other data"),
        (change_weight, {}, "had other model"),
        (None, {"ratio": "0.2"}, "had other settings (ratio)"),
        (None, {"targets": "o_proj"}, "had other settings (targets)"),
        (None, {"num_calibration_samples": "2"}, "had other data"),
        (None, {"adapter": "adapter"}, "had other adapter"),
    ],
    ids=["sample", "weight", "ratio", "targets", "samples", "adapter"],
)
def test_other_inputs_are_refused(change, options, says, work, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert entry.main(words()) == 75
    if change is not None:
        change(work)
    before = (work / ".out.run" / "run.json").read_bytes()
    assert entry.main(words("--resume", **options)) == 3
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert (work / ".out.run" / "run.json").read_bytes() == before
    assert not (work / "out").exists()


def test_an_interrupted_run_is_not_lost_by_mistake(work, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert entry.main(words()) == 75
    assert entry.main(words()) == 3
    assert "a run was interrupted there; pass resume" in capsys.readouterr().err
    seen = interrupt_after(monkeypatch, 99)
    assert entry.main(words("--overwrite")) == 0
    assert seen == [0, 1, 2, 3]
    assert not (work / ".out.run").exists()


def test_what_is_whole_is_left_as_it_is(work, capsys):
    for stream in (True, False):
        argv = words("--resume", output_dir=f"out-{stream}")
        argv = argv if stream else [word for word in argv if word != "--stream"]
        assert entry.main(argv) == 0
        stamp = (work / f"out-{stream}" / "COMPLETE.json").stat().st_mtime_ns
        assert entry.main(argv) == 0
        assert (work / f"out-{stream}" / "COMPLETE.json").stat().st_mtime_ns == stamp
        assert entry.main([*argv, "--ratio", "0.2"]) == 3
        assert (
            "was made from other data, another model or other settings" in capsys.readouterr().err
        )


def test_a_damaged_state(work, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert entry.main(words()) == 75
    (work / ".out.run" / "run.json").write_text("{")
    assert entry.main(words("--resume")) == 3
    assert "run.json: cannot be read" in capsys.readouterr().err


def test_two_jobs_one_folder(work, capsys):
    with resume.run_folder(work / "out", {}) as run:
        assert entry.main(words("--resume")) == 3
        assert "another job is writing it" in capsys.readouterr().err
        (run.output / "file").write_text("x")
        run.commit()
    assert read_manifest(work / "out")["files"].keys() == {"file"}


@pytest.mark.parametrize(
    ("error", "kept"), [(Interrupted("x"), True), (DataError("x"), False), (OSError("x"), True)]
)
def test_what_an_error_leaves(error, kept, tmp_path):
    with pytest.raises(type(error)), resume.run_folder(tmp_path / "out", {"a": 1}):
        raise error
    assert (tmp_path / ".out.run").exists() == kept
    assert not (tmp_path / "out").exists()


# --- signals --------------------------------------------------------------------------------------


def test_a_second_signal_interrupts():
    def twice():
        with interrupts.remembered() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.made
            os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        twice()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_signal_to_a_process(work):
    """From outside, as a scheduler sends it: exit code 75, then --resume gives the same files."""
    assert entry.main(words(output_dir="whole")) == 0
    slow = (
        "import sys, time; from antidote_fast import cli\n"
        "from antidote_fast.streaming.norms import BlockCalibration\n"
        "run = BlockCalibration.run\n"
        "def slow(self, index, collect=True):\n"
        "    open('block', 'w').close(); time.sleep(1); return run(self, index, collect)\n"
        "BlockCalibration.run = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    job = forked.Process(slow, *words())
    deadline = time.monotonic() + 120
    while not (work / "block").exists() and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert "the same command with --resume goes on" in job.communicate(timeout=120)[1]
    assert job.returncode == 75
    assert not (work / "out").exists()
    assert entry.main(words("--resume")) == 0
    assert files(work / "out") == files(work / "whole")


def test_max_memory_is_a_size():
    sizes = {"max_memory": "lots", "stream": True}
    with pytest.raises(UsageError, match="max_memory='lots': must be a size"):
        PruneConfig(model_name_or_path="a", output_dir="b", dataset="c", **sizes)


# --- a full disk, missing rights ------------------------------------------------------------------


def refuse(monkeypatch, code, place, call, kind=OSError):
    """The system refuses the nth ``call`` of a way to write, and all after it."""
    module, name = place
    real, seen = getattr(module, name), []

    def refused(*arguments, **options):
        seen.append(1)
        if len(seen) >= call:
            if kind is SafetensorError:
                raise kind(f"Error while serializing: I/O error: full (os error {code})")
            raise kind(code, os.strerror(code), str(arguments[0]))
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, refused)


WRITES = {  # a way to write, and which call
    "a weight": ((tensor_file.TensorFile, "write"), 15),
    "norms": ((ActivationNorms, "save"), 3),
    "the state": ((resume.Run, "save"), 4),
    "a flush": ((tensor_file.TensorFile, "sync"), 8),
    "the model": ((sink, "copy_checkpoint_files"), 1),
    "the report": ((prune, "write_report"), 1),
    "the commit": ((manifest, "write_manifest"), 1),
    "its name": ((places, "put_in_place"), 1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{file: SHA-256} of what nobody interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        folder = Path.cwd()
        tiny.save_model(tiny.build(layers=4), folder / "base", max_shard_size="30KB")
        (folder / "harmful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        assert entry.main(words()) == 0
        yield folder, files(folder / "out")


@pytest.mark.parametrize("write", WRITES)
def test_the_system_refuses_and_the_state_is_kept(write, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(whole[0] / "base")
    shutil.copy(whole[0] / "harmful.jsonl", tmp_path)  # a data file is no link
    codes = itertools.cycle([(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EACCES, 3)])
    number, expected = next(itertools.islice(codes, list(WRITES).index(write), None))
    with monkeypatch.context() as patch:
        refuse(patch, number, *WRITES[write])
        assert entry.main(words()) == expected
    line = capsys.readouterr().err.splitlines()[-1]
    assert os.strerror(number) in line
    assert line.endswith(resume.KEPT)
    assert not (tmp_path / "out").exists()
    assert entry.main(words("--resume")) == 0
    assert files(tmp_path / "out") == whole[1]
    assert not (tmp_path / ".out.run").exists()


def test_calibrate_keeps_it_too(whole, tmp_path, monkeypatch, capsys):
    """Here as safetensors tells it, in an exception of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(whole[0] / "base")
    shutil.copy(whole[0] / "harmful.jsonl", tmp_path)  # a data file is no link
    assert entry.main(words(command="calibrate", output_dir="alone")) == 0
    with monkeypatch.context() as patch:
        refuse(patch, errno.ENOSPC, (ActivationNorms, "save"), 3, SafetensorError)
        assert entry.main(words(command="calibrate")) == 1
    says = f"output_dir='{tmp_path}/out': No space left on device; {resume.KEPT}"
    assert says in capsys.readouterr().err
    assert entry.main(words("--resume", command="calibrate")) == 0
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_no_room_before_the_model_is_begun(work, monkeypatch, capsys):
    """In global scope the norms are there by then."""
    assert entry.main(words(scope="global", output_dir="whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert entry.main(words(scope="global")) == 75
    state = (work / ".out.run" / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 100})
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        assert entry.main(words("--resume", scope="global")) == 1
    assert "free on its disk" in capsys.readouterr().err
    assert (work / ".out.run" / "run.json").read_bytes() == state
    assert entry.main(words("--resume", scope="global")) == 0
    assert files(work / "out") == files(work / "whole")
