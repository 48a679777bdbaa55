"""A prune in plain Python: one sorted list a selection. Tests compare with it, bit for bit."""

import torch

from antidote_fast.models.targets import natural_key
from antidote_fast.pruning.scores import random
from antidote_fast.selection import num_pruned


def masks(weights, norms, selection, preserve_norms=None, base=None):
    """{key: bool mask of what is removed} of (out, in) weights by name.

    ``norms`` and ``preserve_norms`` are {key: (in,) fp32} or None; ``base`` like ``weights``.
    """
    chosen = selected(weights, norms, selection, base)
    if preserve_norms is None:
        return chosen
    kept = selected(weights, preserve_norms, selection.preserve, base)
    return {key: chosen[key] & ~kept[key] for key in chosen}


def selected(weights, norms, selection, base=None):
    """{key: bool mask}: the first or last by (score, position) of each row, weight, or of all."""
    order = sorted(weights, key=natural_key)
    scores = {}
    for key in order:
        score = weights[key].float()
        if selection.score_delta:
            score = score - base[key].float()
        scores[key] = score.abs() * (1.0 if norms is None else norms[key])
    found = {key: torch.zeros(weights[key].shape, dtype=torch.bool) for key in order}
    groups = {}
    for key in order:
        for row, values in enumerate(scores[key].tolist()):
            name = {"row": (key, row), "tensor": key, "global": ""}[selection.scope]
            groups.setdefault(name, []).extend((v, key, row, c) for c, v in enumerate(values))
    for entries in groups.values():
        count = num_pruned(len(entries), selection)
        ranked = sorted(entries, key=lambda entry: entry[0])  # stable: equal ones as they stand
        for _, key, row, column in (
            ranked[len(ranked) - count :] if selection.largest else (ranked[:count])
        ):
            found[key][row, column] = True
    return found


def removed(weight, mask, base=None):
    """The weight without what the mask marks: +0 there, or the bits of ``base``."""
    return torch.where(mask, torch.zeros_like(weight) if base is None else base, weight)


def bits(tensor):
    """A tensor's bits as integers, to compare."""
    return tensor.view(torch.int32 if tensor.itemsize == 4 else torch.int16)


def random_scores(key, shape, seed):
    """Score random of a whole weight at once."""
    return random.row_scores(key, torch.empty(shape), None, seed)(0, shape[0])
