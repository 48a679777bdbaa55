"""SIGTERM and Ctrl-C in work that can stop at a good place: remembered till there, not obeyed."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
Result = TypeVar("Result")


class Request:
    """Whether somebody asked to stop.

    Attributes:
        made: True once a signal has come.
    """

    made = False


@contextlib.contextmanager
def remembered() -> Iterator[Request]:
    """Inside the block the first SIGTERM or SIGINT sets ``request.made``; a second one interrupts.

    The work looks at it where stopping loses nothing, saves what it has and raises
    :class:`antidote_fast.errors.Interrupted` (exit code 75). Outside of the main thread signals
    cannot be caught, and ``made`` stays False.
    """
    request = Request()

    def note(signum, frame):
        if request.made:
            raise KeyboardInterrupt
        request.made = True

    with handled_by(note, _SIGNALS):
        yield request


@contextlib.contextmanager
def handled_by(handler: Callable[[int, Any], Any], signals: Iterable[int]) -> Iterator[None]:
    """Inside the block the handler gets these signals; outside of the main thread nothing does."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def held_back(call: Callable[[], Result]) -> Result:
    """Call a function; a SIGTERM or SIGINT that comes meanwhile is obeyed after it. For short ones.

    Outside of the main thread nothing is held back; Python has no handlers run there.

    Returns:
        What the function returns.
    """
    came, before = [], {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    # Twice, as whatever is raised may come in the midst of the first: nobody's Ctrl-C gets lost.
    try:
        try:
            for number in before:
                signal.signal(number, lambda signum, frame: came.append(signum))
            return call()
        finally:
            restore()
    finally:
        restore()
        for number in came:
            signal.raise_signal(number)
