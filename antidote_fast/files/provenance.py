"""What a folder was made from, and whether it would be made so now.

Two records tell it. Whoever has opened everything goes by :func:`run_inputs`, of which
``COMPLETE.json`` keeps a digest and an unfinished run all. Whoever has opened nothing goes by
``report.json``, which has the config and the hashes of the files (:func:`difference`). What of a
config counts its fields declare (:mod:`antidote_fast.config.base`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antidote_fast import __version__
from antidote_fast.config.base import RENAMED, StageConfig, each_of, fields_by
from antidote_fast.errors import DataError
from antidote_fast.files.commit import digest_of, first_difference, new_file
from antidote_fast.files.manifest import read_manifest, sha256_file, sha256_of, verify_folder
from antidote_fast.files.safe_open import READ_BY_STAGES, Folder, read_object
from antidote_fast.system.memory import peak_device_memory_bytes, peak_memory_bytes

if TYPE_CHECKING:
    from antidote_fast.files.checkpoint import Checkpoint

REPORT = "report.json"
SCHEMA_VERSION = 1
# A base model's weights are identified by the fingerprint in the norms; hashing gigabytes of them
# for each run would cost more than the pruning.
_MAX_HASHED_BYTES = 256 << 20
_MAX_HASHED_TOGETHER = 4 << 30
_MAX_REPORT_BYTES = 256 << 20
_NOT_HASHED = "not hashed"
_OF_A_RUN = ("antidote-fast", "torch", "transformers", "peft")
_LIBRARIES = (*_OF_A_RUN[1:], "numpy", "safetensors", "tokenizers", "datasets", "accelerate")


def run_inputs(
    config: StageConfig,
    base: Checkpoint,
    adapter: Checkpoint | None = None,
    *,
    records: Mapping[str, Iterable[Any]],
    norms: Mapping[str, Any] | None = None,
    aligned: Checkpoint | None = None,
) -> dict:
    """Everything that decides a stage's result, of what is opened: so that a run can go on.

    Args:
        config: a stage's.
        base: checkpoint of the model: its fingerprint and the size and date of its files; hashing
            all of it would cost more than the pruning.
        adapter: checkpoint of the adapter, or None; hashed.
        records: {field of the config: its records}, of data that a model sees; hashed.
        norms: {field of the config: :class:`antidote_fast.ActivationNorms`}, where there are any.
        aligned: checkpoint of the model that removed weights fall back to, told as ``base`` is.
    """
    inputs = {
        "settings": settings_of(config),
        "model": _model(base),
        "versions": {name: versions()[name] for name in _OF_A_RUN},
    }
    if adapter is not None:
        weights = {Path(path).name: digest for path, digest in adapter.digests().items()}
        inputs["adapter"] = {"config": adapter.config, **weights}
    for name, some in records.items():
        data = name.replace("dataset", "data").replace("_", " ")
        inputs[data] = digest_of([dataclasses.astuple(record) for record in some])
    for name, each in (norms or {}).items():
        inputs[name.replace("_", " ")] = _sums(each)
    if aligned is not None:
        inputs["aligned model"] = _model(aligned)
    # As JSON gives it back: lists for tuples, strings for what it does not know.
    return json.loads(json.dumps(inputs, default=str))


def _model(checkpoint):
    files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in checkpoint.weight_files}
    return {"fingerprint": checkpoint.fingerprint(), "config": checkpoint.config, **files}


def _sums(norms):
    sums = hashlib.sha256()
    for key in norms.keys:
        for kind in (norms.sq_sum, norms.norm_sum or {}):
            if key in kind:
                sums.update(key.encode() + kind[key].numpy().tobytes())
    return [norms.num_tokens, norms.num_sequences, sums.hexdigest()]


@functools.cache  # 3 ms, and a fleet writes thousands of reports
def versions() -> dict:
    """The versions that decide a result: this package, Python, the libraries, the platform."""
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    installed["antidote-fast"] = __version__  # a checkout need not be installed
    for name in _LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def hash_inputs(
    paths: Iterable[str | Path | None],
    read: Mapping[str, str] | None = None,
    *,
    listed: bool = True,
) -> dict:
    """What the files and folders were that a stage read: ``{path: sha256}``.

    A folder that this tool wrote counts with the hashes of its ``COMPLETE.json``, any other with
    its files up to 256 MB each and 4 GiB together; what is over that is told by its size. Hub names
    and None are skipped.

    Args:
        paths: which.
        read: {path: sha256} of files that were hashed as they were read; they replace the hashes
            of what lies there now.
        listed: take the word of a ``COMPLETE.json``; else the files that it lists are hashed.

    Raises:
        DataError, OSError: a file that is to be hashed cannot be read.
    """
    hashes = {}
    for path in map(Path, filter(None, paths)):
        if path.is_file():
            size = path.stat().st_size
            small = size <= _MAX_HASHED_TOGETHER  # nothing longer is read
            hashes[str(path)] = sha256_file(path) if small else f"{size} bytes, {_NOT_HASHED}"
        elif path.is_dir():  # else a pipe, which no stage reads
            manifest = read_manifest(path)
            if manifest is None:
                hashes |= _hash_folder(path)
                continue
            for name, entry in sorted(manifest["files"].items()):
                hashes[f"{path}/{name}"] = entry["sha256"] if listed else sha256_file(path / name)
    for name, digest in (read or {}).items():
        if name in hashes and not hashes[name].endswith(_NOT_HASHED):
            hashes[name] = digest
    return hashes


def _hash_folder(path):
    hashes, folder, left = {}, Folder(path), _MAX_HASHED_TOGETHER
    for name in folder.names():
        # Not a folder, a pipe, or a link to somewhere else: no stage reads it.
        with contextlib.suppress(DataError, OSError), folder.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            small = size <= min(_MAX_HASHED_BYTES, left)
            left -= size if small else 0
            told = sha256_of(file) if small else f"{size} bytes, {_NOT_HASHED}"
            hashes[str(path / name)] = told
    return hashes


def settings_of(config: StageConfig) -> dict:
    """{field: value} of what decides a stage's result by its value, as JSON gives it back."""
    values = {each.name: getattr(config, each.name) for each in fields_by(config, "value")}
    return json.loads(json.dumps(values))


