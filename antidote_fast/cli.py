"""The command line: one subcommand a stage, its flags the fields of the stage's dataclass.

Nothing heavy is imported before a command is known to be well formed, so help and mistakes are
answered at once. Exit codes: 0 done, 1 unexpected failure, 2 malformed flag or value out of range,
3 files or data rejected, 4 nothing was pruned, 75 interrupted (nothing is left half-written).
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
import typing
import warnings
from dataclasses import dataclass

from antidote_fast import __version__
from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.pipeline import config as configs
from antidote_fast.progress import command_line_progress

PROG = "antidote-fast"
FAILED, INTERRUPTED = 1, 75
ALIASES = {
    "--nsamples": ("--num_calibration_samples", ""),
    "--dense_ratio": ("--ratio", " (the fraction removed, as in the official code)"),
}


@dataclass(frozen=True)
class Stage:
    """A subcommand that reads a dataclass of flags and writes a folder."""

    config: type
    run: str
    help: str
    example: str


STAGES = {
    "align": Stage(
        configs.AlignConfig,
        "antidote_fast.pipeline.align:run",
        "tune a base model on safe data",
        "--model_name_or_path BASE --dataset safe.jsonl --output_dir aligned",
    ),
    "finetune": Stage(
        configs.FinetuneConfig,
        "antidote_fast.pipeline.finetune:run",
        "tune an aligned model on a user's data, a share of it harmful",
        "--model_name_or_path aligned --dataset task.jsonl --harmful_dataset harmful.jsonl "
        "--output_dir attacked",
    ),
    "calibrate": Stage(
        configs.CalibrateConfig,
        "antidote_fast.pipeline.oneshot:run_calibrate",
        "collect activation norms on harmful data, for any later prune",
        "--model_name_or_path aligned --adapter attacked --dataset harmful.jsonl "
        "--output_dir norms",
    ),
    "prune": Stage(
        configs.PruneConfig,
        "antidote_fast.pipeline.oneshot:run_prune",
        "remove the harmful weights of an adapter or a model",
        "--model_name_or_path BASE --adapter ADAPTER --dataset harmful.jsonl --ratio 0.1 "
        "--output_dir OUT",
    ),
    "evaluate": Stage(
        configs.EvaluateConfig,
        "antidote_fast.pipeline.evaluate:run",
        "measure harmful score, finetune accuracy and benign refusals",
        "--model_name_or_path BASE --adapter OUT --harmful_dataset test.jsonl "
        "--task_dataset task-test.jsonl --output_dir scores",
    ),
    "run": Stage(
        configs.ExperimentConfig,
        "antidote_fast.pipeline.experiment:run",
        "all of the above, from one YAML file",
        "--config experiment.yaml",
    ),
    "demo": Stage(
        configs.DemoConfig,
        "antidote_fast.demo:run",
        "the whole road on a small model that comes with a package: no download from a hub",
        "--output_dir demo-out",
    ),
}
PLAIN = {
    "env": "versions, kernels in use, and why a backend is not available",
    "inspect": "what is in a folder, an adapter, a norms or a masks file, and whether it is whole",
}


def entry_point():
    """What the ``antidote-fast`` script calls."""
    # Read by the libraries when they are imported; a user's own setting stands.
    if "--debug" not in sys.argv:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))


def main(argv=None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit code. Errors are one line on stderr; ``--debug`` adds the traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    quiet = "--quiet" in argv
    argv = [word for word in argv if word not in ("--debug", "--quiet")]
    try:
        with _interrupts(), _hushed(debug):
            return _dispatch(argv, quiet)
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            traceback.print_exc()
        line, code = _explain(error)
        print(f"{PROG}: {line}", file=sys.stderr)
        return code


def _dispatch(argv, quiet):
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_overview())
    elif command == "--version":
        print(f"{PROG} {__version__}")
    elif command in STAGES:
        _run_stage(command, rest, quiet)
    elif command in PLAIN:
        from antidote_fast import describe

        getattr(describe, f"{command}_command")(rest)
    else:
        raise UsageError(f"{command!r}: no such command{_close(command, [*STAGES, *PLAIN])}")
    return 0


def _overview():
    lines = [
        f"usage: {PROG} COMMAND [flags]        {PROG} COMMAND --help",
        "",
        "Remove the harmful weights that a poisoned fine-tune left in a language model.",
        "This is for safety, not for speed: the output is as large and as fast as the input.",
        "",
        *(f"  {name:<11}{stage.help}" for name, stage in STAGES.items()),
        *(f"  {name:<11}{text}" for name, text in PLAIN.items()),
        "",
        "shortest useful line:",
        f"  {PROG} prune {STAGES['prune'].example}",
        "",
        "Every command takes --quiet (errors only) and --debug (tracebacks, library warnings).",
    ]
    return "\n".join(lines)


def _run_stage(name, argv, quiet):
    stage = STAGES[name]
    if "-h" in argv or "--help" in argv:
        print(_parser(name, stage).format_help(), end="")
        return
    argv, notices = spelled_out(argv, stage.config)
    for notice in notices:
        print(f"{PROG}: {notice}", file=sys.stderr)
    config = parse(name, argv)
    module, function = stage.run.split(":")
    run = getattr(importlib.import_module(module), function)
    with command_line_progress(quiet) as progress:
        report = run(config, progress=progress)
    if not quiet:
        from antidote_fast import describe

        print(describe.summary(report, config.output_dir))


def spelled_out(argv, config_class):
    """Rewrite flags to the one spelling that the parser takes.

    Dashes become underscores, aliases their field, ``--flag`` alone ``--flag=true``, and the words
    after a list flag one JSON list.

    Returns:
        (the new words, notices about aliases).
    """
    kinds = _kinds(config_class)
    words, notices, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("-", "_").replace("__", "--", 1)
        if flag in ALIASES and flag[2:] not in kinds:
            alias, (flag, note) = flag, ALIASES[flag]
            notices.append(f"{alias} is taken as {flag}{note}")
        kind = kinds.get(flag[2:])
        if kind is bool and not equals and not (rest and rest[0].lower() in ("true", "false")):
            equals, value = "=", "true"
        elif _is_list(kind):
            items = [value] if equals else []
            while not equals and rest and not rest[0].startswith("--"):
                items.append(rest.pop(0))
            if len(items) == 1 and items[0].startswith("["):
                equals, value = "=", items[0]
            else:
                equals, value = "=", json.dumps(items)
        words.append(f"{flag}{equals}{value}")
    return words, notices


def _kinds(config_class):
    """{flag without its dashes: its type}; a section's flags as ``section.flag``."""
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    for section in configs.SECTIONS if config_class is configs.ExperimentConfig else ():
        for field in dataclasses.fields(configs.SECTIONS[section]):
            kinds[f"{section}.{field.name}"] = field.type
    return kinds


