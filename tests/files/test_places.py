"""Outputs that no rename can make or replace, what killed jobs leave, and names that are alike."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest

from antidote_fast.errors import AntidoteError, DataError, Interrupted
from antidote_fast.files import places, resume
from antidote_fast.files.commit import check_output_folder, locked, new_file, output_folder
from antidote_fast.files.manifest import verify_folder

ROOT = Path(__file__).parents[2]
FILES = ("a.safetensors", "config.json", "sub/b.txt")


def write(path, text="one", **options):
    with output_folder(path, **options) as staged:
        (staged / "sub").mkdir()
        for name in FILES:
            (staged / name).write_text(text)


def stop(path, overwrite=False):
    with output_folder(path, overwrite) as staged:
        (staged / "config.json").write_text("half")
        raise ValueError("stop")


def interrupt(path, inputs, state):
    with resume.run_folder(path, inputs) as run:
        (run.output / "config.json").write_text("{}")
        run.save(state)
        raise Interrupted("x")


def texts(path):
    return {name: (path / name).read_text() for name in FILES}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def fixed(path, code=errno.EBUSY):
    """``os.rename`` where ``path`` is a mount point (or, with EXDEV, of a lower layer)."""
    real = os.rename

    def rename(source, target):
        if Path(path) in (Path(source), Path(target)):
            raise OSError(code, os.strerror(code), str(source))
        real(source, target)

    return rename


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "p" / "out"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EINVAL])
def test_a_folder_that_cannot_be_replaced_is_filled(out, monkeypatch, code):
    monkeypatch.setattr(os, "rename", fixed(out, code))
    inode = out.stat().st_ino
    check_output_folder(out)
    assert names(out) == []
    write(out)
    with pytest.raises(DataError, match="exists and is not empty"):
        check_output_folder(out)
    check_output_folder(out, overwrite=True)
    assert texts(out) == dict.fromkeys(FILES, "one")
    write(out, "two", overwrite=True)
    assert texts(out) == dict.fromkeys(FILES, "two")
    assert verify_folder(out) == []
    assert names(out) == ["COMPLETE.json", "a.safetensors", "config.json", "sub"]
    assert (out.stat().st_ino, names(out.parent)) == (inode, ["out"])


def test_whatever_fails_in_it_leaves_it_as_it_was(out, monkeypatch):
    monkeypatch.setattr(os, "rename", fixed(out))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="stop"):
            stop(out, overwrite)
        assert (names(out) == []) != overwrite
        assert names(out.parent) == ["out"]
        if not overwrite:
            write(out)
    assert texts(out) == dict.fromkeys(FILES, "one")


def killed_at(point, job):
    """Fork, run ``job`` and kill it at its nth change of the disk; how it ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count, code = 0, 1

    def fatal(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    try:
        os.fsync = lambda fd: None
        for name in ("mkdir", "rename", "rmdir", "unlink", "fsync"):
            setattr(os, name, fatal(getattr(os, name)))
        job()
        code = 0
    finally:
        os._exit(code)


def test_killed_while_it_is_filled(out, monkeypatch):
    """No loader's configuration beside files of another output; the next job ends or undoes it."""
    monkeypatch.setattr(os, "rename", fixed(out))
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for point in range(1, 100):
        shutil.rmtree(out)
        out.mkdir()
        write(out)
        code = killed_at(point, lambda: write(out, "two", overwrite=True))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if (out / "config.json").exists():
            found = {(out / name).read_text() for name in FILES}
            assert len(found) == 1
        if (out / "COMPLETE.json").exists():
            lines = [line for line in verify_folder(out) if places.HIDDEN not in line]
            assert lines == []
        with locked(out):
            pass
        assert verify_folder(out) == []
        assert set(texts(out).values()) in ({"one"}, {"two"})
        assert (names(out.parent), places.HIDDEN in names(out)) == (["out"], False)
    assert code == 0
    assert point > 25


def test_an_interruption_while_it_is_filled_waits(out, monkeypatch):
    real, seen = fixed(out), []

    def rename(source, target):
        seen.append(source)
        if Path(source).name == "config.json" and len(set(seen)) == len(seen):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(out)
    assert verify_folder(out) == []
    assert names(out) == ["COMPLETE.json", "a.safetensors", "config.json", "sub"]


def test_an_error_while_it_is_filled_is_told_and_mended(out, monkeypatch):
    real = fixed(out)

    def rename(source, target):
        if Path(source).name == "COMPLETE.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(
        AntidoteError, match="Input/output error while files were put there"
    ) as told:
        write(out)
    assert "nothing was written" not in str(told.value)
    monkeypatch.setattr(os, "rename", real)
    with pytest.raises(DataError, match="exists and is not empty"):
        check_output_folder(out)
    assert verify_folder(out) == []