def input_files(config: StageConfig) -> list[str]:
    """The local files and folders that a stage's config names, data sets without their role."""
    names = [n for f in fields_by(config, "contents") for n in each_of(getattr(config, f.name))]
    paths = [(name, name.rpartition(":")[0]) for name in names]
    return [path for pair in paths if (path := next(filter(os.path.exists, pair), None))]


def is_done(folder: str | Path, config: StageConfig) -> bool:
    """Whether ``folder`` is whole and came from these settings and files, all hashed again."""
    try:
        return difference(folder, config) is None
    except (DataError, OSError):
        return False


def difference(
    folder: str | Path,
    config: StageConfig,
    hashes: Mapping[str, str] | None = None,
    base_fingerprint: str | None = None,
) -> str | None:
    """What is otherwise in a folder than if a stage made it now; None where nothing is.

    Args:
        folder: the stage's output.
        config: the stage's frozen dataclass.
        hashes: as :func:`hash_inputs` gives them for :func:`input_files` now. Without them the
            files are hashed, and what was written is hashed too, not only compared by size.
        base_fingerprint: of the base model, which then counts in place of its files.

    Raises:
        DataError, OSError: a file cannot be read.
    """
    folder, stage = Path(folder), type(config).__name__.removesuffix("Config").lower()
    manifest, report = read_manifest(folder), read_report(folder) or {}
    if manifest is None:
        return "is not whole"
    for name, entry in sorted(manifest["files"].items()):
        try:
            size = os.stat(folder / name).st_size
        except OSError:
            return f"is not whole: {name} is missing"
        if size != entry["bytes"]:
            return f"is not whole: {name} has {size} bytes, not {entry['bytes']}"
    before, recorded = report.get("config"), report.get("inputs")
    if report.get("stage") != stage or not all(isinstance(d, dict) for d in (before, recorded)):
        return f"was not written by {stage}"
    known = {each.name for each in fields(config)}
    before = {
        name if name in known else RENAMED.get(name, (name,))[0]: value
        for name, value in before.items()
    }
    other = _other_setting(before, config)
    if other is not None:
        return other
    if hashes is None:
        problems = verify_folder(folder)
        if problems:
            return f"is not whole: {problems[0]}"
        hashes = hash_inputs(input_files(config), listed=False)
    if base_fingerprint and manifest.get("base_fingerprint") != base_fingerprint:
        return "was made for another base model"
    for name in (each.name for each in fields_by(config, "contents")):
        if base_fingerprint and name == "model_name_or_path":
            continue
        value = getattr(config, name)
        then, now = _contents_of(before.get(name), recorded), _contents_of(value, hashes)
        if (changed := first_difference(then, now)) is not None:
            return f"was made from another {changed!r}"
        if then != now:
            return f"was made with another {name} than {value!r:.80}"
    return None


