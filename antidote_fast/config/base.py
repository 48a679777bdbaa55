"""What the configs of all stages share: flags, checks, and what of a field decides a result.

A field is declared once, where it is defined: :func:`contents`, :func:`aside`, :func:`number` or
:func:`path`; one that is no contents or aside decides a stage's result by its value. Whoever asks
whether a folder was made as it would be made now goes by that
(:mod:`antidote_fast.files.provenance`).
"""

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args

from antidote_fast.errors import UsageError
from antidote_fast.selection import check_seed

DType = Literal["auto", "bfloat16", "float16", "float32"]
Template = Literal["alpaca", "chat"]
TEMPLATES: tuple[str, ...] = get_args(Template)
_DECIDES, _IS_PATH, _RANGE = "decides", "is_path", "range"


# {what is accepted: whether a number is that}.
_RANGES: dict[str, Callable[[float], bool]] = {
    "greater than 0": lambda value: value > 0,
    "at least 0": lambda value: 0 <= value < math.inf,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
}


def contents(default: Any = MISSING) -> Any:
    """A path or hub name: what lies there decides a stage's result, wherever it lies."""
    return field(default=default, metadata={_DECIDES: "contents", _IS_PATH: True})


def aside(default: Any = MISSING, accepted: str | None = None, *, is_path: bool = False) -> Any:
    """A field that decides no result: where the output goes, how much memory the work may take."""
    metadata = {_DECIDES: "nothing", _IS_PATH: is_path, _RANGE: accepted}
    return field(default=default, metadata=metadata)


def number(default: float | None, accepted: str = "greater than 0") -> Any:
    """A number in the range that ``accepted``, a key of ``_RANGES``, names; or None."""
    return field(default=default, metadata={_RANGE: accepted})


def path(default: Any = MISSING) -> Any:
    """A path or hub name that decides a result by its name, as any other value does."""
    return field(default=default, metadata={_IS_PATH: True})


def holds_path(declared: Field) -> bool:
    """Whether a dataclass field is a path, or may be one."""
    return declared.metadata.get(_IS_PATH, False)


def fields_by(config: Any, decides: str) -> list[Field]:
    """The fields of a config, or of its class, of which this decides a stage's result.

    It is ``"value"``, as of any field without a declaration, ``"contents"`` or ``"nothing"``.
    """
    return [each for each in fields(config) if each.metadata.get(_DECIDES, "value") == decides]


# {a field's name of earlier: (its name, what a notice of it adds)}.
RENAMED = {
    "base_model": ("aligned_model", " (the aligned model; --base is the model of an adapter)"),
    "judge": ("judges", ""),
}


def with_new_names(
    values: Any, notify: Callable[[str], None] = warnings.warn, current: Collection[str] = ()
) -> Any:
    """Values as they are read from YAML or given by a caller, with the names that fields have now.

    They are by field, or by section and field; names may be ``section.field``. ``notify`` is called
    with a line on each name of earlier. What is in ``current``, the fields of the config that is
    made, is no such name there.

    Raises:
        UsageError: a field is there by both of its names.
    """
    if isinstance(values, list):
        return [with_new_names(value, notify) for value in values]
    if not isinstance(values, dict):
        return values
    renamed = {}
    for name, value in values.items():
        section, dot, field_name = str(name).rpartition(".")
        if field_name in RENAMED and name not in current:
            new, note = RENAMED[field_name]
            new = f"{section}{dot}{new}"
            if new in values:
                raise UsageError(f"{name}: must be left out with {new}, which is its name now")
            notify(f"{name} is taken as {new}{note}")
            name = new
        renamed[name] = with_new_names(value, notify)
    return renamed


def check(condition: object, name: str, value: object, accepted: str) -> None:
    """Refuse a value in one line that names the argument and what is accepted."""
    if not condition:
        raise UsageError(f"{name}={value!r}: must be {accepted}")


def check_data_set(config: Any, name: str, when: str) -> None:
    """Refuse a field that is None, where ``when`` says that it names data."""
    if getattr(config, name) is None:
        raise UsageError(f"{name}=None: must be a file or hub name {when}")


def check_left_out(config: Any, names: Iterable[str], when: str) -> None:
    """Refuse those of these fields, where the config has them, that are not their defaults."""
    defaults = {each.name: each.default for each in fields(config)}
    for name in filter(defaults.__contains__, names):
        value = getattr(config, name)
        check(value == defaults[name], name, value, f"left out {when}")


def set_field(config: Any, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass that is still being made, as dataclasses do themselves."""
    object.__setattr__(config, name, value)


def one_of(choices: Callable[[], Mapping[str, Any]], default: str) -> Any:
    """A field that takes a name in the table that ``choices`` gives, which ``--help`` then lists.

    Each entry of the table has a ``formula``, which says what the name stands for.
    """
    return field(default=default, metadata={"choices": choices})


def expand_paths(config: Any) -> None:
    """Put the home folder in place of ``~`` in every path, once for all stages.

    Raises:
        UsageError: ``~`` and a name that is nobody's, which would be taken for a folder here.
    """
    for each in fields(config):
        name, value = each.name, getattr(config, each.name)
        if not holds_path(each) or value is None:
            continue
        whole = [_expanded(name, one) for one in each_of(value)]
        if whole != each_of(value):
            set_field(config, name, whole if isinstance(value, list) else whole[0])


def _expanded(name, value):
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    whole = os.path.expanduser(value)
    check(not whole.startswith("~"), name, value, "a path, or ./~... where it is one here")
    return whole


def each_of(value: Any) -> list:
    """The values of a field that takes one or several: a list's, one alone, none of None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage takes.

    Args:
        model_name_or_path: the base model: a local folder or a hub name.
        output_dir: the folder to write; must not exist or be empty unless overwrite is given.
        overwrite: replace output_dir, if this tool wrote it.
        dtype: dtype the model is loaded in; auto takes the checkpoint's.
        device: torch device; auto takes cuda where there is one.
        seed: seed of every random choice.
        max_seq_length: tokens kept of one prompt with its response.
        template: prompt template, the same in training and evaluation.
        batch_size: sequences a forward pass.
        trust_remote_code: allow code that a checkpoint ships to run.
    """

    model_name_or_path: str = contents()
    output_dir: str = aside(is_path=True)
    overwrite: bool = aside(False)
    dtype: DType = "auto"
    device: str = "auto"
    seed: int = 0
    max_seq_length: int = number(512)
    template: Template = "alpaca"
    batch_size: int = number(8)
    trust_remote_code: bool = False

    def picked(self, *names: str) -> dict[str, Any]:
        """{name: value} of some fields."""
        return {name: getattr(self, name) for name in names}

    @property
    def load_options(self) -> dict[str, Any]:
        """How :func:`antidote_fast.models.loading.load_model` loads its models."""
        return self.picked("dtype", "device", "trust_remote_code")

    def __post_init__(self):
        expand_paths(self)
        for each in fields(self):
            value, accepted = getattr(self, each.name), each.metadata.get(_RANGE)
            if accepted is not None and value is not None:
                check(_RANGES[accepted](value), each.name, value, accepted)
            if "choices" in each.metadata and not isinstance(value, list):
                names = list(each.metadata["choices"]())
                check(value in names, each.name, value, f"one of {', '.join(names)}")
        set_field(self, "seed", check_seed(self.seed))
        # torch runs nothing there, and what it would put out is noise.
        no_meta = self.device.partition(":")[0] != "meta"
        check(no_meta, "device", self.device, "one that computes, such as cpu or cuda")
