"""The job list of a fleet: one JSON object a line becomes one job, checked before any work."""

import dataclasses
import json
import os
import re
import types
import typing
from pathlib import Path

from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.data.load import local_file
from antidote_fast.errors import AntidoteError, DataError

OVERRIDES = (
    *("dataset", "preserve_dataset", "preserve_ratio", "num_calibration_samples"),
    *("max_seq_length", "template", "response_only", "aggregation", "targets", "ignore"),
    *("ratio", "scope", "score", "seed"),
)
"""Fields of the fleet's config that a job may have otherwise."""
_MAX_BYTES = 256 << 20
_MAX_JOBS = 1_000_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# A name that the fleet itself gives to something in output_dir.
_OURS = re.compile(r"failed|summary.*\.json", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Job:
    """One adapter to prune.

    Args:
        name: its folder in output_dir.
        line: its line in the job list, from 1.
        config: what ``prune`` would be given for it.
    """

    name: str
    line: int
    config: PruneConfig

    @property
    def about(self) -> dict:
        """What an outcome says of the job itself."""
        return {"name": self.name, "adapter": self.config.adapter, "line": self.line}


def read_jobs(config) -> list[Job]:
    """The jobs of ``config.manifest``, all of its lines checked.

    Raises:
        DataError: no such file, too large, no job in it, or a line that is refused: not a JSON
            object, an unknown or missing key, a value of a wrong type or out of range, a name that
            is taken or no plain file name. The message has the line's number.
    """
    path = Path(config.manifest)
    folder = path.absolute().parent
    of_prune = {each.name for each in dataclasses.fields(PruneConfig)} - {"output_dir"}
    shared = {name: value for name, value in vars(config).items() if name in of_prune}
    taken, jobs = {}, []
    for number, text in _lines(path):
        where = f"{path}:{number}"
        values = _object(text, where)
        adapter = _text(values.pop("adapter", None), "adapter", where)
        adapter = str(folder / os.path.expanduser(adapter))
        name = values.pop("name", None)
        name = Path(adapter).name if name is None else _text(name, "name", where)
        if not _NAME.fullmatch(name) or _OURS.fullmatch(name):
            raise DataError(
                f"{where}: name={name!r:.80}: must be a plain file name of letters, digits, '.', "
                "'_' and '-', at most 200 of them, neither failed nor summary.json; give a name"
            )
        first = taken.setdefault(name.casefold(), number)
        if first != number:
            raise DataError(f"{where}: name={name!r}: line {first} has it already; give another")
        for field, value in values.items():
            _check_override(field, value, where)
        for data in ("dataset", "preserve_dataset"):
            if values.get(data) is not None:
                values[data] = _dataset(folder, values[data])
        out = str(Path(config.output_dir) / name)
        try:
            job = PruneConfig(**(shared | values), adapter=adapter, output_dir=out)
        except AntidoteError as error:
            raise DataError(f"{where}: {error}") from None
        jobs.append(Job(name, number, job))
        if len(jobs) > _MAX_JOBS:
            raise DataError(f"{where}: more than {_MAX_JOBS} jobs; use several manifests")
    if not jobs:
        raise DataError(f"manifest={str(path)!r}: holds no jobs")
    return jobs


def _lines(path):
    try:
        if not path.is_file():
            raise DataError(f"manifest={str(path)!r}: no such file")
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"manifest={str(path)!r}: larger than {_MAX_BYTES >> 20} MiB")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"manifest={str(path)!r}: is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"manifest={str(path)!r}: {error.strerror}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _object(text, where):
    def once(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        why = str(error).splitlines()[0]
        raise DataError(f"{where}: is not valid JSON: {why:.100}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a JSON object")
    return values


def _text(value, field, where):
    if not isinstance(value, str) or not value or "\0" in value:
        shown = "missing" if value is None else f"{field}={value!r:.60}"
        raise DataError(f"{where}: {shown}: {field} must be a text that is not empty")
    return value


def _check_override(field, value, where):
    if field not in OVERRIDES:
        raise DataError(
            f"{where}: {field!r:.60}: no such key; known are adapter, name, {', '.join(OVERRIDES)}"
        )
    declared = FleetConfig.__dataclass_fields__[field]
    kind, choices = declared.type, declared.metadata.get("choices")
    accepted = [
        _accepted(part) for part in (kind.__args__ if isinstance(kind, types.UnionType) else [kind])
    ]
    if not any(fits(value) for _, fits in accepted):
        words = " or ".join(text for text, _ in accepted)
        raise DataError(f"{where}: {field}={value!r:.60}: must be {words}")
    if choices is not None and value not in choices():
        raise DataError(f"{where}: {field}={value!r:.60}: must be one of {', '.join(choices())}")


def _accepted(kind):
    """(what a field of this type takes, in words; whether a JSON value is that)."""
    if typing.get_origin(kind) is typing.Literal:
        names = typing.get_args(kind)
        return f"one of {', '.join(names)}", lambda value: value in names
    if kind == list[str]:
        return (
            "a list of texts",
            lambda value: isinstance(value, list) and all(type(item) is str for item in value),
        )
    names = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
    kinds = (int, float) if kind is float else (kind,)
    return names.get(kind, "null"), lambda value: type(value) in kinds


def _dataset(folder, name):
    """A file beside the job list where there is one, else as it stands: a hub name."""
    if not name:
        return name
    beside = str(folder / os.path.expanduser(name))
    file = local_file(beside)
    return beside if file is not None and Path(file).exists() else name
