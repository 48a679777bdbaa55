"""Antidote's pruning as its official code does it, written anew from its description, to time it.

Source: arXiv 2408.09600 and what is known of its code, which calibrates as Wanda does. The first
block's inputs are caught sequence by sequence. Then each block runs twice over every sequence:
once with hooks that keep, for every linear layer, the running mean over sequences of the squared
norm of each input channel (taken of a transposed fp32 copy), and once to make the next block's
inputs. Hidden states of all sequences stay in memory. In each row the scores are sorted, stably,
and what comes after ``int(columns * (1 - ratio))`` goes; weights change after all layers are done,
``W *= 1 - mask``.

Left out, as wrong or beside the point: a swallowed ValueError that can leave no sequence at all,
pads that count, masks in pickles.
"""

from dataclasses import dataclass

import torch
from torch import nn

from antidote_fast import find_targets


class _Caught(Exception):
    """The first block was reached; the rest of the forward is of no use."""


@dataclass
class RunningMean:
    """Of one layer: the mean over sequences of each input channel's sum of squares."""

    value: torch.Tensor
    sequences: int = 0

    def add(self, x):
        """x: (sequences, tokens, K), every token counted."""
        before = self.sequences
        self.sequences += x.shape[0]
        self.value *= before / self.sequences
        columns = x.reshape(-1, x.shape[-1]).t().float()
        self.value += torch.norm(columns, p=2, dim=1) ** 2 / self.sequences


def blocks_of(model):
    """The model's blocks: its first list of modules."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def first_inputs(model, blocks, sequences):
    """[(hidden states, other arguments)]: what each sequence brings into the first block."""
    device = next(model.parameters()).device
    caught = []

    def keep(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        caught.append((hidden, args[1:], rest))
        raise _Caught

    handle = blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for ids in sequences:
            try:
                model(input_ids=ids.to(device), use_cache=False)
            except _Caught:
                continue
    finally:
        handle.remove()
    return caught


def run_block(block, inputs):
    """The block's outputs, each with the other arguments that its input had."""
    outputs = []
    for hidden, args, kwargs in inputs:
        output = block(hidden, *args, **kwargs)
        outputs.append((output[0] if isinstance(output, tuple) else output, args, kwargs))
    return outputs


def select(weight, mean, ratio):
    """What is removed of a weight (N, K), as bool: each row sorted by score, its tail taken."""
    score = weight.abs().float() * mean.sqrt().reshape(1, -1)
    order = torch.sort(score, dim=-1, stable=True).indices
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, int(weight.shape[1] * (1 - ratio)) :], True)


@torch.no_grad()
def collect(model, sequences, targets=None):
    """The statistics of every target, block by block.

    Args:
        model: in eval mode, its targets ``nn.Linear``s inside its blocks.
        sequences: (1, T) token ids each; nothing is padded.
        targets: as :func:`antidote_fast.find_targets`.

    Returns:
        {parameter name: (K,) fp32 mean over sequences of the sum over tokens of x ** 2}.
    """
    blocks = blocks_of(model)
    found = {target.module: target.key for target in find_targets(model, targets)}
    means = {}
    inputs = first_inputs(model, blocks, sequences)
    for block in blocks:
        kept, handles = {}, []
        for module in block.modules():
            if module not in found:
                continue
            kept[module] = RunningMean(torch.zeros(module.in_features, device=module.weight.device))
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kept=kept: kept[module].add(args[0])
                )
            )
        run_block(block, inputs)
        for handle in handles:
            handle.remove()
        means |= {found[module]: mean.value for module, mean in kept.items()}
        inputs = run_block(block, inputs)
    missed = set(found.values()) - means.keys()
    assert not missed, f"outside the blocks: {sorted(missed)}"
    return means


@torch.no_grad()
def prune_by(model, means, ratio, targets=None):
    """Select by :func:`collect`'s result, then prune.

    Returns:
        {parameter name: what was removed, bool}.
    """
    found = find_targets(model, targets)
    masks = {target.key: select(target.weight, means[target.key], ratio) for target in found}
    for target in found:
        target.weight.mul_(~masks[target.key])
    return masks
