"""A stage's dataclass as flags, as YAML and as help; mistakes become one line in our own words."""

import dataclasses
import difflib
import functools
import json
import os
import re
import typing
from collections.abc import Sequence

from antidote_fast.config.base import RENAMED, with_new_names
from antidote_fast.config.experiment import SECTIONS, ExperimentConfig, RunConfig
from antidote_fast.config.yaml_file import check_yaml, on_one_line, read_yaml
from antidote_fast.errors import AntidoteError, DataError, UsageError

ALIASES = {
    "--base": ("--model_name_or_path", None),  # no notice: a name of our own
    "--nsamples": ("--num_calibration_samples", ""),
    "--dense_ratio": ("--ratio", " (the fraction removed, as in the official code)"),
    **{f"--{name}": (f"--{new}", note) for name, (new, note) in RENAMED.items()},
}
# Entries of an experiment that the parser, which reads text as YAML wherever anything may stand,
# would take a title such as "T1: poison" for a mapping in.
_STRUCTURED = ("grid", "levels", "tune", "tables")
Config = typing.TypeVar("Config")


def from_words(
    config_class: type[Config], words: list[str], command: str
) -> tuple[Config, list[str]]:
    """The dataclass from a command's flags; ``--config file.yaml`` among them, flags override it.

    Returns:
        (the dataclass, notices about aliases).

    Raises:
        UsageError: an unknown flag, a value of the wrong type or out of range.
        DataError: a config file that cannot be read.
    """
    if config_class is ExperimentConfig and words and not words[0].startswith("-"):
        words = [f"--config={words[0]}", *words[1:]]
    words, notices = spelled_out(words, config_class)
    structured = {}
    for i, word in enumerate(words):
        flag, equals, path = word.partition("=")
        if flag == "--config":
            path = os.path.expanduser(path or next(iter(words[i + 1 :]), ""))
            text = check_yaml(path)
            words[i : i + (1 if equals else 2)] = [f"--config={path}"]
            renamed = any(name in text for name in RENAMED)
            if config_class is ExperimentConfig or renamed:
                # The parser takes the contents as well as a name.
                values = with_new_names(read_yaml(path), notices.append, _kinds(config_class))
                words[i] = f"--config={json.dumps(values)}"
            if config_class is ExperimentConfig:
                structured = {k: values[k] for k in _STRUCTURED if values.get(k)}
    config = _parsed(config_class, "parse_args", words, command)
    given = {re.split(r"[.=]", word)[0] for word in words}
    structured = {k: v for k, v in structured.items() if f"--{k}" not in given}
    return dataclasses.replace(config, **structured), notices


def from_values(config_class: type[Config], values: dict[str, typing.Any], where: str) -> Config:
    """The dataclass from a dict, as YAML gives it; checked as flags are.

    Raises:
        UsageError: an unknown key, a value of the wrong type or out of range.
    """
    return _parsed(
        config_class, "parse_object", with_new_names(values, current=_kinds(config_class)), where
    )


def spelled_out(words: Sequence[str], config_class: type) -> tuple[list[str], list[str]]:
    """Rewrite flags to the one spelling that the parser takes.

    Dashes become underscores, aliases their field, ``--flag`` alone ``--flag=true``, and the words
    after a list flag one JSON list.

    Returns:
        (the new words, notices about aliases).
    """
    kinds = _kinds(config_class)
    spelled, notices, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            spelled.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        section, dot, name = flag[2:].rpartition(".")
        if f"--{name}" in ALIASES and flag[2:] not in kinds:
            alias, (new, note) = flag, ALIASES[f"--{name}"]
            if not dot or name in RENAMED:
                flag = f"--{section}{dot}{new[2:]}"
            if note is not None and flag != alias:
                notices.append(f"{alias} is taken as {flag}{note}")
        kind = kinds.get(flag[2:])
        if kind is bool and not equals and not (rest and rest[0].lower() in ("true", "false")):
            equals, value = "=", "true"
        elif _is_list(kind):
            items = [value] if equals else []
            while not equals and rest and not rest[0].startswith("--"):
                items.append(rest.pop(0))
            whole = len(items) == 1 and (items[0].startswith("[") or items[0] == "null")
            equals, value = "=", items[0] if whole else json.dumps(items)
        spelled.append(f"{flag}{equals}{value}")
    return spelled, notices


def help_text(config_class: type, prog: str, example: str) -> str:
    """What ``--help`` prints."""
    parser = _parser(config_class, prog=prog, usage=f"{prog} {example}")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for action in parser._actions:
        if action.dest in fields and "choices" in fields[action.dest].metadata:
            table = fields[action.dest].metadata["choices"]()
            action.metavar = f"{{{','.join(table)}}}"
            formulas = "; ".join(f"{name} = {entry.formula}" for name, entry in table.items())
            action.help = f"{action.help} {formulas}."
        elif action.metavar == "{true,false}":
            action.metavar = ""
        elif action.metavar == "[ITEM,...]":
            action.metavar = "X ..."
        elif action.metavar is None and action.nargs != 0 and not action.choices:
            action.metavar = "X"
    return parser.format_help()


