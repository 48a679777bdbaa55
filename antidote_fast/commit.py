"""A folder appears whole or not at all.

A job writes into a folder staged beside the target; the last file written is ``COMPLETE.json``
with the hash of every other one; then everything is flushed to disk and the staged folder takes
the target's name in one rename. A crash at any point leaves the target as it was.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from pathlib import Path

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.progress import track
from antidote_fast.safe_open import is_file_name, open_file, read_file

MANIFEST = "COMPLETE.json"
TOOL = "antidote-fast"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20
_MAX_LISTED = 100_000  # files
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def sha256_file(path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        OSError, DataError: as :func:`antidote_fast.safe_open.open_file`; a link is not followed.
    """
    with open_file(path) as file:
        return sha256_of(file)


def sha256_of(file) -> str:
    """The SHA-256 of what is left to read of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_manifest(folder) -> dict | None:
    """The ``COMPLETE.json`` of ``folder``, or None where this tool did not write one there.

    One that lists anything but relative names inside the folder is none of this tool's.
    """
    path = Path(folder) / MANIFEST
    try:
        if path.is_symlink():
            return None
        manifest = json.loads(read_file(path, MAX_MANIFEST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):  # a DataError is a ValueError
        return None
    if not isinstance(manifest, dict) or manifest.get("tool") != TOOL:
        return None
    if manifest.get("schema_version") != MANIFEST_VERSION:
        return None
    files = manifest.get("files")
    if not isinstance(files, dict) or len(files) > _MAX_LISTED:
        return None
    return manifest if all(map(_is_inside, files)) and all(map(_is_entry, files.values())) else None


def _is_inside(name):
    """Whether a name of a listing is a relative one that stays in its folder."""
    return name != MANIFEST and all(map(is_file_name, name.split("/")))


def _is_entry(entry):
    """A file's ``{"bytes": size, "sha256": digits}``."""
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
        return False
    return isinstance(entry.get("sha256"), str) and len(entry["sha256"]) == 64