def test_a_run_in_it_goes_on(out, monkeypatch):
    monkeypatch.setattr(os, "rename", fixed(out))
    with pytest.raises(Interrupted):
        interrupt(out, {"a": 1}, {"next": 1})
    assert names(out) == [places.HIDDEN]
    with pytest.raises(DataError, match="a run was interrupted there"):
        resume.interrupted_state(out, {"a": 1})
    with resume.run_folder(out, {"a": 1}, resume=True) as run:
        assert run.state == {"next": 1}
        run.commit()
    assert names(out) == ["COMPLETE.json", "config.json"]
    assert resume.is_finished(out, {"a": 1})


def test_a_parent_that_is_not_writable():
    """An empty folder there is filled, and nothing else can be made; root tries it as nobody."""
    with tempfile.TemporaryDirectory() as parent:
        out = Path(parent, "out")
        out.mkdir()
        os.chmod(parent, 0o555)
        root = os.geteuid() == 0
        if root:
            os.chown(out, 65534, 65534)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                if root:
                    os.setuid(65534)
                with pytest.raises(DataError, match="is not writable"):
                    check_output_folder(Path(parent, "new"))
                check_output_folder(out)
                write(out)
                write(out, "two", overwrite=True)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert texts(out) == dict.fromkeys(FILES, "two")
        os.chmod(parent, 0o755)


def test_modes_are_those_of_the_umask(out, monkeypatch):
    monkeypatch.setattr(os, "rename", fixed(out))
    before = os.umask(0o027)
    try:
        write(out)
    finally:
        os.umask(before)
    assert stat.S_IMODE((out / "config.json").stat().st_mode) == 0o640


MOUNTED = """
    import os, subprocess, sys
    from pathlib import Path
    from antidote_fast.files.commit import check_output_folder, output_folder
    from antidote_fast.files.manifest import verify_folder
    from antidote_fast.errors import DataError
    def mount(*words):
        if subprocess.run(["mount", *words], stderr=subprocess.DEVNULL).returncode:
            sys.exit(77)
    def job(out, overwrite=False):
        check_output_folder(out, overwrite)
        with output_folder(out, overwrite) as staged:
            (staged / "config.json").write_text("{}")
        assert verify_folder(out) == [], verify_folder(out)
        assert sorted(os.listdir(out.parent)) == before
    def folder(*names):
        path = Path(sys.argv[1], *names)
        path.mkdir(parents=True)
        return path
    out, before = folder("tmpfs", "out"), ["out"]
    mount("-t", "tmpfs", "none", str(out))
    (out / "lost+found").mkdir()
    job(out); job(out, True)
    mount("-o", "remount,ro", str(out))
    try:
        check_output_folder(out, True)
        sys.exit(1)
    except DataError as error:
        assert "Read-only file system" in str(error), error
    out, before = folder("bind", "out"), ["out"]
    mount("--bind", str(folder("source")), str(out))
    job(out); job(out, True)
    for name in ("empty", "full"):
        folder("lower", name)
    layers = folder("layers")
    mount("-t", "tmpfs", "none", str(layers))
    upper, work, merged = (folder("layers", name) for name in ("upper", "work", "merged"))
    before = ["empty", "full"]
    job(Path(sys.argv[1], "lower", "full"))
    options = f"lowerdir={sys.argv[1]}/lower,upperdir={upper},workdir={work}"
    mount("-t", "overlay", "overlay", "-o", options, str(merged))
    job(merged / "empty"); job(merged / "full", True)
"""


def test_mount_points_and_layers(tmp_path):
    """The real thing: a tmpfs, a bind mount on the same disk, folders of a lower layer."""
    if not sys.platform.startswith("linux") or not shutil.which("unshare"):
        pytest.skip("needs Linux and unshare")
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", textwrap.dedent(MOUNTED), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting is not permitted here")
    assert done.returncode == 0, done.stderr


# --- refused before any work ----------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EROFS, errno.EXDEV, errno.EACCES, errno.EINVAL])
def test_a_parent_in_which_nothing_can_be_renamed(code, tmp_path, monkeypatch):
    def rename(source, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "rename", rename)
    for out in (tmp_path / "out", tmp_path / "a" / "b" / "out"):
        with pytest.raises(DataError, match=f"{os.strerror(code)}; nothing was written"):
            check_output_folder(out)
    assert names(tmp_path) == []


def test_names_that_are_too_long(tmp_path):
    write(tmp_path / ("n" * 246))
    for size in (247, 255, 256, 5000):
        with pytest.raises(DataError, match="File name too long"):
            check_output_folder(tmp_path / ("n" * size))
    existing = tmp_path / ("e" * 255)
    existing.mkdir()
    check_output_folder(existing)
    write(existing)
    assert verify_folder(existing) == []
    assert names(tmp_path) == sorted(["n" * 246, "e" * 255])


@pytest.mark.parametrize(
    "name",
    [".out.run", ".out.partial", ".a.b.old", ".x.lock", places.HIDDEN, f"{places.HIDDEN}/ready"],
)
def test_names_of_what_lies_beside_an_output(name, tmp_path):
    with pytest.raises(DataError, match="is a name for what lies beside an output"):
        check_output_folder(tmp_path / name)
    with pytest.raises(DataError, match="is a name for what lies"), output_folder(tmp_path / name):
        raise AssertionError
    write(tmp_path / ".hidden")


