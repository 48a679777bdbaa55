"""Vaccine: align under the worst small shift of what attention puts out.

Huang, Hu and Liu, "Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful
Fine-tuning" (arXiv 2402.01109), algorithm 1. With e_l the output of attention block l before the
residual and L the loss of one optimizer step:

    g_l   = dL / de_l
    eps_l = rho * g_l / (||(g_1, ..., g_L)||_2 + 1e-7)
    step on the gradient of L with e_l + eps_l in place of e_l, eps_l held constant

The norm is one number over all layers, sequences and tokens of the optimizer step, so a step of two
batches of b is one of 2b; pads are neither counted nor shifted. The first pass takes gradients of
the e_l alone, none of a parameter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from antidote_fast.models.blocks import attention_modules, by_token, outputs_seen
from antidote_fast.training.objective import Objective, num_response_tokens

_TINY = 1e-7


class Vaccine(Objective):
    """Two passes a step; what is held between them is one gradient a token and layer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._blocks = attention_modules(self.model)

    def backward(self, number: int) -> float:
        batches = self.batches(number)
        total = sum(num_response_tokens(batch) for batch in batches)
        shifts = self.shifts(batches, total)
        loss = 0.0
        for batch, shift in zip(batches, shifts, strict=True):
            with outputs_seen(
                self._blocks, lambda block, output, shift=shift: output + shift[block]
            ):
                part = self.loss(batch) / total
            loss += self.descend(part)
        return loss

    def shifts(self, batches: Sequence[dict[str, Tensor]], total: int) -> list[list[Tensor]]:
        """eps of each batch and block, in the shape and dtype of the block's output."""
        gradients = [self._gradients(batch, total) for batch in batches]
        squares = sum(g.float().square().sum() for each in gradients for g in each)
        scale = self.config.vaccine_rho / (squares.sqrt() + _TINY)
        return [[(scale * g).to(g.dtype) for g in each] for each in gradients]

    def _gradients(self, batch, total):
        outputs = []

        def see(block, output):
            # Below the first trained weight nothing has a gradient yet.
            changed = None if output.requires_grad else output.detach().requires_grad_()
            outputs.append(output if changed is None else changed)
            return changed

        with outputs_seen(self._blocks, see):
            loss = self.loss(batch) / total
        pads = ~batch["attention_mask"].bool()
        gradients = torch.autograd.grad(loss, outputs)
        return [
            by_token(g, pads).masked_fill(pads[..., None], 0).reshape(g.shape) for g in gradients
        ]
