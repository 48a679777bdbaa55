"""A model as it was, whatever is raised and wherever: what is changed is noted before, and undone.

An exception (Ctrl-C, an error of a user's iterator) may come between any two lines, those of the
undoing too. So each step is noted before the change that it takes back, does no harm where that
change was never made, and is done twice: whichever of the two is interrupted, the other is whole.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from antidote_fast.models.targets import find_targets


class Undo:
    """Steps that take back what was changed, the last one first."""

    def __init__(self) -> None:
        self._steps = []

    def later(self, step: Callable[[], object]) -> None:
        """Note a callable, before the change that it undoes; it must be fit to run twice."""
        self._steps.append(step)

    def run(self) -> None:
        """Do all steps, also where one of them fails; then raise what the first failure was."""
        failed = None
        for step in reversed(self._steps):
            try:
                step()
            except BaseException as error:
                failed = failed or error
        if failed is not None:
            raise failed


@contextlib.contextmanager
def undoing() -> Iterator[Undo]:
    """Yields an :class:`Undo` whose steps are done at the end of the block, however it ends."""
    undo = Undo()
    try:
        try:
            yield undo
        finally:
            undo.run()
    finally:
        undo.run()


def eval_mode(model: nn.Module, undo: Undo) -> None:
    """Put a model into eval mode; undone, every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]

    def back():
        for module, mode in modes:
            module.training = mode

    undo.later(back)
    model.eval()


def no_grad(undo: Undo) -> None:
    """Switch gradients off in this thread until undone."""
    before = torch.is_grad_enabled()
    undo.later(lambda: torch.set_grad_enabled(before))
    torch.set_grad_enabled(False)


def without_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs without gradients; the mode of this thread is as before after it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with undoing() as undo:
            no_grad(undo)
            return function(*args, **kwargs)

    return call


def hook(undo: Undo, module: nn.Module, call: Callable[..., Any], *, after: bool = False) -> None:
    """Have a module call this before its forward (``after``: after it) until undone."""
    hooks = module._forward_hooks if after else module._forward_pre_hooks

    def back():  # not by the handle: there is none where registering was interrupted
        for number, registered in list(hooks.items()):
            if registered is call:
                hooks.pop(number, None)

    undo.later(back)
    (module.register_forward_hook if after else module.register_forward_pre_hook)(call)


class Originals:
    """A copy of a live model's targets, to be put back in place, bit for bit."""

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] = (),
    ) -> None:
        weights = [target.weight for target in find_targets(model, targets, ignore)]
        self._saved = [(weight, weight.detach().clone()) for weight in weights]

    def restore(self) -> None:
        """Write the values back: all of them, also where that is interrupted."""
        try:
            self._write()
        except BaseException:
            self._write()
            raise

    def _write(self):
        with torch.no_grad():
            for weight, value in self._saved:
                weight.copy_(value)