def test_names_that_begin_alike(tmp_path):
    """A job for one of them leaves what another one needs to go on."""
    others = [tmp_path / f"out{end}" for end in (".partial-abc", ".partial", ".run", ".old", "-x")]
    for other in others:
        with pytest.raises(Interrupted):
            interrupt(other, {}, {"next": other.name})
    write(tmp_path / "out")
    check_output_folder(tmp_path / "out", overwrite=True)
    for other in others:
        assert resume.interrupted_state(other, {}, resume=True) == {"next": other.name}


# --- what killed jobs leave -----------------------------------------------------------------------


def left_by_a_run(out, inputs):
    """What a run leaves that is killed between its rename and its end."""
    with resume.run_folder(out, inputs) as run:
        (run.output / "file").write_text("x")
        run.save({"next": 3})
        shutil.copytree(run.folder, out.with_name("copy"))
        run.commit()
    shutil.rmtree(out.with_name("copy") / "output")
    os.rename(out.with_name("copy"), out.parent / f".{out.name}.run")


@pytest.mark.parametrize("way", ["check", "overwrite", "resume", "output_folder"])
def test_the_state_of_a_run_that_was_done_is_cleared(way, tmp_path):
    out = tmp_path / "out"
    left_by_a_run(out, {"a": [1, 0.5], "b": None})
    if way == "check":
        with pytest.raises(DataError, match="exists and is not empty"):
            check_output_folder(out)
    elif way == "overwrite":
        check_output_folder(out, overwrite=True)
    elif way == "resume":
        assert resume.is_finished(out, {"a": [1, 0.5], "b": None})
    else:
        write(out, overwrite=True)
    assert names(tmp_path) == ["out"]


def test_the_state_of_another_run_is_kept(tmp_path):
    out = tmp_path / "out"
    left_by_a_run(out, {"a": 1})
    state = tmp_path / ".out.run" / "run.json"
    contents = json.loads(state.read_text())
    state.write_text(json.dumps(contents | {"inputs": {"a": 2}}))
    with pytest.raises(DataError, match="exists and is not empty"):
        check_output_folder(out)
    assert resume.is_finished(out, {"a": 1})
    assert state.exists()


@pytest.mark.parametrize("inside", [False, True])
def test_an_output_that_is_replaced_gives_up_what_was_interrupted(inside, out, monkeypatch):
    if inside:
        monkeypatch.setattr(os, "rename", fixed(out))
    with pytest.raises(Interrupted):
        interrupt(out, {"a": 1}, {"next": 1})
    write(out, overwrite=True)
    assert names(out.parent) == ["out"]
    assert verify_folder(out) == []


def test_a_file_that_a_killed_job_was_writing(tmp_path):
    path = tmp_path / "rows.csv"

    def job():
        with new_file(path) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed_at(0, job) == -signal.SIGKILL
    assert names(tmp_path) != []
    with new_file(path) as partial:
        partial.write_text("whole")
    assert names(tmp_path) == ["rows.csv"]
    assert path.read_text() == "whole"


def test_a_file_that_two_jobs_write(tmp_path):
    """One after the other: what one has begun is not the other's to clear."""
    path, inside, failures = tmp_path / "rows.csv", [], []

    def job(text):
        try:
            for _ in range(20):
                with new_file(path) as partial:
                    inside.append(text)
                    partial.write_text(text * 1000)
                    assert partial.read_text() == text * 1000
                    inside.remove(text)
                    assert inside == []
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=job, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert names(tmp_path) == ["rows.csv"]


def test_the_parent_is_never_listed(tmp_path, monkeypatch):
    """A fleet's job beside 60,000 others takes no longer than one alone."""
    out = tmp_path / "out"

    def unlike(real):
        def listed(path="."):
            assert isinstance(path, int) or Path(os.fsdecode(path)) != tmp_path
            return real(path)

        return listed

    monkeypatch.setattr(os, "listdir", unlike(os.listdir))
    monkeypatch.setattr(os, "scandir", unlike(os.scandir))
    for overwrite in (False, True):
        check_output_folder(out, overwrite)
        write(out, overwrite=overwrite)
    with new_file(tmp_path / "file") as partial:
        partial.write_text("")


def test_folders_above_that_another_job_takes_away(tmp_path, monkeypatch):
    """Two jobs make the same new parent; the first one, refused, removes it under the second."""
    import filelock

    out, left = tmp_path / "a" / "b" / "out", [3]

    class Lock(filelock.FileLock):
        def acquire(self, *arguments, **options):
            if left[0]:
                left[0] -= 1
                shutil.rmtree(tmp_path / "a")
            return super().acquire(*arguments, **options)

    monkeypatch.setattr(filelock, "FileLock", Lock)
    write(out)
    assert verify_folder(out) == []
