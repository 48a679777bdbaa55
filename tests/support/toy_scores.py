"""Two scores of a test's own, as a module of antidote_fast/pruning/scores would hold one each."""

import torch


def row_scores(name, weight, evidence, seed):
    """The place of a weight in its matrix, in shuffled order of columns."""
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return lambda start, stop: (
        order.float() + columns * torch.arange(start, stop, dtype=torch.float32)[:, None]
    )


def channel_norm(act_norm):
    """The square root of the norm."""
    return act_norm.sqrt()
