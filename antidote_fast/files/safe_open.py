"""Files of other people: links are not followed, and what was read is there at the end.

Whoever owns a folder can swap a file in it for a link, or change one, while a job reads it. So a
file is opened by its plain name, relative to the folder's descriptor, and looked at through its own
descriptor; and a job compares before it commits (:class:`Watch`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import time
import weakref
from pathlib import Path
from typing import BinaryIO

from antidote_fast.errors import DataError, readable

# O_NONBLOCK: opening a pipe would wait for ever.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
# A file of the hub's cache is a link to this place, beside the folder "snapshots".
_BLOB = re.compile(r"\.\./\.\./blobs/([^/]+)")
# Of a folder; somebody's log may grow there.
READ_BY_STAGES = re.compile(
    r".*\.(safetensors|json|txt|model|jinja|tiktoken|py|md)|verdicts\.jsonl|[^.]+"
)
_MAX_FILES = 10_000  # of one folder
_MAX_HOLES = 64 << 20
# A change within one tick of the system's clock (1 to 10 ms) leaves the time of a file as it was.
_TICK_NS = 20_000_000
_TICKS = 5


def is_file_name(name: object) -> bool:
    """Whether a text is a plain file name: no folder in it, printable, at most 255 bytes."""
    if not isinstance(name, str) or not name or not name.isprintable() or name in (".", ".."):
        return False
    return "/" not in name and len(name.encode("utf-8", "replace")) <= 255


class Folder:
    """A folder held open; its files are opened relative to it.

    ``path`` may itself be a link, as it is the caller's own word.

    Raises:
        DataError: no such folder, or it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._hold(os.open(self.path, _FOLDER))
        except OSError as error:
            what = "no such folder" if error.errno in _ABSENT else error.strerror
            raise DataError(f"{self.path}: {what}") from None

    def _hold(self, fd):
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    def inner(self, name: str) -> Folder:
        """A folder inside this one, which is no link.

        Raises:
            FileNotFoundError: nothing of this name.
            DataError: it is a link or no folder.
        """
        folder = object.__new__(Folder)
        folder.path = self.path / name
        try:
            folder._hold(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self._fd))
        except NotADirectoryError:  # a link, too
            raise DataError(
                f"{folder.path}: is not a folder, or a link out of its folder"
            ) from None
        return folder

    def open(self, name: str) -> BinaryIO:
        """A regular file of the folder, opened to read bytes.

        A link is followed to a file beside it, or from a snapshot of the hub's cache to the cache's
        own blobs; one that leads anywhere else is refused.

        Raises:
            FileNotFoundError: no such file.
            DataError: no plain file name, a link out of the folder, no regular file, or a file that
                cannot be read.
        """
        if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\0"} & set(name):
            raise DataError(
                f"{self.path}: refers to {ascii(name)[:80]}, which is not a plain file name"
            )
        path = self.path / name
        try:
            try:
                fd = os.open(name, _READ, dir_fd=self._fd)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EMLINK):
                    raise
                fd = self._open_link(name)
        except FileNotFoundError:
            raise
        except OSError as error:
            what = "is not a regular file" if error.errno == errno.ENXIO else error.strerror
            raise DataError(f"{path}: cannot be read: {what}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise DataError(f"{path}: is not a regular file")
        return os.fdopen(fd, "rb")

    def has(self, name: str) -> bool:
        """Whether there is anything of this name."""
        return self._mode(name) != 0

    def is_folder(self, name: str) -> bool:
        """Whether a name is that of a folder inside this one, and no link."""
        return stat.S_ISDIR(self._mode(name))

    def _mode(self, name):
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode
        except (OSError, ValueError):
            return 0

    def names(self) -> list[str]:
        """The names of all that is in the folder, sorted; a DataError for more than 10,000."""
        names = []
        with os.scandir(self._fd) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > _MAX_FILES:
                    raise DataError(f"{self.path}: holds more than {_MAX_FILES} files")
        return sorted(names)

    def _open_link(self, name):
        target = os.readlink(name, dir_fd=self._fd)
        blob = _BLOB.fullmatch(target)
        try:
            if is_file_name(target):
                return os.open(target, _READ, dir_fd=self._fd)
            # The folder's real place: what it is called may be a link.
            if blob and Path(os.path.realpath(self.path)).parent.name == "snapshots":
                blobs = self.inner("../../blobs")
                return os.open(blob[1], _READ, dir_fd=blobs._fd)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):
                raise
        raise DataError(f"{self.path / name}: is a link out of its folder")