def _other_setting(before, config):
    """The first setting of a recorded config that is another one now, in words; None without."""
    settings = settings_of(config)
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(config)}
    unknown = sorted(name for name in before.keys() - defaults.keys() if before[name])
    for name in (*settings, *unknown):
        then, now = before.get(name, defaults.get(name)), settings.get(name)
        if then != now:
            return f"was made with {name}={then!r:.60}, not {now!r:.60}"
    return None


def _contents_of(value, hashes):
    """What lay where a field says: {file in a folder: hash}, a file's (hash, role), or the name.

    Of several, a list of these.
    """
    if isinstance(value, list):
        return [_contents_of(one, hashes) for one in value]
    spellings = [(value, ""), value.rpartition(":")[::2]] if isinstance(value, str) else []
    for name, role in spellings:
        if name and str(Path(name)) in hashes:
            return hashes[str(Path(name))], role
        inside = [path for path in hashes if name and Path(path).is_relative_to(name)]
        if inside:
            files = {str(Path(path).relative_to(name)): hashes[path] for path in inside}
            return {file: each for file, each in files.items() if READ_BY_STAGES.fullmatch(file)}
    return value


def write_report(
    folder: str | Path,
    stage: str,
    config: Any,
    results: Mapping[str, Any],
    inputs: Iterable[str | Path | None] | dict[str, str] = (),
    *,
    grows: bool = False,
) -> dict:
    """Write ``report.json`` into ``folder`` and return its contents.

    Args:
        folder: where report.json goes.
        stage: the stage's name, such as ``"align"``.
        config: the stage's frozen dataclass.
        results: the stage's own entries, such as ``{"seconds": 1.5, "loss": [...]}``.
        inputs: paths of the files and folders that the stage read; their hashes are recorded. Or
            what :func:`hash_inputs` gave for them before.
        grows: the folder grows over several calls, so its report is replaced whole or not at all;
            else it is a staged one.
    """
    report = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "inputs": dict(inputs) if isinstance(inputs, dict) else hash_inputs(inputs),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": peak_device_memory_bytes(),
        **results,
    }
    path = Path(folder) / REPORT
    with new_file(path) if grows else contextlib.nullcontext(path) as file:
        file.write_text(_as_text(report), encoding="utf-8")
    return report


def _as_text(report):
    """JSON, a list's entry a line: quicker than ``indent`` (0.6 ms, not 5, for 180 layers)."""
    entries = []
    for name, value in report.items():
        if isinstance(value, list) and value:
            lines = ",\n    ".join(_dumps(item) for item in value)
            text = f"[\n    {lines}\n  ]"
        else:
            text = _dumps(value, indent=2).replace("\n", "\n  ")
        entries.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _dumps(value, **options):
    return json.dumps(value, allow_nan=False, default=_plain, **options)


def read_report(folder: str | Path) -> dict | None:
    """The ``report.json`` of a folder, or None where there is none of a version we know.

    A link out of the folder is not followed, and nothing over 256 MiB is read.
    """
    report = read_object(Path(folder) / REPORT, _MAX_REPORT_BYTES)
    return report if report and report.get("schema_version") == SCHEMA_VERSION else None


def _plain(value):
    """Paths as strings and tensor or numpy scalars as numbers; anything else is a mistake."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"report.json cannot hold a {type(value).__name__}")