def _is_list(kind):
    kinds = (kind, *typing.get_args(kind))
    return any(typing.get_origin(k) is list for k in kinds)


def parse(name, argv):
    """The stage's dataclass from words that :func:`spelled_out` has been over.

    Raises:
        UsageError: an unknown flag, a value of the wrong type or out of range.
        DataError: a config file that cannot be read.
    """
    from jsonargparse import ArgumentError

    stage = STAGES[name]
    fields = [field.name for field in dataclasses.fields(stage.config)]
    try:
        values = _parser(name, stage).parse_args(argv)
    except ArgumentError as error:
        raise _usage_error(str(error), name, fields) from error
    return stage.config(**{field: _plain(values[field]) for field in fields})


def _plain(value):
    return value.as_dict() if hasattr(value, "as_dict") else value


def _parser(name, stage):
    try:
        import jsonargparse
    except ImportError as error:
        raise _missing_extra(error) from error

    class Help(jsonargparse.DefaultHelpFormatter):
        def __init__(self, prog):
            super().__init__(prog, max_help_position=32, width=100)

        def _expand_help(self, action):
            # Types in Python's own notation tell a newcomer nothing that the choices do not.
            text = re.sub(r"\(required, type: .*\)$", "(required)", super()._expand_help(action))
            return re.sub(r"\(type: .*?(, default: .*)?\)$", _default, text)

    parser = jsonargparse.ArgumentParser(
        prog=f"{PROG} {name}",
        usage=f"{PROG} {name} {stage.example}",
        formatter_class=Help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of flags; flags override it.")
    parser.add_class_arguments(stage.config, nested_key=None)
    for action in parser._actions:
        if action.metavar == "{true,false}":
            action.metavar = ""
        elif action.metavar == "[ITEM,...]":
            action.metavar = "X ..."
        elif action.metavar is None and action.nargs != 0 and not action.choices:
            action.metavar = "X"
    return parser


def _default(match):
    default = (match[1] or "").removeprefix(", default: ")
    return f"[{default}]" if default not in ("", "null", "[]") else ""


def _usage_error(message, command, fields):
    """One line in our words from what the parser says in its."""
    unknown = re.search(r"nrecognized arguments: (\S+)|[Kk]ey '(\S+)' is not expected", message)
    if unknown:
        given = (unknown[1] or unknown[2]).split("=")[0]
        close = _close(given.lstrip("-"), fields, "--" if given.startswith("-") else "")
        return UsageError(f"{given}: {command} has no such flag{close}")
    missing = re.search(r"arguments are required: (.*)|[Kk]ey \"(\w+)\" is required", message)
    if missing:
        names = re.findall(r"\w+", missing[1] or missing[2])
        flags = ", ".join(f"--{field}" for field in names)
        return UsageError(f"{flags}: required; {PROG} {command} --help shows what {command} takes")
    message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message).replace(
        "Expected a ", "must be "
    )
    keyed = re.match(r'Parser key "([\w.]+)": (.*?)(?:\.? Got value: (.*))?$', message)
    if keyed and keyed[1] == "config":
        return DataError(f"--config: {keyed[2]}")
    if keyed:
        value = f"={keyed[3]}" if keyed[3] else ""
        return UsageError(f"--{keyed[1]}{value}: {keyed[2]}")
    return UsageError(message)


def _close(word, words, prefix=""):
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _explain(error):
    """(one line, exit code) for anything that ended a command."""
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] != "antidote_fast":
        error = _missing_extra(error)
    if isinstance(error, AntidoteError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing is left half-written", INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'output'}: {error.strerror}; nothing was written", FAILED
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller --batch_size or --max_seq_length", FAILED
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"unexpected failure: {kind}: {text:.300} (--debug shows where)", FAILED


def _missing_extra(error):
    extra = "plot" if error.name == "matplotlib" else "hf"
    return AntidoteError(
        f"{error.name or error} is not installed; pip install 'antidote-fast[{extra}]'"
    )


@contextlib.contextmanager
def _interrupts():
    """SIGTERM ends a command as Ctrl-C does: staged folders are removed on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _hushed(debug):
    """Keep the libraries' warnings and logs to themselves, unless debugging."""
    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