_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def open_file(path: str | Path) -> BinaryIO:
    """As :meth:`Folder.open`, for a file that a caller names."""
    path = Path(path)
    return Folder(path.parent).open(path.name)


def open_below(folder: str | Path, name: str) -> BinaryIO:
    """As :meth:`Folder.open`, for a relative name that may have folders in it.

    Raises:
        FileNotFoundError, DataError: as :meth:`Folder.open`; a folder on the way is a link.
    """
    *folders, last = name.split("/")
    if not all(map(is_file_name, folders)):
        raise DataError(f"{folder}: refers to {ascii(name)[:80]}, which leads out of it")
    place = Folder(folder)
    for part in folders:
        place = place.inner(part)
    return place.open(last)


def read_file(path: str | Path, max_bytes: int) -> bytes:
    """As :func:`read_all`, for a file that a caller names, opened as :meth:`Folder.open` does."""
    with open_file(path) as file:
        return read_all(file, path, max_bytes)


def read_all(file: BinaryIO, path: str | Path, max_bytes: int) -> bytes:
    """All bytes of an open file, as they were at one time.

    Raises:
        DataError: larger than ``max_bytes``, of which nothing is read; or it cannot be read, or
            changed meanwhile.
    """
    before = os.fstat(file.fileno())
    if before.st_size > max_bytes:
        raise DataError(f"{path}: larger than {_size(max_bytes)}")
    check_stored(before, path)
    try:
        with readable(path):
            data = file.read(before.st_size + 1)
    except (MemoryError, OverflowError):
        size = _size(before.st_size)
        raise DataError(f"{path}: cannot be read: {size} are more than fit in memory") from None
    if len(data) != before.st_size or identity(os.fstat(file.fileno())) != identity(before):
        raise DataError(f"{path}: changed while it was read")
    return data


def read_object(path: str | Path, max_bytes: int) -> dict | None:
    """The JSON object of a file that a caller names; None where it is none that can be read.

    JSON that is no object counts as an empty one.
    """
    try:
        value = json.loads(read_file(path, max_bytes).decode("utf-8"))
    except (OSError, ValueError, RecursionError):  # a DataError is a ValueError
        return None
    return value if isinstance(value, dict) else {}


def check_stored(status: os.stat_result, path: str | Path) -> None:
    """Refuse a large file of which next to nothing is stored: its holes would fill the memory.

    Raises:
        DataError: over 64 MiB, and less than a sixteenth of it on the disk.
    """
    blocks = getattr(status, "st_blocks", 0)  # 0: a file system that does not tell
    if status.st_size > _MAX_HOLES and 0 < 512 * blocks < status.st_size // 16:
        raise DataError(f"{path}: {_size(status.st_size)}, of which next to nothing is stored")


class Watch:
    """What a job's inputs were when it began, for a comparison before it commits.

    A file counts by its inode, size and the times of its last change, which no owner can set back.

    ``paths`` are files, and folders with the files in them; None and what is not there (names of
    the hub) are left out.

    Raises:
        DataError: a folder of too many files, or a file that is being written at this moment.
    """

    def __init__(self, *paths: str | Path | None) -> None:
        self._seen = {}
        for path in paths:
            if path is None:
                continue
            path = Path(path)
            files = [path]
            if path.is_dir():
                files = [path / n for n in Folder(path).names() if READ_BY_STAGES.fullmatch(n)]
            for file in files:
                with contextlib.suppress(OSError):
                    state = _settled(file)
                    if state is not None:
                        self._seen[file] = state

    def check(self) -> None:
        """Compare; a DataError names the first file that is gone or another one now."""
        for file, before in self._seen.items():
            now = None
            with contextlib.suppress(OSError):
                now = _both(file)
            if now != before:
                raise DataError(f"{file}: changed while it was in use; nothing is made from it")


def _settled(file):
    """The identity of a file whose last change is older than a tick of the clock."""
    for _ in range(_TICKS):
        state = _both(file)
        if state is None:
            return None
        age = time.time_ns() - max(changed for *_, changed in state)
        if not 0 <= age < _TICK_NS:
            return state
        time.sleep(_TICK_NS / 1e9)
    raise DataError(f"{file}: is being written")


def _both(file):
    """Identities of a name and of what it leads to; None for what is neither file nor link."""
    status = os.lstat(file)
    if stat.S_ISLNK(status.st_mode):
        return identity(status), identity(os.stat(file))
    return (identity(status),) if stat.S_ISREG(status.st_mode) else None


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What of an ``os.stat`` tells one state of one file from any other."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _size(number):
    return f"{number >> 30} GiB" if number >= 1 << 30 else f"{number >> 20} MiB"
