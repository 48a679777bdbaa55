"""Attention and MLP blocks of any causal language model, and what they put out."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from antidote_fast.errors import DataError
from antidote_fast.models.undo import hook, undoing

_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|expert", re.IGNORECASE)


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attention blocks of any model, in its own order: (name, module).

    A block is the innermost module whose class is called ...Attention... and that has weights of
    its own (what computes the softmax only, without projections, is part of one).

    Raises:
        DataError: there are none.
    """
    named = {
        name: module
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and any(True for _ in module.parameters())
    }
    outer = {name for name in named if any(other.startswith(f"{name}.") for other in named)}
    if not named:
        raise DataError(f"no attention modules found in {type(model).__name__}")
    return [(name, module) for name, module in named.items() if name not in outer]


def mlp_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What gives each decoder block's MLP output, in the model's own order: (name, module).

    Beside a block's attention that is the one child called ...MLP..., ...FeedForward..., ...MoE...
    or the like; where the block holds its MLP's layers itself (OPT's fc1 and fc2), the last linear
    one of those.

    Raises:
        DataError: a block without either.
    """
    by_name = {}
    for name, _ in attention_modules(model):
        place, beside = name, None
        # GPT-Neo wraps its attention once more; a number names the block in its list.
        while beside is None and "." in place and not place.rpartition(".")[2].isdigit():
            place = place.rpartition(".")[0]
            beside = _mlp_of(model, place, name)
        if beside is None:
            raise DataError(f"no MLP found beside {name} in {type(model).__name__}")
        by_name[beside[0]] = beside
    return list(by_name.values())


def _mlp_of(model, block, attention):
    """(name, module) of the MLP among a block's children, but not in its attention; or None."""
    children = [
        (f"{block}.{child}", module)
        for child, module in model.get_submodule(block).named_children()
        if not f"{attention}.".startswith(f"{block}.{child}.")
        and any(p.dim() > 1 for p in module.parameters())  # a norm may be called ...Moe... too
    ]
    called = [pair for pair in children if _MLP.search(type(pair[1]).__name__)]
    called = called or [pair for pair in children if _MLP.search(pair[0].rpartition(".")[2])]
    # An adapter's layer stands in for the linear one that it wraps.
    inner = [getattr(module, "base_layer", module) for _, module in children]
    weights = [getattr(module, "weight", None) for module in inner]
    linear = [c for c, w in zip(children, weights, strict=True) if w is not None and w.dim() == 2]
    return (called or linear or [None])[-1]


@contextmanager
def outputs_seen(modules: Sequence[tuple[str, nn.Module]], see: Callable) -> Iterator[None]:
    """Call ``see(number, output)`` with what each module of (name, module) pairs puts out.

    A returned tensor takes the output's place; None leaves it. Of a tuple the first entry is meant.
    """

    def called(number, module, args, output):
        several = isinstance(output, tuple)
        changed = see(number, output[0] if several else output)
        return (changed, *output[1:]) if several and changed is not None else changed

    with undoing() as undo:
        for number, (_, module) in enumerate(modules):
            hook(undo, module, functools.partial(called, number), after=True)
        yield


@contextmanager
def outputs_kept(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[list[Tensor]]:
    """Yields a list that a forward pass fills with what the modules put out, graph and all."""
    outputs: list[Tensor] = []
    with outputs_seen(modules, lambda _, output: outputs.append(output)):
        yield outputs


def by_token(output: Tensor, mask: Tensor) -> Tensor:
    """A block's output, which models may flatten, as (batch, length, hidden) of a mask's tokens.

    Raises:
        DataError: another number of tokens than the mask (batch, length) has.
    """
    if output.numel() != mask.numel() * output.shape[-1]:
        shapes = f"{tuple(output.shape)} for {tuple(mask.shape)} tokens"
        raise DataError(f"a block puts out {shapes}: not a vector a token")
    return output.reshape(*mask.shape, -1)
