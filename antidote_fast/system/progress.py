"""How far a long loop is: tqdm in the library, rich or JSON lines on the command line.

Whatever may take over two seconds loops over ``track(..., progress)`` and takes ``progress`` from
its caller: False shows nothing, True a tqdm bar, and the command line hands down one of the two
callables made here. Telling is never fatal: what a stream that is full, closed or gone does not
take is lost, and the work goes on.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

Progress = bool | Callable[..., Any]
Item = TypeVar("Item")


class Steady:
    """A text stream that never raises: what cannot be written is left out.

    Args:
        stream: a text stream, or None where there is none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, characters that the stream cannot show as escapes; its length."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of ``lines``."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is waiting, if it can be."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tell(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print on stdout, or with ``error`` on stderr; nothing happens where that cannot be done."""
    print(text, file=Steady(sys.stderr if error else sys.stdout), end=end, flush=True)


@contextlib.contextmanager
def steady_streams() -> Iterator[None]:
    """Inside the block nothing raises that is printed, whoever prints it."""
    streams = Steady(sys.stdout), Steady(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()


def open_missing_streams() -> None:
    """Give the null device the numbers of stdin, stdout and stderr where they were closed.

    A file opened later would get them, and with them what native code prints to number 2.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def drop_unwritable() -> None:
    """Let the interpreter's last flush of stdout and stderr not fail, which would be code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def track(
    iterable: Iterable[Item], what: str, progress: Progress = False, total: int | None = None
) -> Iterable[Item]:
    """Iterate over ``iterable`` and show how far it is.

    Args:
        iterable: anything that can be looped over.
        what: one or two words beside the bar, such as ``"calibrate"``.
        progress: False, True, or a callable ``(iterable, what, total) -> iterator``.
        total: the number of items, where ``len(iterable)`` does not say it.

    Returns:
        An iterable over the same items.
    """
    if not progress:
        return iterable
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if callable(progress):
        return progress(iterable, what, total)
    from tqdm import tqdm

    return tqdm(iterable, desc=what, total=total, file=Steady(sys.stderr))


@contextlib.contextmanager
def count(
    total: int | None, what: str, progress: Progress = False, every: float = 30.0
) -> Iterator[Callable[..., None]]:
    """Show counts of work that is not one loop; ``progress`` as :func:`track` takes it.

    Yields:
        ``show(done, **counts)``: how many of ``total`` are done, and what else to show beside it,
        such as ``failed=2``; None is not shown. JSON lines come each ``every`` seconds and at the
        end.
    """
    if not progress:
        yield lambda done, **counts: None
    elif hasattr(progress, "bars"):
        task = progress.bars.add_task(what, total=total)

        def show(done, **counts):
            told = [f"{name.replace('_', ' ')} {value}" for name, value in counts.items() if value]
            text = ", ".join([what, *told])
            progress.bars.update(task, completed=done, description=text, refresh=True)

        yield show
    elif callable(progress):
        lines = _Lines(what, every, done=0, total=total)

        def show(done, **counts):
            lines.note(done=done, **counts)
            lines.tell_if_due()

        try:
            yield show
        finally:
            lines.tell()
    else:
        from tqdm import tqdm

        with tqdm(desc=what, total=total, file=Steady(sys.stderr)) as bar:

            def show(done, **counts):
                bar.set_postfix({k: v for k, v in counts.items() if v}, refresh=False)
                bar.update(done - bar.n)

            yield show


class _Lines:
    """JSON lines on stderr about one step, due each ``every`` seconds."""

    def __init__(self, what, every, **fields):
        self._fields, self._every = {"step": what, **fields}, every
        self._start = self._last = time.monotonic()

    def note(self, **fields):
        self._fields |= {name: value for name, value in fields.items() if value is not None}

    def tell_if_due(self):
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self.tell()

    def tell(self):
        seconds = round(time.monotonic() - self._start, 1)
        tell(json.dumps({**self._fields, "seconds": seconds}), error=True)


@contextlib.contextmanager
def command_line_progress(quiet: bool = False) -> Iterator[Progress]:
    """The ``progress`` that a command uses: bars on a terminal, else one JSON line a step."""
    if quiet:
        yield False
    elif Steady(sys.stderr).isatty():
        with _bars() as progress:
            yield progress
    else:
        yield json_lines


@contextlib.contextmanager
def _bars():
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    console = Console(file=Steady(sys.stderr))
    with rich_progress.Progress(*columns, console=console) as bars:

        def track_on_bars(iterable, what, total):
            return bars.track(iterable, total=total, description=what)

        track_on_bars.bars = bars  # for count()
        yield track_on_bars


def json_lines(
    iterable: Iterable[Item], what: str, total: int | None, every: float = 30.0
) -> Iterator[Item]:
    """Loop over ``iterable``; a JSON line on stderr at its end, and each ``every`` seconds."""
    lines = _Lines(what, every, done=0, total=total or 0)
    for done, item in enumerate(iterable, 1):
        yield item
        lines.note(done=done, total=done if total is None else total)
        if done != total:
            lines.tell_if_due()
    lines.tell()


class Clock:
    """Seconds by step: each lap is what passed since the one before, added to its name."""

    def __init__(self) -> None:
        self.seconds = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a step."""
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 3)
        self._last = now