def close_to(word: str, words: Sequence[str], prefix: str = "") -> str:
    """``"; did you mean ...?"`` where one of ``words`` is near, else nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _kinds(config_class):
    """{flag without its dashes: its type}; a section's flags as ``section.flag``."""
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    for section in SECTIONS if config_class in (RunConfig, ExperimentConfig) else ():
        for field in dataclasses.fields(SECTIONS[section]):
            kinds[f"{section}.{field.name}"] = field.type
    return kinds


def _is_list(kind):
    # Of words or numbers; a list of mappings is one word of JSON.
    return any(each in (list[str], list[float]) for each in (kind, *typing.get_args(kind)))


@functools.cache  # a grid makes hundreds of configs; a parser takes as long as its values
def _parser(config_class, **options):
    try:
        import jsonargparse
    except ImportError as error:
        raise AntidoteError(
            "jsonargparse is not installed; pip install 'antidote-fast[hf]'"
        ) from error

    class Help(jsonargparse.DefaultHelpFormatter):
        def __init__(self, prog):
            super().__init__(prog, max_help_position=32, width=100)

        def _expand_help(self, action):
            # Types in Python's own notation tell a newcomer nothing that the choices do not.
            text = re.sub(r"\(required, type: .*\)$", "(required)", super()._expand_help(action))
            return re.sub(r"\(type: .*?(, default: .*)?\)$", _default, text)

    parser = jsonargparse.ArgumentParser(formatter_class=Help, exit_on_error=False, **options)
    parser.add_argument("--config", action="config", help="YAML file of flags; flags override it.")
    parser.add_class_arguments(config_class, nested_key=None)
    return parser


def _default(match):
    default = (match[1] or "").removeprefix(", default: ")
    return f"[{default}]" if default not in ("", "null", "[]") else ""


def _parsed(config_class, method, given, command):
    parser = _parser(config_class)
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    try:
        values = getattr(parser, method)(given)
    except AntidoteError:
        raise
    except Exception as error:  # the parser's own, YAML's, and what odd values make either raise
        prefix = "--" if method == "parse_args" else f"{command}."
        raise _mistake(str(error), command, kinds, prefix) from error
    for field, kind in kinds.items():  # the parser lets null through for any type
        if values[field] is None and type(None) not in typing.get_args(kind):
            raise UsageError(f"{field}=null: must be given, or left out for its default")
    plain = {k: v.as_dict() if hasattr(v, "as_dict") else v for k, v in vars(values).items()}
    return config_class(**{field: plain[field] for field in kinds})


_IN_WORDS = {
    "float": "a number",
    "int": "an integer",
    "str": "a text",
    "list[str]": "a list of texts",
    "dict[str, typing.Any]": "a mapping",
    "list[dict[str, typing.Any]]": "a list of mappings",
}


def _mistake(message, command, fields, prefix):
    """One line in our words from what the parser says in its."""
    unknown = re.search(r"nrecognized arguments: (\S+)|['\"](\S+)['\"] is not (?:acc|exp)", message)
    if unknown:
        given = (unknown[1] or unknown[2]).split("=")[0]
        close = close_to(given.lstrip("-"), fields, prefix if not unknown[2] else "")
        return UsageError(f"{given}: {command} has no such flag{close}")
    message = on_one_line(message)
    missing = re.search(r"arguments are required: (.*)|[Kk]ey ['\"](\w+)['\"] is req", message)
    if missing:
        flags = ", ".join(prefix + field for field in re.findall(r"\w+", missing[1] or missing[2]))
        return UsageError(f"{flags}: required; antidote-fast {command} --help lists the flags")
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    union = re.match(
        r'Parser key "([\w.]+)": .*?Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$', message
    )
    if union:  # a field that may be left out, or that takes one or several
        kinds = re.split(r", (?![^\[]*\])", union[2].removesuffix(", NoneType"))
        accepted = " or ".join(_IN_WORDS.get(kind, kind) for kind in kinds)
        accepted = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", accepted)
        return UsageError(f"{prefix}{union[1]}={union[3]}: must be {accepted}")
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message)
    for theirs, ours in (("Expected a ", "must be "), ("float", "a number"), ("int", "an integer")):
        message = re.sub(rf"\b{theirs}", ours, message)
    keyed = re.match(r'Parser key "([\w.]+)": (.*?)(?:\.? Got value: (.*))?$', message)
    if keyed and keyed[1] == "config":
        return DataError(f"--config: {keyed[2]}")
    if keyed:
        value = f"={keyed[3]}" if keyed[3] else ""
        return UsageError(f"{prefix}{keyed[1]}{value}: {keyed[2]}")
    return UsageError(message)
