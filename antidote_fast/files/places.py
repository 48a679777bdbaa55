"""Where an output lies while it is made, whose turn it is, and how it takes its name.

Beside an output, hidden in its parent: ``.NAME.lock``, ``.NAME.partial`` (what is staged),
``.NAME.old`` (what is replaced, where the system cannot exchange two names) and ``.NAME.run`` (the
state of a run that resumes). The names are fixed: what a killed job left is found without a listing
and belongs to no other output.

A folder that no rename can replace, such as a mount point or one in a parent that is not writable,
has them inside, in ``.antidote-fast``. What is staged there becomes ``ready`` in one rename; from
then on the output is decided, and whoever takes the lock next ends what a kill left half-done. What
loaders look for is removed first and put there last, so none of them meets a mixture.
"""

import contextlib
import ctypes
import dataclasses
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from antidote_fast.errors import AntidoteError, DataError

HIDDEN = ".antidote-fast"
_OURS = re.compile(r"\..+\.(lock|partial|old|run)|" + re.escape(HIDDEN))
_LAST = ("config.json", "adapter_config.json", "COMPLETE.json")
_MOUNTED = "lost+found"  # a new file system is empty but for it
_WAIT_SECONDS = 0.5  # longer than a check holds a lock
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclasses.dataclass(frozen=True)
class Place:
    """Where what belongs to the output ``path`` (absolute) lies: beside it, or inside."""

    path: Path
    inside: bool = False

    def at(self, kind: str) -> Path:
        """The path of ``lock``, ``partial``, ``old``, ``run``; also of ``ready`` and ``moving``."""
        if self.inside:
            return self.path / HIDDEN / kind
        return self.path.parent / f".{self.path.name}.{kind}"


def run_of(path: str | Path) -> Path:
    """The folder that keeps the state of a run for the output ``path``."""
    path = Path(os.path.abspath(path))
    inside = Place(path, True).at("run")
    return inside if os.path.isdir(inside) else Place(path).at("run")


def contents(path: Path) -> list[Path]:
    """What is in an output folder, but for what lies there while it is made."""
    apart = (HIDDEN, _MOUNTED) if os.path.ismount(path) else (HIDDEN,)
    return [p for p in path.iterdir() if p.name not in apart]


def check_name(path: Path) -> None:
    """Refuse, as a DataError, an output called like what this tool keeps beside another one."""
    if _OURS.fullmatch(path.name) or HIDDEN in path.parts:
        raise DataError(
            f"output_dir={str(path)!r}: is a name for what lies beside an output while it is made; "
            "give another"
        )


@contextlib.contextmanager
def locked_file(
    path: Path, busy: Exception, wait: float = _WAIT_SECONDS, make: bool = False
) -> Iterator[None]:
    """Hold a lock file, which is gone at the end.

    Args:
        path: the file.
        busy: the exception to raise where another process holds it for ``wait`` seconds.
        make: make the folders above it, where they are not there; those that stay empty are gone
            at the end too.
    """
    import filelock

    lock = filelock.FileLock(str(path))
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, [p for p in path.parents if make and not p.exists()])
        for left in reversed(range(20 if make else 1)):
            try:
                if make:
                    path.parent.mkdir(parents=True, exist_ok=True)
                elif not path.parent.is_dir():  # filelock would make it, and leave it
                    raise missing
                lock.acquire(timeout=wait)
                break
            except filelock.Timeout:
                raise busy from None
            except FileNotFoundError:  # another job had made the folder, and took it away
                if not left:
                    raise
        try:
            yield
        finally:
            # Unlinked while held: filelock retries on a file that has lost its name.
            with contextlib.suppress(OSError):
                os.unlink(path)
            lock.release()


