"""A folder appears whole or not at all: crashes, full disks, two jobs, foreign folders."""

import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import forked
import pytest

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.files import places
from antidote_fast.files.commit import check_output_folder, output_folder
from antidote_fast.files.manifest import read_manifest, sha256_file, verify_folder

ROOT = Path(__file__).parents[2]


def write(path, text="one", **options):
    with output_folder(path, **options) as staged:
        (staged / "a.txt").write_text(text)
        (staged / "sub").mkdir()
        (staged / "sub" / "b.txt").write_text("b")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def run(code, *arguments):
    return forked.Process(textwrap.dedent(code), *arguments)


def test_a_new_folder(tmp_path):
    write(tmp_path / "deep" / "out", note="x")
    out = tmp_path / "deep" / "out"
    assert names(out.parent) == ["out"]  # no lock, nothing staged
    manifest = read_manifest(out)
    assert manifest["note"] == "x"
    assert manifest["files"] == {
        "a.txt": {"sha256": sha256_file(out / "a.txt"), "bytes": 3},
        "sub/b.txt": {"sha256": sha256_file(out / "sub" / "b.txt"), "bytes": 1},
    }
    assert verify_folder(out) == []
    assert os.stat(out).st_mode & 0o777 == 0o777 & ~umask()


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "one"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(places, "_exchange", lambda *a: False)
    out = tmp_path / "out"
    write(out)
    with pytest.raises(DataError, match="exists and is not empty"):
        write(out, "two")
    assert (out / "a.txt").read_text() == "one"
    write(out, "two", overwrite=True)
    assert (out / "a.txt").read_text() == "two"
    assert verify_folder(out) == []
    assert names(tmp_path) == ["out"]


def foreign(out):
    out.mkdir()
    (out / "mine.txt").write_text("precious")


def added(out):
    write(out)
    (out / "mine.txt").write_text("precious")


def other_tool(out):
    foreign(out)
    (out / "COMPLETE.json").write_text('{"tool": "other", "schema_version": 1, "files": {}}')


def newer(out):
    write(out)
    path = out / "COMPLETE.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))


def broken_manifest(out):
    write(out)
    (out / "COMPLETE.json").write_text("{")


def linked_manifest(out):
    write(out)
    (out / "COMPLETE.json").rename(out / "other.json")
    (out / "COMPLETE.json").symlink_to(out / "other.json")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (foreign, "was not written by antidote-fast"),
        (added, r"holds 'mine\.txt', which antidote-fast did not write"),
        (other_tool, "was not written by"),
        (newer, "was not written by"),
        (broken_manifest, "was not written by"),
        (linked_manifest, "was not written by"),
        (lambda out: out.write_text("file"), "is not a folder"),
        (lambda out: out.symlink_to(out.parent), "is a symbolic link"),
    ],
)
def test_overwrite_replaces_only_what_this_tool_wrote(tmp_path, make, match):
    parent = tmp_path / "p"
    parent.mkdir()
    out = parent / "out"
    make(out)
    before = sorted((p, p.is_file() and p.read_bytes()) for p in parent.rglob("*"))
    with pytest.raises(DataError, match=match):
        check_output_folder(out, overwrite=True)
    with pytest.raises(DataError, match=match), output_folder(out, overwrite=True):
        raise AssertionError
    assert before == sorted((p, p.is_file() and p.read_bytes()) for p in parent.rglob("*"))


def test_parent_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *a: False)  # root may write anywhere
    with pytest.raises(DataError, match="is not writable"):
        check_output_folder(tmp_path / "new" / "out")


def test_parent_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(DataError, match="f is not a folder"):
        check_output_folder(tmp_path / "f" / "out")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [True, False])
