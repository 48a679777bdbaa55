"""Files of other people: what is opened, what is refused, and what is noticed afterwards."""

import os

import pytest

from antidote_fast.errors import DataError
from antidote_fast.files import safe_open
from antidote_fast.files.safe_open import Folder, Watch, open_below, open_file, read_file


@pytest.fixture
def place(tmp_path):
    """``mine`` with a file, beside ``yours`` with a secret."""
    for name, text in (("mine", "my own"), ("yours", "a secret")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text(text)
    return tmp_path


def test_a_file_is_read_by_its_plain_name(place):
    with Folder(place / "mine").open("notes.txt") as file:
        assert file.read() == b"my own"
    assert read_file(place / "mine" / "notes.txt", 6) == b"my own"
    with open_below(place, "mine/notes.txt") as file:
        assert file.read() == b"my own"


@pytest.mark.parametrize("name", ["", ".", "..", "../yours/notes.txt", "/etc/passwd", "a\0", None])
def test_a_name_that_leads_elsewhere(place, name):
    with pytest.raises(DataError, match="which is not a plain file name"):
        Folder(place / "mine").open(name)


@pytest.mark.parametrize(
    "target", ["../yours/notes.txt", "{place}/yours/notes.txt", "{place}/mine/notes.txt", "second"]
)
def test_a_link_out_of_the_folder(place, target):
    """A link beside a second one: what that leads to is not looked at either."""
    (place / "mine" / "second").symlink_to("../yours/notes.txt")
    link = place / "mine" / "link.txt"
    link.symlink_to(target.format(place=place))
    for read in (lambda: Folder(place / "mine").open("link.txt"), lambda: open_file(link)):
        with pytest.raises(DataError, match=r"link\.txt: is a link out of its folder"):
            read()


def test_a_link_to_a_file_beside_it(place):
    (place / "mine" / "link.txt").symlink_to("notes.txt")
    assert read_file(place / "mine" / "link.txt", 100) == b"my own"
    (place / "mine" / "gone.txt").symlink_to("nothing")
    with pytest.raises(FileNotFoundError):
        open_file(place / "mine" / "gone.txt")


def test_a_snapshot_reaches_the_blobs_and_no_other_snapshot(tmp_path):
    repository = tmp_path / "models--some--model"
    mine, yours = repository / "snapshots" / "me", repository / "snapshots" / "you"
    for folder in (mine, yours, repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "abc").write_text("of the hub")
    (yours / "config.json").write_text("a secret")
    (mine / "config.json").symlink_to("../../blobs/abc")
    (mine / "other.json").symlink_to("../you/config.json")
    (mine / "further.json").symlink_to("../../blobs/further")
    (repository / "blobs" / "further").symlink_to(yours / "config.json")
    (tmp_path / "named").symlink_to(mine)
    for folder in (mine, tmp_path / "named"):
        assert read_file(folder / "config.json", 100) == b"of the hub"
        for name in ("other.json", "further.json"):
            with pytest.raises(DataError, match="is a link out of its folder"):
                open_file(folder / name)
    outside = tmp_path / "elsewhere" / "me"
    outside.mkdir(parents=True)
    (outside / "config.json").symlink_to("../../blobs/abc")  # a folder that is no snapshot
    with pytest.raises(DataError, match="is a link out of its folder"):
        open_file(outside / "config.json")


def test_what_is_no_file(place):
    os.mkfifo(place / "mine" / "pipe")
    (place / "mine" / "folder").mkdir()
    (place / "mine" / "device").symlink_to("/dev/zero")
    for name, says in (
        ("pipe", "is not a regular file"),
        ("folder", "is not a regular file"),
        ("device", "is a link out of its folder"),
    ):
        with pytest.raises(DataError, match=f"{name}: {says}"):
            Folder(place / "mine").open(name)


def test_a_folder_on_the_way_is_no_link(place):
    (place / "mine" / "inner").symlink_to(place / "yours")
    with pytest.raises(DataError, match="inner: is not a folder, or a link"):
        open_below(place / "mine", "inner/notes.txt")
    for name in ("../yours/notes.txt", "inner/../notes.txt", "/etc/passwd"):
        with pytest.raises(DataError, match="which leads out of it"):
            open_below(place / "mine", name)


def test_a_folder_that_is_swapped_stays_the_one_that_was_opened(place):
    folder = Folder(place / "mine")
    (place / "mine").rename(place / "moved")
    (place / "mine").symlink_to(place / "yours")
    with folder.open("notes.txt") as file:
        assert file.read() == b"my own"


def test_sizes_and_counts_are_bounded(place, monkeypatch):
    with open(place / "mine" / "sparse", "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(DataError, match="sparse: larger than 1 MiB"):
        read_file(place / "mine" / "sparse", 1 << 20)
    monkeypatch.setattr(safe_open, "_MAX_FILES", 1)
    with pytest.raises(DataError, match="holds more than 1 files"):
        Folder(place / "mine").names()


def test_a_file_that_grows_while_it_is_read(place, monkeypatch):
    path = place / "mine" / "notes.txt"
    with open_file(path) as file:
        before = os.fstat(file.fileno())
        path.write_text("my own and more")
        monkeypatch.setattr(os, "fstat", lambda fd, real=os.fstat: before)
        with pytest.raises(DataError, match=r"notes\.txt: changed while it was read"):
            safe_open.read_all(file, path, 100)


# --- a job's inputs, at its beginning and at its end ----------------------------------------------


def overwritten(path):
    path.write_text("my owN")


def replaced(path):
    path.with_name("new").write_text("my own")
    os.replace(path.with_name("new"), path)


def swapped_and_back(path):
    """As if nothing had been: the same file under the same name again."""
    path.rename(path.with_name("kept"))
    path.symlink_to("../yours/notes.txt")
    path.unlink()
    path.with_name("kept").rename(path)


def dated_back(path):
    times = path.stat()
    path.write_text("my owN")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [overwritten, replaced, swapped_and_back, dated_back, lambda path: path.unlink()]
)
@pytest.mark.parametrize("named", ["mine", "mine/notes.txt"])
def test_a_change_is_noticed(place, named, change):
    watch = Watch(place / named, None, place / "not there")
    watch.check()
    change(place / "mine" / "notes.txt")
    with pytest.raises(DataError, match=r"notes\.txt: changed while it was in use"):
        watch.check()


def test_what_no_stage_reads_may_change(place):
    watch = Watch(place / "mine")
    (place / "mine" / "run.log").write_text("a line")
    (place / "mine" / "out").mkdir()
    watch.check()


def test_a_change_within_a_tick_of_the_clock_is_waited_for(place, monkeypatch):
    """Two writes of one tick leave the same time: what was written just now is looked at later."""
    waited = []
    monkeypatch.setattr(safe_open.time, "sleep", waited.append)
    path = place / "mine" / "notes.txt"
    changed = path.stat().st_ctime_ns
    now = iter([changed + 1, changed + safe_open._TICK_NS])
    monkeypatch.setattr(safe_open.time, "time_ns", lambda: next(now))
    Watch(path).check()
    assert waited == [safe_open._TICK_NS / 1e9]
    monkeypatch.setattr(safe_open.time, "time_ns", lambda: changed + 1)
    with pytest.raises(DataError, match=r"notes\.txt: is being written"):
        Watch(path)
