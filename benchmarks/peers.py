"""How weights are pruned without this library: what users run today, and the nearest kernels.

Each takes ``(weight, operands)`` and changes the weight as ``prune_`` would. What they share: an
fp32 score, viewed as rows of what is compared with each other (a row, the whole tensor, a group),
and the k last of each by some selection.
"""

import importlib
from dataclasses import dataclass

import torch

from antidote_fast import Selection, num_pruned


@dataclass(frozen=True)
class Operands:
    """What is removed of one weight; ``compared`` weights are ranked against each other."""

    selection: Selection
    compared: int
    norm: torch.Tensor
    preserve_norm: torch.Tensor | None = None
    base: torch.Tensor | None = None
    write: bool = True

    @property
    def k(self):
        """How many of the compared ones are removed."""
        return num_pruned(self.compared, self.selection)

    @property
    def k_preserved(self):
        """How many of the compared ones are protected."""
        return num_pruned(self.compared, self.selection.preserve)

    @property
    def plain(self):
        """Nothing but zeros written where the score is high."""
        return self.write and self.base is None and self.preserve_norm is None


def by_sort(score, k):
    """A stable sort, as the official codes; the ground truth."""
    order = torch.sort(score, dim=-1, stable=True).indices
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, score.shape[1] - k :], True)


def by_topk(score, k):
    """The k largest without a full sort; ties fall as topk likes."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, torch.topk(score, k, dim=-1, sorted=False).indices, True)


def by_kthvalue(score, k):
    """All that is at least the k-th largest; all ties go."""
    kth = torch.kthvalue(score, score.shape[1] - k + 1, dim=-1, keepdim=True).values
    return score >= kth


def by_flashinfer(score, k):
    """FlashInfer's radix top-k; ties fall as it likes."""
    indices = importlib.import_module("flashinfer").top_k(score, k)[1]
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, indices.long(), True)


def pruned_with(select, weight, operands):
    """Score, select, and write or return the mask."""
    shape = (-1, operands.compared)
    if operands.selection.score_delta:
        value = (weight.float() - operands.base.float()).abs()
    else:
        value = weight.abs().float()
    score = value * operands.norm.reshape(1, -1)
    mask = select(score.view(shape), operands.k)
    if operands.preserve_norm is not None:
        score = value * operands.preserve_norm.reshape(1, -1)
        mask &= ~select(score.view(shape), operands.k_preserved)
    mask = mask.view(weight.shape)
    if operands.base is not None:
        torch.where(mask, operands.base, weight, out=weight)
    elif operands.write:
        weight[mask] = 0
    return mask


def sort_chain(weight, operands):
    """fp32 score, stable sort, scatter, multiply: Wanda and the official Antidote code."""
    return pruned_with(by_sort, weight, operands)


def topk_scatter(weight, operands):
    """topk, and zeros scattered straight into the weight where that is all."""
    if not operands.plain:
        return pruned_with(by_topk, weight, operands)
    score = (weight.abs().float() * operands.norm.reshape(1, -1)).view(-1, operands.compared)
    indices = torch.topk(score, operands.k, dim=-1, sorted=False).indices
    return weight.view(-1, operands.compared).scatter_(1, indices, 0)


def kthvalue_compare(weight, operands):
    """kthvalue and a comparison."""
    return pruned_with(by_kthvalue, weight, operands)


def flashinfer_scatter(weight, operands):
    """FlashInfer's top-k and a scatter."""
    return pruned_with(by_flashinfer, weight, operands)


def compiled_sort_chain():
    """The sort chain through ``torch.compile``, for one shape and count."""
    torch._dynamo.reset()
    return torch.compile(sort_chain, dynamic=False)


def names(compile_too):
    """{name: a function that makes the peer}; a peer that cannot be made raises ImportError."""
    table = {
        "sort chain": lambda: sort_chain,
        "topk + scatter": lambda: topk_scatter,
        "kthvalue + compare": lambda: kthvalue_compare,
        "flashinfer top_k + scatter": _flashinfer,
    }
    if compile_too:
        table["sort chain, compiled"] = compiled_sort_chain
    return table


def _flashinfer():
    if not hasattr(importlib.import_module("flashinfer"), "top_k"):
        raise ImportError("flashinfer has no top_k")
    return flashinfer_scatter
