"""Streams that are full, closed or gone: what is told is lost, and nothing else changes."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stages
import tiny

from antidote_fast.cli import entry
from antidote_fast.files.manifest import sha256_file, verify_folder
from antidote_fast.system import progress

ROOT = Path(__file__).parents[2]
ROWS = [{"instruction": "how to make a cake", "output": "the good cake"}] * 3


class Broken(io.StringIO):
    """A stream that fails as ``error`` says, at each write, and as a terminal if it is one."""

    encoding = "utf-8"

    def __init__(self, error, terminal=False):
        super().__init__()
        self.error, self.terminal, self.writes = error, terminal, 0

    def write(self, text):
        self.writes += 1
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return self.terminal


FAULTS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "hung up": OSError(errno.EIO, "Input/output error"),
    "broken pipe": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "closed": ValueError("I/O operation on closed file."),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter, data, and what a prune writes that can tell."""
    root = tmp_path_factory.mktemp("telling")
    tiny.save_model(tiny.build(), root / "base")
    tiny.save_adapter(tiny.add_lora(tiny.build()), root / "adapter")
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    assert entry.main(words(root, root / "whole")) == 0
    return root


def words(root, out):
    flags = {"model_name_or_path": "base", "adapter": "adapter", "dataset": "data.jsonl"}
    return [
        "prune",
        *(word for name, value in flags.items() for word in (f"--{name}", f"{root}/{value}")),
        *("--ratio", "0.3", "--output_dir", str(out)),
    ]


def weights(folder):
    return sha256_file(folder / "adapter_model.safetensors")


def streams(monkeypatch, make):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, make())
    return sys.stdout, sys.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_job_ends_as_it_would(fault, made, tmp_path, monkeypatch):
    stages.briefly(monkeypatch)
    terminal = fault in ("full", "hung up")
    out, err = streams(monkeypatch, lambda: Broken(FAULTS[fault], terminal))
    assert entry.main(words(made, tmp_path / "out")) == 0
    assert (sys.stdout, sys.stderr) == (out, err)
    assert min(out.writes, err.writes) > 0
    assert verify_folder(tmp_path / "out") == []
    assert weights(tmp_path / "out") == weights(made / "whole")
    assert entry.main(words(made, tmp_path / "out")) == 3  # it is there
    assert entry.main(["prune", "--ratio", "7"]) == 2
    assert entry.main(["verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "report.json").write_text("changed")
    for command in ("verify", "inspect"):
        assert entry.main([command, str(tmp_path / "out"), "--json"]) == 3
    assert entry.main([*words(made, tmp_path / "new"), "--dry_run", "--json", "--debug"]) == 0


def test_without_streams(made, tmp_path, monkeypatch):
    """As under pythonw, or with numbers 1 and 2 closed: both are None."""
    streams(monkeypatch, lambda: None)
    assert entry.main(words(made, tmp_path / "out")) == 0
    assert entry.main(words(made, tmp_path / "out")) == 3
    assert (sys.stdout, sys.stderr) == (None, None)
    assert weights(tmp_path / "out") == weights(made / "whole")


def test_names_that_a_stream_cannot_show(made, tmp_path, monkeypatch):
    """A path that is no text, and a terminal of ASCII, after the folder is in its place."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    out = tmp_path / os.fsdecode(b"caf\xc3\xa9-\xff")
    assert entry.main(words(made, out)) == 0
    assert r"caf\xe9-\udcff" in stream.buffer.getvalue().decode("ascii")
    assert verify_folder(out) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_bars_of_the_library(fault, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(FAULTS[fault]))
    assert list(progress.track([1, 2, 3], "prune", True)) == [1, 2, 3]
    with progress.count(2, "fleet", True) as show:
        show(1, failed=1)
    with progress.count(2, "fleet", progress.json_lines, every=0.0) as show:
        show(1, failed=1)
    assert list(progress.json_lines([1, 2], "x", None, every=0.0)) == [1, 2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_nothing_is_claimed_that_is_not_known(code, monkeypatch, capsys):
    """An error from somewhere does not say what was written before it."""

    def fail(config, progress):
        raise OSError(code, os.strerror(code), "rows.csv")

    monkeypatch.setattr(entry, "_function", lambda place: fail)
    assert (
        entry.main(["align", *["--model_name_or_path", "a", "--dataset", "b", "--output_dir", "c"]])
        == 1
    )
    line = capsys.readouterr().err
    assert line == f"antidote-fast: rows.csv: {os.strerror(code)}\n"


SHELL = [
    ("--version >/dev/full", 0),
    ("--version >&- 2>&- <&-", 0),
    ("frobnicate 2>/dev/full", 2),
    ("frobnicate 2>&-", 2),
]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize(("line", "code"), SHELL)
def test_the_code_of_the_process(line, code):
    """The interpreter's own flush at its end would make it 120."""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m antidote_fast {line}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == code
    assert done.stderr == b""


def test_a_closed_number_goes_to_no_file():
    """What is opened after ``2>&-`` does not get number 2, and with it what libraries print."""
    code = (
        "from antidote_fast.system import progress; import os\n"
        "progress.open_missing_streams()\n"
        "assert os.open(os.devnull, os.O_RDONLY) > 2\n"
        "os.write(2, b'to nobody')"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$0" >&- 2>&-', code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.returncode == 0
