"""The command line: one subcommand a stage, its flags the fields of the stage's dataclass.

Nothing heavy is imported before a command is known to be well formed, so help and mistakes are
answered at once. Exit codes: 0 done, 1 unexpected failure, 2 malformed flag or value out of range,
3 files or data rejected, 4 nothing was pruned, 5 a fleet or an experiment set jobs aside, 75
interrupted (nothing is left half-written).
"""

import contextlib
import errno
import importlib
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

from antidote_fast import __version__
from antidote_fast.cli.commands import PLAIN, STAGES
from antidote_fast.config import flags
from antidote_fast.distributed.ranks import ranks_launched, session
from antidote_fast.errors import (
    AntidoteError,
    DataError,
    Interrupted,
    JobsSetAside,
    PeerFailed,
    UsageError,
    printable,
)
from antidote_fast.system.interrupts import handled_by
from antidote_fast.system.progress import (
    command_line_progress,
    drop_unwritable,
    open_missing_streams,
    steady_streams,
    tell,
)

PROG = "antidote-fast"
FAILED, INTERRUPTED = 1, 75
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_EVERY_STAGE = """
also:
  --dry_run      check flags, data and files, print what it would take, write nothing
                 (with --json as JSON)
  --quiet        errors only
  --debug        tracebacks, and the libraries' warnings"""


def entry_point() -> None:
    """What the ``antidote-fast`` script calls."""
    # Read by the libraries when they are imported; a user's own setting stands.
    if "--debug" not in sys.argv:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    open_missing_streams()
    code = main(sys.argv[1:])
    drop_unwritable()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit code, of the work alone: a stream that is full or closed changes nothing. Errors
        are one line on stderr; ``--debug`` adds the traceback.
    """
    with steady_streams():
        return _run(argv)


def _run(argv):
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    quiet = "--quiet" in argv
    argv = [word for word in argv if word not in ("--debug", "--quiet")]
    try:
        # SIGTERM ends a command as Ctrl-C does: staged folders are removed on the way out.
        with handled_by(signal.default_int_handler, [signal.SIGTERM]), _hushed(debug):
            return _dispatch(argv, quiet)
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            traceback.print_exc()
        line, code = _explain(error)
        rank = os.environ.get("RANK", "0")
        if not _told_by_another_rank(error, rank):
            tell(f"{PROG}: {line if rank == '0' else f'rank {rank}: {line}'}", error=True)
        return code


def _dispatch(argv, quiet):
    command, *rest = argv or ["--help"]
    rank, size = ranks_launched()
    asked = command in ("-h", "--help", "help", "--version", *PLAIN)
    if rank and (asked or {"-h", "--help", "--dry_run", "--dry-run"} & set(rest)):
        return 0  # answered by rank 0
    if command in ("-h", "--help", "help"):
        tell(_overview())
    elif command == "--version":
        tell(f"{PROG} {__version__}")
    elif command in STAGES:
        _run_stage(command, rest, quiet or rank > 0, size)
    elif command in PLAIN:
        module = "inspect" if command == "env" else command
        _function(f"antidote_fast.cli.{module}:{command}_command")(rest)
    else:
        hint = flags.close_to(command, [*STAGES, *PLAIN])
        raise UsageError(f"{command!r}: no such command{hint}")
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
        "Those that write take --dry_run: check all, print what it takes (--json), write nothing.",
    ]
    return "\n".join(lines)


def _run_stage(name, words, quiet, size):
    stage = STAGES[name]
    if "-h" in words or "--help" in words:
        tell(flags.help_text(stage.config, f"{PROG} {name}", stage.example), end="")
        tell(_EVERY_STAGE)
        return
    rest = [word for word in words if word.replace("-", "_") != "__dry_run"]
    if len(rest) < len(words):
        _show_plan(name, rest)
        return
    config, notices = flags.from_words(stage.config, words, name)
    for notice in () if quiet else notices:
        tell(f"{PROG}: {notice}", error=True)
    if size > 1 and not stage.ranks:
        shared = " and ".join(other for other in STAGES if STAGES[other].ranks)
        hint = "; share its jobs with --shard" if name == "fleet" else ""
        raise UsageError(f"{name}: runs in one process; torchrun is for {shared}{hint}")
    run, failure = _function(stage.run), None
    with contextlib.ExitStack() as stack:
        options = {"progress": stack.enter_context(command_line_progress(quiet))}
        if size > 1:
            options["world"] = stack.enter_context(session(config.device))
        try:
            report = run(config, **options)
        except (Interrupted, JobsSetAside) as error:  # a part of the work may be done
            report, failure = getattr(error, "report", None), error
            if report is None:
                raise
    if not quiet:
        from antidote_fast.cli.show import summary

        tell(summary(report, config.output_dir))
    if failure is not None:
        raise failure


def _show_plan(name, words):
    """``--dry_run``: the same checks, a plan with estimates, nothing written."""
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    config, _ = flags.from_words(STAGES[name].config, words, name)
    from antidote_fast.planning.dry_run import plan

    planned = plan(config)
    tell(json.dumps(planned.to_dict(), indent=2) if as_json else "\n".join(planned.lines()))
    if planned.refusal:
        raise AntidoteError(planned.refusal)


def _function(place):
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _told_by_another_rank(error, rank):
    """Whether this process is one of several that torchrun started, and another one says why."""
    if isinstance(error, PeerFailed):
        return True
    alike = isinstance(error, (UsageError, KeyboardInterrupt)) and not hasattr(error, "_agreed")
    return alike and rank != "0"


def _explain(error):
    """(one line, exit code) for anything that ended a command."""
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] != "antidote_fast":
        extra = {"matplotlib": "plot", "ray": "ray"}.get(error.name, "hf")
        text = f"{error.name or error} is not installed; pip install 'antidote-fast[{extra}]'"
        error = AntidoteError(text)
    if isinstance(error, AntidoteError):
        return printable(" ".join(str(error).split())), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing is left half-written", INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'output'}: {error.strerror}", FAILED
    if isinstance(error, OSError) and error.errno in _UNREADABLE and error.filename:
        return f"{printable(error.filename)}: {error.strerror}", DataError.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller --batch_size or --max_seq_length", FAILED
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"unexpected failure: {kind}: {printable(text):.300} (--debug shows where)", FAILED


@contextlib.contextmanager
def _hushed(debug):
    """Keep the libraries' warnings and logs to themselves, unless debugging."""
    with contextlib.ExitStack() as stack:
        if not debug:
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield
