"""``antidote-fast verify``: is a folder whole, and if not, which file is to blame?

A folder that this tool wrote is compared with the hashes of its ``COMPLETE.json``. Any model or
adapter folder is also read as far as its headers: every shard there, none cut short, every tensor
of the index in its place. Nothing in a folder is run.
"""

import functools
import json
import os
import re
from pathlib import Path

from antidote_fast.commit import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    TOOL,
    listing,
    read_manifest,
    sha256_file,
    verify_folder,
)
from antidote_fast.errors import AntidoteError, DataError, UsageError, printable, readable
from antidote_fast.places import HIDDEN
from antidote_fast.progress import command_line_progress, tell, track
from antidote_fast.safe_open import READ_BY_STAGES, identity, open_below, read_file

_USAGE = "usage: antidote-fast verify FOLDER [FOLDER ...] [--json]"
_NOT_READ = ("README.md", "report.json")
# What a COMPLETE.json must list where it is there.
_WEIGHTS = ("*.safetensors", "config.json", "adapter_config.json", "*.index.json")
_ADAPTER_FILE = "adapter_model.safetensors"
_MAX_BESIDE = 1 << 30
_NEVER = "a weight that changed cannot be seen"


def verify(folder, progress=False) -> dict:
    """What is wrong with a folder.

    Args:
        folder: one that this tool wrote, or a model or adapter folder.
        progress: as :func:`antidote_fast.progress.track` takes it.

    Returns:
        ``{"files": count, "bytes": size, "hashes": whether contents were compared, "problems":
        [one line each, a file's name first]}``.
    """
    folder = Path(folder)
    try:
        return _verify(folder, progress)
    except OSError as error:  # such as one that may not be entered
        where = f"{os.path.relpath(error.filename, folder)}: " if error.filename else ""
        problem = where.removeprefix(".: ") + (error.strerror or str(error))
        return {"files": 0, "bytes": 0, "hashes": False, "problems": [problem]}


def _verify(folder, progress):
    problems = []
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        return {"files": 0, "bytes": 0, "hashes": False, "problems": [what]}
    manifest = read_manifest(folder)
    sizes = [] if manifest is None else [entry["bytes"] for entry in manifest["files"].values()]
    try:
        listed = listing(folder).values()
    except DataError as error:
        line = str(error).removeprefix(f"{folder}: ")
        return {"files": len(sizes), "bytes": sum(sizes), "hashes": False, "problems": [line]}
    if manifest is not None:
        problems += verify_folder(folder, progress=progress)
    else:
        if (folder / MANIFEST).exists() or (folder / MANIFEST).is_symlink():
            problems.append(f"{MANIFEST}: is damaged, or not one of {TOOL}")
        sizes = [p.stat().st_size for p in listed if p.is_file() and p.name != MANIFEST]
        if os.path.isdir(folder / HIDDEN):
            problems.append(
                f"{HIDDEN}: a job is at work here, or was killed while it put files here"
            )
    understood = _check_contents(folder, problems)
    if not understood and manifest is None and not problems:
        problems.append(f"is neither a model, an adapter, nor written by {TOOL}")
    hashes = manifest is not None
    return {"files": len(sizes), "bytes": sum(sizes), "hashes": hashes, "problems": problems}


