"""``COMPLETE.json``: the hash of each file of a folder, and whether the files still have it."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from antidote_fast.errors import DataError, readable
from antidote_fast.files import safe_open
from antidote_fast.files.safe_open import read_object
from antidote_fast.system.progress import Progress, track

_NOT_READ = ("README.md", "report.json")
# What a COMPLETE.json must list where it is there.
_WEIGHTS = ("*.safetensors", "config.json", "adapter_config.json", "*.index.json")
_ADAPTER_FILE = "adapter_model.safetensors"
_MAX_BESIDE = 1 << 30

MANIFEST = "COMPLETE.json"
TOOL = "antidote-fast"
_VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20
_MAX_FILES, _MAX_DEPTH = 100_000, 32


@readable()
def check_input(folder: str | Path, progress: Progress = False, only: str | None = None) -> None:
    """Refuse a folder with a ``COMPLETE.json`` whose files are no longer what was written.

    Before anything is computed from them. The files that a stage may read are hashed, however large
    (half a second a gigabyte, one Xeon core; once a process while they stay as they are); of others
    the size is compared. Without a ``COMPLETE.json`` there is nothing to compare with.

    Args:
        folder: of a model, an adapter or norms.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        only: the one file of the folder that is read, where it is one.

    Raises:
        DataError: naming the file; an adapter with more than 1 GiB to read beside its weights.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / MANIFEST).is_symlink() or (folder / MANIFEST).is_file():
            contents = read_object(folder / MANIFEST, MAX_MANIFEST_BYTES)
            if contents is None:
                raise DataError(f"{folder}: its {MANIFEST} is damaged")
            if contents.get("tool") == TOOL:  # another's may say what it likes
                raise DataError(
                    f"{folder}: its {MANIFEST} is damaged, or lists other than its own files"
                )
        return
    for name in _WEIGHTS:
        for path in folder.glob(name):
            if path.name not in manifest["files"]:
                raise DataError(f"{path}: is not in {MANIFEST}; was it added, or was the list cut?")
    files = [item for item in sorted(manifest["files"].items()) if item[0] not in _NOT_READ]
    is_adapter = os.path.lexists(folder / "adapter_config.json")
    beside = 0
    for name, entry in track(files, "verify", progress):
        path = folder / name
        try:
            with safe_open.open_below(folder, name) as file:
                status = os.fstat(file.fileno())
                if status.st_size != entry["bytes"]:
                    told = f"{status.st_size} bytes, not {entry['bytes']} as written"
                    raise DataError(f"{path}: {told}")
                if not (name == only if only else _is_read(name, is_adapter)):
                    continue
                if is_adapter and name != _ADAPTER_FILE:
                    beside += entry["bytes"]
                    if beside > _MAX_BESIDE:
                        raise DataError(f"{path}: with it more than 1 GiB lie beside the weights")
                digest = _digest(path, safe_open.identity(status))
        except FileNotFoundError:
            raise DataError(f"{path}: missing; {MANIFEST} lists it") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if digest != entry["sha256"]:
            raise DataError(f"{path}: contents changed since it was written ({MANIFEST})")


def _is_read(name, is_adapter):
    """Whether a stage reads a file of a model's folder, or of an adapter's, which has one."""
    if is_adapter and name.endswith(".safetensors"):
        return name == _ADAPTER_FILE
    return safe_open.READ_BY_STAGES.fullmatch(name) is not None


@functools.lru_cache(maxsize=4096)
def _digest(path, identity):
    return sha256_file(path)


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal; opened as :meth:`safe_open.Folder.open` says."""
    with safe_open.open_file(path) as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """The SHA-256 of what is left to read of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> dict | None:
    """The ``COMPLETE.json`` of ``folder``, or None where this tool did not write one there.

    One that lists anything but relative names inside the folder is none of this tool's.
    """
    path = Path(folder) / MANIFEST
    manifest = None if os.path.islink(path) else read_object(path, MAX_MANIFEST_BYTES)
    if not manifest or manifest.get("tool") != TOOL:
        return None
    files = manifest.get("files")
    if manifest.get("schema_version") != _VERSION or not isinstance(files, dict):
        return None
    is_sound = len(files) <= _MAX_FILES and all(itertools.starmap(_is_inside, files.items()))
    return manifest if is_sound else None


def _is_inside(name, entry):
    """Whether a name of a listing stays in its folder, and has a size and a SHA-256."""
    if name == MANIFEST or not all(map(safe_open.is_file_name, name.split("/"))):
        return False
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
        return False
    return isinstance(entry.get("sha256"), str) and len(entry["sha256"]) == 64


def write_manifest(
    folder: Path, entries: Mapping[str, Any], digests: Mapping[str, str], progress: Progress = False
) -> None:
    """Write the ``COMPLETE.json`` of a folder: ``entries``, and the hash and size of every file.

    ``digests`` are {file name: SHA-256} of files that were hashed before.
    """
    files = {
        name: {"sha256": digests.get(name) or sha256_file(path), "bytes": path.stat().st_size}
        for name, path in track(listing(folder).items(), "hash", progress)
    }
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {"schema_version": _VERSION, "tool": TOOL, "created": created, "files": files}
    text = json.dumps({**entries, **manifest}, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify_folder(folder: str | Path, progress: Progress = False) -> list[str]:
    """Compare a folder that this tool wrote with its ``COMPLETE.json``.

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
    present = listing(folder)
    for name, entry in track(sorted(manifest["files"].items()), "verify", progress):
        path = present.pop(name, None)
        if path is None:
            problems.append(f"{name}: missing")
        elif path.is_symlink():
            problems.append(f"{name}: is a link")
        elif (size := path.stat().st_size) != entry["bytes"]:
            problems.append(f"{name}: {size} bytes, not {entry['bytes']}")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name}: contents changed")
    return problems + [f"{name}: not in {MANIFEST}" for name in present]


def listing(folder: str | Path) -> dict[str, Path]:
    """Relative posix name -> path of every file (and link) under ``folder``, manifest apart.

    Raises:
        DataError: there are more of them, or they lie deeper, than any output of this tool.
    """
    files, count, left = {}, 0, [(Path(folder), 0)]
    while left:
        here, depth = left.pop()
        with contextlib.suppress(PermissionError), os.scandir(here) as entries:
            for entry in entries:
                count += 1
                if count > _MAX_FILES or depth > _MAX_DEPTH:
                    raise DataError(
                        f"{folder}: holds more than {_MAX_FILES} files, or folders more than "
                        f"{_MAX_DEPTH} deep"
                    )
                path = here / entry.name
                if entry.is_dir(follow_symlinks=False):
                    left.append((path, depth + 1))
                elif entry.is_symlink() or entry.is_file():
                    files[path.relative_to(folder).as_posix()] = path
    files.pop(MANIFEST, None)
    return dict(sorted(files.items()))
