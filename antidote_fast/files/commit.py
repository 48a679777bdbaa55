"""A folder appears whole or not at all.

A job writes into a folder staged beside the target; the last file written is ``COMPLETE.json``
with the hash of every other one; then everything is flushed to disk and the staged folder takes
the target's name in one rename. A crash at any point leaves the target as it was. What cannot be
replaced by a rename is filled (:mod:`antidote_fast.files.places`).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from antidote_fast.errors import AntidoteError, DataError, NoRoom, NotWritable
from antidote_fast.files import manifest, places
from antidote_fast.files.manifest import MANIFEST, TOOL, read_manifest
from antidote_fast.files.places import run_of, sync
from antidote_fast.files.safe_open import read_object
from antidote_fast.system.progress import Progress

STATE = "run.json"  # in the state of a run that resumes
RUN_INPUTS = "run_inputs"  # in its COMPLETE.json
NOTHING = "nothing was written"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_output_folder(path: str | Path, overwrite: bool = False) -> None:
    """Refuse an output folder that must not or cannot be written, before anything costly starts.

    A folder that does not exist or is empty is fine. With ``overwrite`` so is one that this tool
    wrote and to which nothing was added since. Under the folder's lock a dummy is staged, renamed
    and removed as a job would do it at its end; what killed jobs left is cleared.

    Raises:
        DataError: naming the folder and what was found in it, or that another job is at work.
        AntidoteError: the disk is full.
    """
    as_named, path = Path(path), Path(os.path.abspath(path))
    with os_errors(as_named, any_number=True):
        # What a killed job may have left, inside or beside.
        if os.path.isdir(path / places.HIDDEN) or (path.is_dir() and os.path.isdir(run_of(path))):
            with contextlib.suppress(AntidoteError), locked(path):
                pass
        check_contents(as_named, overwrite)
        with locked(path) as place:
            check_contents(as_named, overwrite)
            if place.inside or not path.is_dir():  # else the lock has tried whether it can move
                places.probe(place)


def check_parent(folder: str | Path) -> None:
    """Refuse a folder, such as a fleet's, in which no output can be made; it need not be there.

    Raises:
        DataError, AntidoteError: as :func:`check_output_folder`.
    """
    folder = Path(os.path.abspath(folder))
    busy = DataError(f"output_dir={str(folder)!r}: another job is at work there")
    try:
        # A name that those who look through such a folder know.
        lock = places.locked_place(folder / "report.json", busy)
        with os_errors(folder, any_number=True), lock as place:
            places.probe(place)
    except DataError as error:
        if error is not busy:  # then outputs can be made, for another job makes one
            raise


def check_contents(path: str | Path, overwrite: bool) -> None:
    """The part of :func:`check_output_folder` that looks at what is there."""
    path = Path(path)
    where = f"output_dir={str(path)!r}"
    places.check_name(path)
    if path.is_symlink():
        raise DataError(f"{where}: is a symbolic link; give the folder itself")
    if not path.exists():
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise DataError(f"{where}: {parent} is not a folder")
        if not os.access(parent, os.W_OK):
            raise DataError(f"{where}: {parent} is not writable")
        return
    if not path.is_dir():
        raise DataError(f"{where}: exists and is not a folder")
    if not places.contents(path):
        return
    if not overwrite:
        raise DataError(
            f"{where}: exists and is not empty; name another folder, or pass "
            f"overwrite to replace one that {TOOL} wrote"
        )
    written = read_manifest(path)
    if written is None:
        raise DataError(
            f"{where}: was not written by {TOOL} (no {MANIFEST}), so overwrite does not replace it"
        )
    apart = f"{places.HIDDEN}/"
    present = {name for name in manifest.listing(path) if not name.startswith(apart)}
    foreign = sorted(present - set(written["files"]))
    if foreign:
        raise DataError(
            f"{where}: holds {foreign[0]!r}, which {TOOL} did not write; move it away first"
        )


@contextlib.contextmanager
def output_folder(
    path: str | Path,
    overwrite: bool = False,
    *,
    progress: Progress = False,
    **manifest_entries: Any,
) -> Iterator[Path]:
    """Stage a folder beside ``path`` and give it that name only when the block ends well.

    Inside the block the staged folder (yielded as a ``Path``) is an ordinary empty folder. At its
    end ``COMPLETE.json`` is written into it (the SHA-256 and size of every file), everything is
    fsynced and the folder renamed; an exception, a full disk or a killed process leaves ``path`` as
    it was. An existing folder is replaced in one exchange where the system has it (Linux).

    Args:
        path: the folder to make.
        overwrite: replace ``path``, if this tool wrote it; at the end the state of a run that was
            interrupted there is removed.
        progress: as :func:`antidote_fast.system.progress.track` takes it, while files are hashed.
        manifest_entries: further JSON values for ``COMPLETE.json``.

    Raises:
        DataError: ``path`` must not be written (see :func:`check_output_folder`), or another job is
            writing it.
        AntidoteError: the disk is full, or a file exceeds a limit.
    """
    path = Path(os.path.abspath(path))
    check_contents(path, overwrite)
    with locked(path) as place:
        check_contents(path, overwrite)
        staged = place.at("partial")
        try:
            with os_errors(path):
                staged.mkdir()
                yield staged
                commit(staged, place, manifest_entries, progress=progress)
            if overwrite:  # which gives up what an interrupted run has left
                shutil.rmtree(place.at("run"), ignore_errors=True)
        finally:
            # After an exchange the staged name holds the old folder.
            shutil.rmtree(staged, ignore_errors=True)


def commit(
    staged: Path,
    place: places.Place,
    manifest_entries: Mapping[str, Any],
    digests: Mapping[str, str] | None = None,
    progress: Progress = False,
) -> None:
    """Give a staged folder its name: ``COMPLETE.json`` last, everything flushed, then one rename.

    The caller holds the lock; what ``staged`` names afterwards (an old folder, where there was one)
    is the caller's to remove.

    Args:
        staged: a folder beside ``place.path``, or inside of it.
        place: which to take.
        manifest_entries: further JSON values for ``COMPLETE.json``.
        digests: {file name: SHA-256} of files that were hashed before and are on the disk already.
        progress: while files are hashed.

    Raises:
        AntidoteError: the folder is in its place, but a power cut may take it away; or, inside,
            that it is half-filled (:func:`antidote_fast.files.places.put_in_place`).
    """
    manifest.write_manifest(staged, manifest_entries, digests or {}, progress)
    # Files get the modes that the umask gives; safetensors writes its own for the owner alone.
    mode = staged.stat().st_mode & 0o666
    for root, _, names in os.walk(staged, topdown=False):
        for path in (os.path.join(root, name) for name in names):
            if not os.path.islink(path):
                os.chmod(path, mode)
            sync(path)
        sync(root)
    places.put_in_place(staged, place)
    try:
        sync(place.path.parent)
    except OSError as error:
        if error.errno == errno.EIO:  # else one that cannot be opened, or flushed, by anybody
            raise AntidoteError(
                f"output_dir={str(place.path)!r}: is whole and in its place, but its name may be "
                f"lost with the power: {error.strerror}"
            ) from error


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[places.Place]:
    """Hold the lock of an output folder; what killed jobs have left of it is cleared away.

    Folders above ``path`` that had to be made for the lock are removed again where ``path`` is not
    there at the end.

    Raises:
        DataError: another job holds it, or it cannot be made.
    """
    path = Path(os.path.abspath(path))
    busy = DataError(f"output_dir={str(path)!r}: another job is writing it")
    with contextlib.ExitStack() as stack:
        with os_errors(path, any_number=True):
            place = stack.enter_context(places.locked_place(path, busy))
        run = place.at("run")
        if run.is_dir() and _is_output_of(path, run):
            shutil.rmtree(run, ignore_errors=True)  # killed between its rename and its end
        yield place


def _is_output_of(path, run):
    """Whether ``path`` is the whole output of the very run that left its state in ``run``."""
    recorded = (read_manifest(path) or {}).get(RUN_INPUTS)
    state = read_object(run / STATE, manifest.MAX_MANIFEST_BYTES) if recorded else None
    return bool(state) and "inputs" in state and recorded == digest_of(state["inputs"])


def digest_of(inputs: Any) -> str:
    """One SHA-256 for everything that decides a result, as ``COMPLETE.json`` records it."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def first_difference(before: Any, now: Any) -> str | None:
    """The first key under which two dicts differ; None where none does, or one is no dict."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None
    return next((k for k in sorted({*before, *now}) if before.get(k) != now.get(k)), None)


@contextlib.contextmanager
def os_errors(
    path: str | Path, outcome: Callable[[], str] = lambda: NOTHING, any_number: bool = False
) -> Iterator[None]:
    """Turn the operating system's refusal to write the output ``path`` into one line.

    Args:
        outcome: called for what is left then.
        any_number: any error of the system's, not only a full disk and missing rights.

    Raises:
        NoRoom: the disk is full, or a file exceeds a limit.
        NotWritable: anything else.
    """
    try:
        yield
    except Exception as error:
        number = _os_error_number(error)
        if number in _FULL:
            kind = NoRoom
        elif number in _REFUSED or (any_number and isinstance(error, OSError)):
            kind = NotWritable
        else:
            raise
        why = os.strerror(number) if number else str(error)
        if number == errno.ENAMETOOLONG:
            why += f" (most systems take {255 - len('..partial')} bytes for an output)"
        raise kind(f"output_dir={str(path)!r}: {why}; {outcome()}") from error


def _os_error_number(error):
    """The system's number of an error; safetensors has it in the text of its own exception."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error ([0-9]{1,4})\)", str(error))
    return int(told[1]) if told and type(error).__name__ == "SafetensorError" else None


@contextlib.contextmanager
def new_file(path: str | Path, alone: bool = False) -> Iterator[Path]:
    """A name beside ``path`` to write to; at the end it is flushed and takes the name ``path``.

    Where the block raises, ``path`` is as it was and nothing else is left; what a killed process
    left is replaced by the next one to write ``path``. ``alone`` says that the caller holds a lock
    which nobody gets past who would write ``path``.

    Raises:
        DataError: others have been writing it for a minute.
    """
    path = Path(path)
    beside = places.Place(path)
    partial = beside.at("partial")
    busy = DataError(f"{path}: another job is writing it")
    nobody = contextlib.nullcontext()
    with nobody if alone else places.locked_file(beside.at("lock"), busy, wait=60):
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
        finally:
            if os.path.lexists(partial):
                os.unlink(partial)


def nearest_folder(path: str | Path) -> Path:
    """The folder of ``path`` that is there: itself, or the nearest one above."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def check_free_space(folder: str | Path, needed: int) -> None:
    """Refuse, before any work, what will not fit on the disk of ``folder``."""
    folder = nearest_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoRoom(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on its disk"
        )
