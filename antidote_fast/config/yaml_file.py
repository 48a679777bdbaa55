"""YAML files of flags: read with caps, one file on top of another."""

import os
import re
from pathlib import Path

from antidote_fast.errors import DataError, UsageError

_MAX_MESSAGE = 500
_MAX_YAML_BYTES = 256 << 10
_MAX_YAML_DEPTH = 32
_MAX_YAML_ALIASES = 10
_MAX_EXTENDS = 4


def read_yaml(path: str | os.PathLike, _depth: int = 0) -> dict:
    """The entries of an experiment's file over those of the files that it extends.

    Mappings are joined entry by entry, anything else is replaced. ``extends`` is seen from the file
    that names it.

    Raises:
        DataError: a file that is not there or cannot be read.
        UsageError: not YAML, not a mapping, or files that extend each other without end.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, as the parser's own does and YAML 1.1 does not."""

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    values = yaml.load(check_yaml(path), Loader=Loader)
    if not isinstance(values, dict):
        raise UsageError(f"--config: {path}: must be a mapping of flags")
    before = values.pop("extends", None)
    if before is None:
        return values
    if not isinstance(before, str) or _depth == _MAX_EXTENDS:
        raise UsageError(f"extends={before!r}: must be a file, {_MAX_EXTENDS} deep at most")
    before = Path(path).parent / os.path.expanduser(before)
    return _joined(read_yaml(before, _depth + 1), values)


def _joined(under, over):
    joined = dict(under)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(under.get(name), dict)
        joined[name] = _joined(under[name], value) if both else value
    return joined


def check_yaml(path: str | os.PathLike) -> str:
    """A file's text; refused is what makes the parser fall over: size, depth, aliases of aliases.

    An alias costs nothing to write; nested ones grow without bound as soon as somebody walks them.
    """
    import yaml

    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.exists(path) else "no such file"
        raise DataError(f"--config: {ascii(path)[1:-1]:.200}: {what}")
    if os.path.getsize(path) > _MAX_YAML_BYTES:
        raise DataError(f"--config: {path}: larger than {_MAX_YAML_BYTES >> 10} KiB")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--config: {path}: cannot be read: {error!s:.300}") from None
    depth = aliases = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > _MAX_YAML_DEPTH or aliases > _MAX_YAML_ALIASES:
                raise UsageError(
                    f"--config: {path}: nested deeper than {_MAX_YAML_DEPTH}, or more than "
                    f"{_MAX_YAML_ALIASES} aliases"
                )
    except yaml.YAMLError as error:
        raise UsageError(f"--config: {path}: not valid YAML: {on_one_line(error)}") from None
    return text


def on_one_line(message: object) -> str:
    """A message of a parser without its line breaks, cut to 500 characters."""
    return " ".join(str(message).split())[:_MAX_MESSAGE]
