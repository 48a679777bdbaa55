"""The exceptions this package raises, each with the exit code the command line gives it.

Tensor-level refusals are plain ``TypeError`` and ``ValueError``; the classes here are for what
happens to files, data and whole models. All of them carry one line that says what is wrong,
where, and what is accepted.
"""

import contextlib
import errno
from collections.abc import Iterator


@contextlib.contextmanager
def readable(path: object = None) -> Iterator[None]:
    """Inside the block a file that the system does not let us read is refused: a DataError.

    It names ``path``, or the file that the system names. Also a decorator, ``@readable()``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of what is written meanwhile
            raise
        what = error.strerror or str(error)
        where = path or f"{printable(error.filename or 'a file'):.300}"
        raise DataError(f"{where}: cannot be read: {printable(what):.300}") from None


def printable(text: object) -> str:
    """Text for a terminal: escape sequences and half surrogates from a file are spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class AntidoteError(Exception):
    """Something failed for a reason that one line can tell. Exit code 1.

    Attributes:
        passes: it says nothing about the inputs, so the same command may succeed another time; a
            run that resumes keeps its state.
    """

    exit_code = 1
    passes = False


class NoRoom(AntidoteError):
    """A disk is full, or a limit of size was met. Exit code 1."""

    passes = True


class UsageError(AntidoteError, ValueError):
    """A flag or argument is malformed or out of range. Exit code 2."""

    exit_code = 2


class DataError(AntidoteError, ValueError):
    """A file, a data set, a model or an adapter was rejected. Exit code 3."""

    exit_code = 3


class NotWritable(DataError):
    """The system does not let this process write an output. Exit code 3."""

    passes = True


class Unreadable(DataError):
    """The system does not let this process read a file. Exit code 3."""

    passes = True


class NothingPruned(AntidoteError, ValueError):
    """No weight was a target, or no layer could be pruned. Exit code 4."""

    exit_code = 4


class BackendUnavailable(AntidoteError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why. Exit code 2."""

    exit_code = 2


class JobsSetAside(AntidoteError):
    """A fleet or an experiment is finished but for some of its jobs. Exit code 5."""

    exit_code = 5


class Interrupted(AntidoteError):
    """Stopped by a signal at a place from which the same command goes on. Exit code 75."""

    exit_code = 75


class PeerFailed(AntidoteError):
    """Another process of the same run failed, and says why. Its exit code is this one's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an exception that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
