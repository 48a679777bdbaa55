"""Lisa: take turns between the user's data and safe data, held near where the other one ended.

Huang, Hu, Ilhan, Tekin and Liu, "Lisa: Lazy Safety Alignment for Large Language Models against
Harmful Fine-tuning Attack" (arXiv 2405.18641), algorithm 1. K1 steps of alignment and K2 on the
user's data follow each other, alignment first:

    alignment:  L_safe(w) + rho / 2 * ||w - w_user||^2
    user:       L_user(w) + rho / 2 * ||w - w_align||^2

over the trainable weights w; w_user and w_align are those at the end of the other state's last
phase. The first tenth of the steps has no proximal term. A run has as many steps as without Lisa;
user data come in the order of plain fine-tuning, of which the last part is not reached. K1 and K2
are scaled down together so that a short run has five rounds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from antidote_fast.training.objective import Example, Objective, plan_steps

MIN_ROUNDS = 5
WARMUP = 0.1  # share of the steps without a proximal term


def phases(num_steps: int, alignment_steps: int, finetune_steps: int) -> list[bool]:
    """Which of ``num_steps`` steps are alignment's.

    A round keeps the ratio of the two as well as whole steps allow, at least one of each.
    """
    whole = alignment_steps + finetune_steps
    length = min(whole, max(2, num_steps // MIN_ROUNDS))
    alignment = min(length - 1, max(1, round(length * alignment_steps / whole)))
    return [number % length < alignment for number in range(num_steps)]


class Lisa(Objective):
    """Two anchors, each a copy of the trainable weights, beside what plain fine-tuning holds."""

    def __init__(self, *args: Any, safe: Sequence[Example], **options: Any) -> None:
        super().__init__(*args, **options)
        self._safe = safe
        user, config = self.steps, self.config
        self.is_alignment = phases(
            len(user), config.lisa_alignment_steps, config.lisa_finetune_steps
        )
        size = config.batch_size * config.gradient_accumulation_steps
        epochs = sum(self.is_alignment) * size / len(safe) + 1
        turns = {True: iter(plan_steps(safe, config, epochs)), False: iter(user)}
        self.steps = [next(turns[state]) for state in self.is_alignment]
        start = [p.detach().clone() for p in self.parameters]
        #: the weights at the end of the last phase of alignment (True) and on user data (False)
        self.anchors = {True: start, False: [value.clone() for value in start]}

    def batches(self, number: int) -> list[dict[str, Tensor]]:
        examples = self._safe if self.is_alignment[number] else self.examples
        return [self.batch(indices, examples) for indices in self.steps[number]]

    def backward(self, number: int) -> float:
        return super().backward(number) + self.pull(number)

    @torch.no_grad()
    def pull(self, number: int) -> float:
        """Add the proximal term's gradient rho * (w - anchor); returns the term."""
        rho = self.config.lisa_rho
        if number < WARMUP * len(self.steps) or rho == 0:
            return 0.0
        squares = 0.0
        for p, anchor in zip(
            self.parameters, self.anchors[not self.is_alignment[number]], strict=True
        ):
            away = p - anchor
            squares += float(away.float().square().sum())
            p.grad = rho * away if p.grad is None else p.grad.add_(away, alpha=rho)
        return rho / 2 * squares

    def after(self, number: int) -> None:
        state = self.is_alignment[number]
        if number + 1 == len(self.steps) or self.is_alignment[number + 1] != state:
            self.anchors[state] = [p.detach().clone() for p in self.parameters]

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{i}": value
            for name, state in (("align", True), ("user", False))
            for i, value in enumerate(self.anchors[state])
        }

    def load_state(self, state: dict[str, Tensor], number: int) -> None:
        for name, which in (("align", True), ("user", False)):
            self.anchors[which] = [
                state[f"{name}.{i}"].to(p.device) for i, p in enumerate(self.parameters)
            ]