def test_an_exception_leaves_nothing(tmp_path, error, old):
    out = tmp_path / "a" / "b" / "out"
    if old:
        write(out)

    def job():
        with output_folder(out, overwrite=True) as staged:
            (staged / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        job()
    if old:
        assert (out / "a.txt").read_text() == "one"
        assert names(out.parent) == ["out"]
    else:
        assert names(tmp_path) == []  # the folders above are gone too


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out)
    monkeypatch.setattr(places, "_exchange", lambda *a: False)
    real = os.rename

    def rename(source, target):
        if Path(target) == out and not str(source).endswith(".old"):
            raise RuntimeError("second rename")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(RuntimeError, match="second rename"):
        write(out, "two", overwrite=True)
    monkeypatch.undo()
    assert (out / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["out"]


FAULTS = """
    import os, signal, sys
    from antidote_fast.files import commit, manifest, places
    path, point = sys.argv[1], int(sys.argv[2])
    if sys.argv[3] == "two renames":
        places._exchange = lambda *a: False
    calls = 0
    def fatal(real):
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    os.fsync = fatal(os.fsync)
    os.rename = fatal(os.rename)
    manifest.write_manifest = fatal(manifest.write_manifest)
    places.put_in_place = fatal(places.put_in_place)
    commit.shutil.rmtree = fatal(commit.shutil.rmtree)
    with commit.output_folder(path, overwrite=True) as staged:
        (staged / "a.txt").write_text("two")
    print("done", calls)
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_at_every_point(tmp_path, way):
    """After SIGKILL anywhere: the old folder or the new one, whole; the next job cleans up."""
    finished = False
    for point in range(1, 30):
        out = tmp_path / str(point) / "out"
        write(out)
        process = run(FAULTS, out, point, way)
        stdout, stderr = process.communicate(timeout=60)
        if process.returncode == 0:
            assert stdout.startswith("done")
            finished = True
            break
        assert process.returncode == -signal.SIGKILL, stderr
        if way == "exchange" or out.exists():
            assert verify_folder(out) == []
            assert (out / "a.txt").read_text() in ("one", "two")
        with pytest.raises(ValueError, match="stop"), output_folder(out, overwrite=True):
            raise ValueError("stop")
        # What the killed job left is gone or, between two renames, put back.
        assert verify_folder(out) == []
        assert names(out.parent) == ["out"]
    assert finished
    assert point > 5


def test_two_jobs_on_one_folder(tmp_path):
    holder = run(
        """
        import sys
        from antidote_fast.files.commit import output_folder
        with output_folder(sys.argv[1]) as staged:
            print("held", flush=True)
            sys.stdin.readline()
            (staged / "a.txt").write_text("first")
        """,
        tmp_path / "out",
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(DataError, match="another job is writing it"),
        output_folder(tmp_path / "out"),
    ):
        raise AssertionError
    holder.communicate("go\n", timeout=60)
    assert holder.returncode == 0
    assert (tmp_path / "out" / "a.txt").read_text() == "first"
    assert names(tmp_path) == ["out"]
    with output_folder(tmp_path / "out", overwrite=True):
        pass


def test_file_size_limit(tmp_path):
    """As on a full disk: one line, exit code 1, nothing written."""
    process = run(
        """
        import resource, sys
        from antidote_fast.files.commit import output_folder
        from antidote_fast.errors import AntidoteError
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with output_folder(sys.argv[1]) as staged:
                (staged / "big").write_bytes(bytes(100_000))
        except AntidoteError as error:
            print(error)
            sys.exit(error.exit_code)
        """,
        tmp_path / "new" / "out",
    )
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "File too large; nothing was written" in stdout
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        (28, AntidoteError, "No space left"),
        (13, DataError, "Permission denied"),
        (5, OSError, "Input/output"),
    ],
)
def test_system_errors(tmp_path, code, error, match):
    with pytest.raises(error, match=match), output_folder(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert names(tmp_path) == []


def test_verify_names_what_changed(tmp_path):
    out = tmp_path / "out"
    with output_folder(out) as staged:
        for name in ("same", "short", "flipped", "missing"):
            (staged / name).write_bytes(b"12345678")
    (out / "short").write_bytes(b"1234")
    (out / "flipped").write_bytes(b"12345679")
    (out / "missing").unlink()
    (out / "extra").write_bytes(b"")
    assert verify_folder(out) == [
        "flipped: contents changed",
        "missing: missing",
        "short: 4 bytes, not 8",
        "extra: not in COMPLETE.json",
    ]
    with pytest.raises(DataError, match=r"has no COMPLETE\.json"):
        verify_folder(tmp_path)


def test_exchange_elsewhere(monkeypatch, tmp_path):
    assert not places._exchange(tmp_path / "a", tmp_path / "b")  # neither is there
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not places._exchange(tmp_path, tmp_path)
