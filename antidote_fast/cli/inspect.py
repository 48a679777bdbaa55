"""The two commands that write nothing, ``env`` and ``inspect``, and the line a stage ends with."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from antidote_fast.errors import DataError, UsageError, printable
from antidote_fast.system.progress import tell

_ENVIRONMENT = ("ANTIDOTE_BACKEND", "ANTIDOTE_CPU_ISA")


def environment() -> dict:
    """Versions, threads, and each backend with the reason where it is not available."""
    import torch

    from antidote_fast import backends
    from antidote_fast.backends import cuda
    from antidote_fast.files.provenance import versions

    cpu, missing = backends.load("cpu")
    named = os.environ.get("CXX", "").split()[:1]
    compiler = next(filter(None, map(shutil.which, [*named, "c++", "g++", "clang++"])), None)
    return {
        "versions": {name: found or "not installed" for name, found in versions().items()},
        "cpu extension": missing or f"built; {_kernels(cpu)}",
        "cuda extension": cuda.not_built() or "built",
        "C++ compiler": compiler
        or "none found; install one and pip install again for the cpu backend",
        "CUDA compiler": shutil.which(os.environ.get("CUDACXX", "nvcc"))
        or "none found; with nvcc of CUDA 12.1 or later the cuda backend is installed too",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backends": {name: why or "available" for name, why in backends.available().items()},
        "environment": {name: os.environ.get(name, "not set") for name in _ENVIRONMENT},
    }


def _kernels(cpu):
    try:
        return f"{cpu.isa()} kernels in use"
    except ValueError as error:  # of the environment variable
        return str(error)


def paths_of(argv: Sequence[str], command: str, usage: str) -> list[str] | None:
    """The words of a command that takes ``--json`` and paths alone; None where it showed its help.

    Raises:
        UsageError: another flag.
    """
    if "-h" in argv or "--help" in argv:
        tell(f"usage: antidote-fast {command} {usage}")
        return None
    for word in argv:
        if word.startswith("-") and word != "--json":
            raise UsageError(f"{word}: {command} takes --json only")
    return [word for word in argv if not word.startswith("-")]


def env_command(argv: Sequence[str]) -> None:
    """``antidote-fast env [--json]``."""
    words = paths_of(argv, "env", "[--json]")
    if words:
        raise UsageError(f"{words[0]}: env takes --json only")
    if words is not None:
        _show(environment(), "--json" in argv)


def inspect_command(argv: Sequence[str]) -> None:
    """``antidote-fast inspect PATH [--json]``."""
    paths = paths_of(argv, "inspect", "PATH [--json]")
    if paths is None:
        return
    if len(paths) != 1:
        raise UsageError(f"inspect takes one file or folder, {len(paths)} were given")
    description, problems = inspect(os.path.expanduser(paths[0]))
    _show(description, "--json" in argv)
    if problems:
        raise DataError(f"{paths[0]}: not whole: {'; '.join(problems)}")


def inspect(path: str | Path) -> tuple[dict, list[str]]:
    """What is at ``path``, and what is wrong with it.

    Args:
        path: a folder that this tool wrote, a model or adapter folder, or a file of norms or masks.

    Returns:
        (a description that JSON can hold, one line for each file that is missing or changed).

    Raises:
        DataError: nothing is there, or it is none of these.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_folder(path)
    if path.is_file():
        return _inspect_file(path), []
    raise DataError(f"{path}: no such file or folder")


def _inspect_folder(folder):
    from antidote_fast.files.checkpoint import ADAPTER_CONFIG, open_checkpoint
    from antidote_fast.files.manifest import read_manifest, verify_folder
    from antidote_fast.files.provenance import read_report

    description, problems = {"folder": str(folder)}, []
    manifest = read_manifest(folder)
    if manifest is not None:
        problems = verify_folder(folder)
        description["written by"] = f"antidote-fast, {manifest.get('created')}"
        state = "not whole" if problems else "all hashes as recorded"
        description["files"] = f"{len(manifest['files'])}, {state}"
    report = read_report(folder)
    if report is not None:
        description |= {name: report.get(name) for name in ("stage", "config")}
    if (folder / ADAPTER_CONFIG).exists() or (folder / "config.json").exists():
        checkpoint = open_checkpoint(folder, trust_remote_code=True)  # reads headers, runs nothing
        description["kind"] = "adapter" if checkpoint.is_adapter else "model"
        entries = checkpoint.tensors
        description["weights"] = sum(entry.num_elements for entry in entries.values())
        description["tensors"] = {
            key: f"{list(entry.shape)} {str(entry.dtype).removeprefix('torch.')}"
            for key, entry in entries.items()
        }
    norms = ("norms.safetensors", "norms-response.safetensors", "preserve-norms.safetensors")
    for name in (*norms, "masks.safetensors"):
        if (folder / name).is_file():
            description[name] = _inspect_file(folder / name)
    if len(description) == 1:
        raise DataError(f"{folder}: neither a model, an adapter, nor written by this tool")
    return description, problems


def _inspect_file(path):
    from antidote_fast.files.checkpoint import read_metadata
    from antidote_fast.masks import FORMAT, load_masks

    metadata = read_metadata(path)
    if metadata.get("format") == FORMAT:
        masks, metadata = load_masks(path)
        removed = {name: mask.count() for name, mask in masks.items()}
        total = sum(math.prod(mask.shape) for mask in masks.values())
        counts = {name: f"{list(m.shape)}, {removed[name]} removed" for name, m in masks.items()}
        sums = {"removed": f"{sum(removed.values())} of {total}"}
        return {"file": str(path), "kind": "masks", **metadata, **sums, "masks": counts}
    if "norms" in metadata.get("format", ""):
        from antidote_fast.norms.activation_norms import ActivationNorms

        channels = {
            key: f"{sums.numel()} channels, {int((sums == 0).sum())} zero"
            for key, sums in ActivationNorms.load(path).sq_sum.items()
        }
        return {"file": str(path), "kind": "norms", **metadata, "norms": channels}
    raise DataError(f"{path}: neither norms nor masks of this tool")


def _show(description, as_json):
    if as_json:
        tell(json.dumps(description, indent=2, default=str))
        return
    for line in _lines(description):
        tell(line)


def _lines(description, indent=""):
    width = max((len(name) for name, value in description.items() if not _nests(value)), default=0)
    for name, value in description.items():
        name = printable(name)
        if _nests(value):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name:<{min(width, 60)}}  {'-' if value is None else printable(value)}"


def _nests(value):
    return isinstance(value, dict) and value
