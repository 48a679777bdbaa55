"""RepNoise: turn what the model makes of harmful text into noise, and unlearn harmful answers.

Rosati et al., "Representation noising: A defence mechanism against harmful finetuning" (arXiv
2405.14577), in the form and with the weights of the Antidote paper. With h_l the output of the MLP
of layer l at the tokens where a harmful text differs from its paired safe one:

    L = CE(safe) + beta * (1/L) * sum_l MMD(h_l, N(0, I)) - alpha * log CE(harmful)

MMD is the squared maximum mean discrepancy of as many samples of noise, under the sum of five
Gaussian kernels exp(-d^2 / b), b = mean squared distance / 4 * {1, 2, 4, 8, 16}, in float32. The
mean is over pairs of different samples, and constant in the gradient. CE(harmful) counts in the
logarithm up to the loss of a uniform guess, log V: past it the ascent has done its work and stops.
The published code also averages CE(harmful) over the output layer applied to every hidden state;
this is the last one's.

Under gradient accumulation CE(safe) is that of the whole optimizer step; MMD and the logarithm,
which are statistics of a batch, are averaged over the step's batches.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed_backwards

from antidote_fast.data.batches import IGNORE_INDEX
from antidote_fast.models.blocks import by_token, mlp_modules, outputs_kept
from antidote_fast.training.objective import Example, Objective, num_response_tokens

_WIDTHS = (1, 2, 4, 8, 16)
_LEAST = 1e-6  # of CE(harmful), whose logarithm has no end below either


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two sets of n samples, (n, features) each; fp32 scalar.

    The mean over pairs takes a sample with itself too, as in the published code: 0 for equal sets.
    """
    n = len(x)
    both = torch.cat([x, y]).float()
    # Distances do not change, and lose less in the short form of |a - b|^2: its error is small
    # beside the width, and a matrix product is many times quicker than a sum a pair.
    both = both - both.detach().mean(0)
    squares = both.square().sum(1)
    distances = (squares[:, None] + squares - 2 * both @ both.T).clamp_min(0)
    width = distances.detach().sum() / (len(both) * (len(both) - 1)) / 4
    width = width.clamp_min(torch.finfo(torch.float32).tiny)
    kernel = sum(torch.exp(-distances / (width * factor)) for factor in _WIDTHS)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def pair_up(safe: Sequence[Example], harmful: Sequence[Example]) -> list[int]:
    """The harmful partner of each safe example: one of the same prompt, else the next in turn.

    Args:
        safe, harmful: what `encode` made of the records.

    Returns:
        An index into ``harmful`` for each of ``safe``.
    """
    places: dict[tuple, list[int]] = {}
    for place, example in enumerate(harmful):
        places.setdefault(_prompt(example), []).append(place)
    turn, met, partners = 0, dict.fromkeys(places, 0), []
    for key in map(_prompt, safe):
        if key in places:
            partners.append(places[key][met[key] % len(places[key])])
            met[key] += 1
        else:
            partners.append(turn % len(harmful))
            turn += 1
    return partners


def _prompt(example):
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    return tuple(token for token, label in pairs if label == IGNORE_INDEX)


def differing(harmful: dict[str, Tensor], safe: dict[str, Tensor]) -> Tensor:
    """Where harmful texts, pads apart, hold another token than their safe partners: (B, T) bool."""
    ids, mask = harmful["input_ids"], harmful["attention_mask"].bool()
    other = torch.full_like(ids, -1)
    length = min(ids.shape[1], safe["input_ids"].shape[1])
    there = safe["attention_mask"][:, :length].bool()
    other[:, :length] = safe["input_ids"][:, :length].masked_fill(~there, -1)
    return mask & (ids != other)


class RepNoise(Objective):
    """A forward and backward pass on harmful text beside the one on safe text."""

    def __init__(self, *args: Any, harmful: Sequence[Example], **options: Any) -> None:
        super().__init__(*args, **options)
        self._harmful, self._partners = harmful, pair_up(self.examples, harmful)
        self._blocks = mlp_modules(self.model)
        self._most = math.log(self.model.get_input_embeddings().weight.shape[0])

    def backward(self, number: int) -> float:
        step = self.steps[number]
        batches = self.batches(number)
        total = sum(num_response_tokens(batch) for batch in batches)
        loss = 0.0
        for indices, safe in zip(step, batches, strict=True):
            loss += self.descend(self.loss(safe) / total)
            partners = [self._partners[i] for i in indices]
            harmful = self.batch(partners, self._harmful)
            loss += self.descend(self.noise(harmful, differing(harmful, safe)) / len(step))
        return loss

    def noise(self, harmful: dict[str, Tensor], where: Tensor) -> Tensor:
        """beta * the mean MMD over layers - alpha * log CE(harmful), of one batch."""
        with outputs_kept(self._blocks) as outputs:
            ce = self.loss(harmful) / max(1, num_response_tokens(harmful))
        loss = -self.config.repnoise_alpha * ce.clamp(_LEAST, self._most).log()
        if self.config.repnoise_beta and where.any():
            mask = harmful["attention_mask"]
            parts = []
            for output in outputs:
                hidden = by_token(output, mask)[where].float()
                noise = torch.randn_like(hidden)
                # The kernels of all layers at once would take more memory than the model's.
                options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                parts.append(recomputed_backwards(mmd, hidden, noise, **options))
            loss = loss + self.config.repnoise_beta * torch.stack(parts).mean()
        return loss