@contextlib.contextmanager
def locked_place(path: Path, busy: Exception) -> Iterator[Place]:
    """Hold the lock of an output (absolute); what killed jobs left half-done is cleared or ended.

    Raises:
        OSError: neither beside nor inside of it can anything be made.
        Exception: ``busy``, where another job holds it.
    """
    place, inside = Place(path), Place(path, True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_file(place.at("lock"), busy, make=True))
            _clear(place)
            if path.is_dir() and (os.path.isdir(inside.at("")) or not _is_movable(place)):
                place = inside
        except OSError:
            if not path.is_dir():
                raise
            place = inside
        if place.inside:
            stack.callback(_remove_empty, [inside.at("")])
            stack.enter_context(locked_file(inside.at("lock"), busy, make=True))
            _clear(inside)
            _go_on(inside)
        yield place


def probe(place: Place) -> None:
    """Make, rename and remove a folder as a job does at its end; the caller holds the lock.

    Raises:
        OSError: an output could not be made here.
    """
    first, second = place.at("old"), place.at("partial")
    os.mkdir(second)  # no other name is as long
    try:
        os.rename(second, first)
    except OSError:
        os.rmdir(second)
        raise
    os.rmdir(first)


def put_in_place(staged: Path, place: Place) -> None:
    """Give what is staged its name, or put it into the folder; the caller holds the lock.

    Raises:
        OSError: it cannot be; all is as it was.
        AntidoteError: the folder is half-filled; whoever takes the lock next goes on with it.
    """
    path = place.path
    if place.inside:
        _fill(staged, place)
    elif not path.exists() or not any(path.iterdir()):
        os.rename(staged, path)  # rename(2) replaces an empty folder
    elif not _exchange(staged, path):
        old = place.at("old")
        os.rename(path, old)
        try:
            os.rename(staged, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _remove_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _clear(place):
    """Nobody else holds the lock, so what is staged belongs to a job that was killed."""
    old = place.at("old")
    if old.is_dir() and not place.path.exists():
        if any(old.iterdir()):
            os.rename(old, place.path)  # killed between the two renames of put_in_place
        else:
            old.rmdir()  # of a probe
    for stale in (place.at("partial"), old):
        if os.path.lexists(stale):
            shutil.rmtree(stale, ignore_errors=True)


def _is_movable(place):
    """Whether a rename could take the folder away, without doing it.

    rename(2) onto a folder that is not empty never succeeds, and how it fails tells: EBUSY for a
    mount point, EXDEV for a folder of a lower layer of overlayfs.
    """
    dummy = place.at("partial")
    try:
        os.mkdir(dummy)
        os.mkdir(dummy / "x")
        os.rename(place.path, dummy)
    except OSError as error:
        return error.errno in (errno.ENOTEMPTY, errno.EEXIST)
    else:
        os.rename(dummy, place.path)  # a file system that knows no better
        return True
    finally:
        shutil.rmtree(dummy, ignore_errors=True)


def _fill(staged, place):
    os.rename(staged, place.at("ready"))
    try:
        sync(place.at(""))
        _go_on(place)
    except OSError as error:
        raise AntidoteError(
            f"output_dir={str(place.path)!r}: {error.strerror} while files were put there; all are "
            f"whole in {place.at('')}, and the next command for this folder ends it"
        ) from error
    except KeyboardInterrupt:
        _go_on(place)
        raise


def _go_on(place):
    """Put what is ready into the folder, from wherever it was left."""
    path, ready, moving = place.path, place.at("ready"), place.at("moving")
    if ready.is_dir():
        for old in sorted(contents(path), key=_rank, reverse=True):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        sync(path)
        os.rename(ready, moving)
    if moving.is_dir():
        before = 0
        for new in sorted(moving.iterdir(), key=_rank):
            if _rank(new) > before:
                sync(path)
            os.rename(new, path / new.name)
            before = _rank(new)
        sync(path)
        moving.rmdir()


def _rank(entry):
    """When a file may be there: with its weights, its configuration; last the list of all."""
    return 1 + _LAST.index(entry.name) if entry.name in _LAST else 0


def _exchange(first, second):
    """Swap two names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    return done == 0


def sync(path: str | Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