def verify_folder(folder, progress=False) -> list[str]:
    """Compare a folder written by :func:`output_folder` with its ``COMPLETE.json``.

    Args:
        folder: the folder.
        progress: as :func:`antidote_fast.progress.track` takes it.

    Returns:
        One line for each file that is missing, extra, cut short or changed; empty when all is well.

    Raises:
        DataError: the folder has no readable ``COMPLETE.json`` of this tool.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: has no {MANIFEST} written by {TOOL}")
    problems = []
    present = _listing(folder)
    for name, entry in track(sorted(manifest["files"].items()), "verify", progress):
        if name not in present:
            problems.append(f"{name}: missing")
        elif present[name].is_symlink():
            problems.append(f"{name}: is a link")
        elif present[name].stat().st_size != entry.get("bytes"):
            problems.append(f"{name}: {present[name].stat().st_size} bytes, not {entry['bytes']}")
        elif sha256_file(present[name]) != entry.get("sha256"):
            problems.append(f"{name}: contents changed")
    problems += [
        f"{name}: not in {MANIFEST}" for name in sorted(set(present) - set(manifest["files"]))
    ]
    return problems


def check_output_folder(path, overwrite=False):
    """Refuse an output folder that must not be written, before anything costly starts.

    A folder that does not exist or is empty is fine. With ``overwrite`` so is one that this tool
    wrote and to which nothing was added since.

    Raises:
        DataError: naming the folder and what was found in it.
    """
    path = Path(path)
    if path.is_symlink():
        raise DataError(f"output_dir={str(path)!r}: is a symbolic link; give the folder itself")
    if not path.exists():
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise DataError(f"output_dir={str(path)!r}: {parent} is not a folder")
        if not os.access(parent, os.W_OK):
            raise DataError(f"output_dir={str(path)!r}: {parent} is not writable")
        return
    if not path.is_dir():
        raise DataError(f"output_dir={str(path)!r}: exists and is not a folder")
    present = _listing(path)
    if not present and not any(path.iterdir()):
        return
    if not overwrite:
        raise DataError(
            f"output_dir={str(path)!r}: exists and is not empty; name another folder, or pass "
            f"overwrite to replace one that {TOOL} wrote"
        )
    manifest = read_manifest(path)
    if manifest is None:
        raise DataError(
            f"output_dir={str(path)!r}: was not written by {TOOL} (no {MANIFEST}), so overwrite "
            "does not replace it"
        )
    foreign = sorted(set(present) - set(manifest["files"]))
    if foreign:
        raise DataError(
            f"output_dir={str(path)!r}: holds {foreign[0]!r}, which {TOOL} did not write; move it "
            "away first"
        )


@contextlib.contextmanager
def output_folder(path, overwrite=False, *, progress=False, **manifest_entries):
    """Stage a folder beside ``path`` and give it that name only when the block ends well.

    Inside the block the staged folder (yielded as a ``Path``) is an ordinary empty folder. At its
    end ``COMPLETE.json`` is written into it (the SHA-256 and size of every file), everything is
    fsynced and the folder renamed; an exception, a full disk or a killed process leaves ``path`` as
    it was. An existing folder is replaced in one exchange where the system has it (Linux).

    Args:
        path: the folder to make.
        overwrite: replace ``path``, if this tool wrote it.
        progress: as :func:`antidote_fast.progress.track` takes it, while files are hashed.
        manifest_entries: further JSON values for ``COMPLETE.json``.

    Raises:
        DataError: ``path`` must not be written (see :func:`check_output_folder`), or another job is
            writing it.
        AntidoteError: the disk is full, or a file exceeds a limit.
    """
    path = Path(os.path.abspath(path))
    check_output_folder(path, overwrite)
    with locked(path):
        check_output_folder(path, overwrite)
        staged = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:12]}"
        try:
            with os_errors(path):
                staged.mkdir()
                yield staged
            commit(staged, path, manifest_entries, progress=progress)
        finally:
            # After an exchange the staged name holds the old folder.
            shutil.rmtree(staged, ignore_errors=True)


def commit(staged, path, manifest_entries, digests=None, progress=False):
    """Give a staged folder its name: ``COMPLETE.json`` last, everything flushed, then one rename.

    The caller holds the lock of ``path``; what ``staged`` names afterwards (an old folder, where
    there was one) is the caller's to remove.

    Args:
        staged: a folder beside ``path``, on the same disk.
        path: the name to take.
        manifest_entries: further JSON values for ``COMPLETE.json``.
        digests: {file name: SHA-256} of files that were hashed before and are on the disk already.
        progress: as :func:`antidote_fast.progress.track` takes it.
    """
    with os_errors(path):
        _write_manifest(staged, manifest_entries, digests or {}, progress)
        _usual_modes(staged)
        _sync_tree(staged)
        _put_in_place(staged, path)
        sync(path.parent)


@contextlib.contextmanager
def locked(path):
    """Hold the lock of an output folder; what killed jobs have left of it is cleared away.

    Folders above ``path`` that had to be made for the lock are removed again where ``path`` is not
    there at the end.

    Raises:
        DataError: another job holds it, or it cannot be made.
    """
    import filelock

    made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    try:
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(str(path.parent / f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            made = []
            raise DataError(f"output_dir={str(path)!r}: another job is writing it") from None
        try:
            # Held by nobody else now, so whatever is staged belongs to a job that was killed.
            for stale in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
                if stale.name.endswith("-old") and not path.exists():
                    os.rename(stale, path)  # killed between the two renames of _put_in_place
                else:
                    shutil.rmtree(stale, ignore_errors=True)
            yield
        finally:
            # Unlinked while held: filelock retries on a file that has lost its name.
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()
    finally:
        if not path.exists():
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextlib.contextmanager
def os_errors(path):
    """Turn the operating system's refusal to write into one line."""
    try:
        yield
    except Exception as error:
        number = _os_error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise AntidoteError(
                f"output_dir={str(path)!r}: {os.strerror(number)}; nothing was written"
            ) from error
        if number in (errno.EACCES, errno.EROFS):
            raise DataError(
                f"output_dir={str(path)!r}: {os.strerror(number)}; nothing was written"
            ) from error
        raise


def _os_error_number(error):
    """The system's number of an error; safetensors has it in the text of its own exception."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error ([0-9]{1,4})\)", str(error))
    return int(told[1]) if told and type(error).__name__ == "SafetensorError" else None


def _listing(folder):
    """Relative posix name -> path of every file (and link) under ``folder``, manifest apart."""
    return {
        p.relative_to(folder).as_posix(): p
        for p in sorted(folder.rglob("*"))
        if (p.is_file() or p.is_symlink()) and p != folder / MANIFEST
    }


def _write_manifest(folder, entries, digests, progress):
    files = {
        name: {"sha256": digests.get(name) or sha256_file(p), "bytes": p.stat().st_size}
        for name, p in track(_listing(folder).items(), "hash", progress)
    }
    manifest = {
        **entries,
        "schema_version": MANIFEST_VERSION,
        "tool": TOOL,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": files,
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _usual_modes(folder):
    """Files get the modes that the umask gives; safetensors writes its own for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in (*_listing(folder).values(), folder / MANIFEST):
        if not path.is_symlink():
            path.chmod(mode)


@contextlib.contextmanager
def new_file(path):
    """A name beside ``path`` to write to; at the end it is flushed and takes the name ``path``.

    Where the block raises, ``path`` is as it was and nothing else is left.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:12]}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path):
    """Wait until a file or a folder's list of names is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(folder):
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(root, name))
        sync(root)


def _put_in_place(staged, path):
    if not path.exists():
        os.rename(staged, path)
    elif not any(path.iterdir()):
        os.rename(staged, path)  # rename(2) replaces an empty folder
    elif not _exchange(staged, path):
        old = staged.with_name(staged.name + "-old")
        os.rename(path, old)
        try:
            os.rename(staged, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


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
