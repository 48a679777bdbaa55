"""``antidote-fast verify``: is a folder whole, and if not, which file is to blame?

A folder that this tool wrote is compared with the hashes of its ``COMPLETE.json``. Any model or
adapter folder is also read as far as its headers: every shard there, none cut short, every tensor
of the index in its place. Nothing in a folder is run.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from antidote_fast.cli.inspect import paths_of
from antidote_fast.errors import AntidoteError, DataError, UsageError, printable
from antidote_fast.files.manifest import MANIFEST, TOOL, listing, read_manifest, verify_folder
from antidote_fast.files.places import HIDDEN
from antidote_fast.system.progress import Progress, command_line_progress, tell

_NEVER = "a weight that changed cannot be seen"


def verify(folder: str | Path, progress: Progress = False) -> dict:
    """What is wrong with a folder: one that this tool wrote, or of a model or adapter.

    Returns:
        ``{"files": count, "bytes": size, "hashes": whether contents were compared, "problems":
        [one line each, a file's name first]}``.
    """
    folder = Path(folder)
    sizes, hashes = [], False
    try:
        sizes, hashes, problems = _verify(folder, progress)
    except OSError as error:  # such as one that may not be entered
        where = f"{os.path.relpath(error.filename, folder)}: " if error.filename else ""
        problems = [where.removeprefix(".: ") + (error.strerror or str(error))]
    return {"files": len(sizes), "bytes": sum(sizes), "hashes": hashes, "problems": problems}


def _verify(folder, progress):
    """(sizes of files, whether contents were compared, problems)."""
    if not folder.is_dir():
        return [], False, ["is not a folder" if folder.exists() else "no such folder"]
    problems, manifest = [], read_manifest(folder)
    sizes = [] if manifest is None else [entry["bytes"] for entry in manifest["files"].values()]
    try:
        listed = listing(folder).values()
    except DataError as error:
        return sizes, False, [str(error).removeprefix(f"{folder}: ")]
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
    return sizes, manifest is not None, problems


def _check_contents(folder, problems):
    """Read what can be understood up to the headers; True where there was something."""
    from antidote_fast.files.checkpoint import ADAPTER_CONFIG, open_checkpoint
    from antidote_fast.masks import load_masks
    from antidote_fast.models.adapter_config import check_adapter_config
    from antidote_fast.norms.activation_norms import ActivationNorms

    def model(_):
        checkpoint = open_checkpoint(folder, trust_remote_code=True)  # reads, runs nothing
        if checkpoint.is_adapter:
            check_adapter_config(checkpoint.config, ADAPTER_CONFIG)

    norms = ("norms.safetensors", "preserve-norms.safetensors")
    checks = {"config.json": model, ADAPTER_CONFIG: model}
    checks |= dict.fromkeys(norms, ActivationNorms.load) | {"masks.safetensors": load_masks}
    present = [name for name in checks if (folder / name).exists()]
    if {"config.json", ADAPTER_CONFIG} <= set(present):
        present.remove("config.json")
    for name in present:
        try:
            checks[name](folder / name)
        except AntidoteError as error:
            line = re.sub(r"^norms='(.*?)'", r"\1", str(error))
            line = line.replace(f"{folder}/", "").removeprefix(f"{folder}: ")
            file, _, what = line.partition(": ")
            earlier = next((i for i, p in enumerate(problems) if p.split(":")[0] == file), None)
            if earlier is None:
                problems.append(line)
            elif problems[earlier] == f"{file}: contents changed":
                problems[earlier] += f"; {what}"
    return bool(present)


def verify_command(argv: Sequence[str]) -> None:
    """``antidote-fast verify FOLDER [FOLDER ...] [--json]``."""
    folders = paths_of(argv, "verify", "FOLDER [FOLDER ...] [--json]")
    if folders is None:
        return
    if not folders:
        raise UsageError("verify takes at least one folder")
    with command_line_progress(quiet="--json" in argv) as progress:
        results = {folder: verify(os.path.expanduser(folder), progress) for folder in folders}
    if "--json" in argv:
        tell(json.dumps(results, indent=2))
    else:
        for folder, result in results.items():
            for line in _lines(result):
                tell(f"{folder}: {line}")
    broken = [folder for folder, result in results.items() if result["problems"]]
    if broken:
        raise DataError(f"{len(broken)} of {len(results)} folders not whole, {broken[0]} first")


def _lines(result):
    if result["problems"]:
        return [printable(line) for line in result["problems"]]
    size = f"{result['files']} files, {result['bytes'] / 1e9:.3g} GB"
    if result["hashes"]:
        return [f"whole: {size}"]
    return [f"nothing missing or cut short: {size}; no {MANIFEST}, so {_NEVER}"]