@readable()
def check_input(folder, progress=False, only=None):
    """Refuse a folder with a ``COMPLETE.json`` whose files are no longer what was written.

    Before anything is computed from them. The files that a stage may read are hashed, however large
    (half a second a gigabyte, one Xeon core; once a process while they stay as they are); of others
    the size is compared. Without a ``COMPLETE.json`` there is nothing to compare with.

    Args:
        folder: of a model, an adapter or norms.
        progress: as :func:`antidote_fast.progress.track` takes it.
        only: the one file of the folder that is read, where it is one.

    Raises:
        DataError: naming the file; an adapter with more than 1 GiB to read beside its weights.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        if (folder / MANIFEST).is_symlink() or (folder / MANIFEST).is_file():
            _refuse_damaged(folder)
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
            with open_below(folder, name) as file:
                found = os.fstat(file.fileno())
                if found.st_size != entry["bytes"]:
                    told = f"{found.st_size} bytes, not {entry['bytes']} as written"
                    raise DataError(f"{path}: {told}")
                if not (name == only if only else _is_read(name, is_adapter)):
                    continue
                if is_adapter and name != _ADAPTER_FILE:
                    beside += entry["bytes"]
                    if beside > _MAX_BESIDE:
                        raise DataError(f"{path}: with it more than 1 GiB lie beside the weights")
                digest = _digest(path, identity(found))
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
    return READ_BY_STAGES.fullmatch(name) is not None


@functools.lru_cache(maxsize=4096)
def _digest(path, identity):
    return sha256_file(path)


def _refuse_damaged(folder):
    """Refuse a ``COMPLETE.json`` of this tool that is damaged; another's may say what it likes."""
    path = folder / MANIFEST
    try:
        found = json.loads(read_file(path, MAX_MANIFEST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{folder}: its {MANIFEST} is damaged") from None
    if isinstance(found, dict) and found.get("tool") == TOOL:
        raise DataError(f"{folder}: its {MANIFEST} is damaged, or lists other than its own files")


def _check_contents(folder, problems):
    """Read what can be understood up to the headers; True where there was something."""
    from antidote_fast.adapter_config import check_adapter_config
    from antidote_fast.calibrate import ActivationNorms
    from antidote_fast.files import ADAPTER_CONFIG, open_checkpoint
    from antidote_fast.masks import load_masks

    def model():
        checkpoint = open_checkpoint(folder, trust_remote_code=True)  # reads, runs nothing
        if checkpoint.is_adapter:
            check_adapter_config(checkpoint.config, ADAPTER_CONFIG)

    checks = {
        "config.json": model,
        ADAPTER_CONFIG: model,
        "norms.safetensors": lambda: ActivationNorms.load(folder / "norms.safetensors"),
        "preserve-norms.safetensors": lambda: ActivationNorms.load(
            folder / "preserve-norms.safetensors"
        ),
        "masks.safetensors": lambda: load_masks(folder / "masks.safetensors"),
    }
    found = [name for name in checks if (folder / name).exists()]
    if {"config.json", ADAPTER_CONFIG} <= set(found):
        found.remove("config.json")
    for name in found:
        try:
            checks[name]()
        except AntidoteError as error:
            line = re.sub(r"^norms='(.*?)'", r"\1", str(error))
            line = line.replace(f"{folder}/", "").removeprefix(f"{folder}: ")
            file, _, what = line.partition(": ")
            known = next((i for i, p in enumerate(problems) if p.split(":")[0] == file), None)
            if known is None:
                problems.append(line)
            elif problems[known] == f"{file}: contents changed":
                problems[known] += f"; {what}"
    return bool(found)


def verify_command(argv):
    """``antidote-fast verify FOLDER [FOLDER ...] [--json]``."""
    if "-h" in argv or "--help" in argv:
        tell(_USAGE)
        return
    folders = [word for word in argv if not word.startswith("-")]
    for word in argv:
        if word.startswith("-") and word != "--json":
            raise UsageError(f"{word}: verify takes --json only")
    if not folders:
        raise UsageError("verify takes at least one folder")
    with command_line_progress(quiet="--json" in argv) as progress:
        found = {folder: verify(os.path.expanduser(folder), progress) for folder in folders}
    if "--json" in argv:
        tell(json.dumps(found, indent=2))
    else:
        for folder, result in found.items():
            for line in _lines(result):
                tell(f"{folder}: {line}")
    broken = [folder for folder, result in found.items() if result["problems"]]
    if broken:
        raise DataError(f"{len(broken)} of {len(found)} folders not whole, {broken[0]} first")


def _lines(result):
    if result["problems"]:
        return [printable(line) for line in result["problems"]]
    size = f"{result['files']} files, {result['bytes'] / 1e9:.3g} GB"
    if result["hashes"]:
        return [f"whole: {size}"]
    return [f"nothing missing or cut short: {size}; no {MANIFEST}, so {_NEVER}"]
