"""LDIFS: hold what each MLP puts out near what the aligned model's puts out.

Mukhoti, Gal, Torr and Dokania, "Fine-tuning can cripple your foundation model; preserving features
may be the solution" (arXiv 2308.13320), on the features that the Antidote paper takes. With m_l the
output of the MLP of layer l, m_l^0 the aligned model's for the same tokens, and L layers:

    L = CE + lambda * (1/L) * sum_l mean over tokens and features of (m_l - m_l^0)^2

Pads are not counted, and every layer is. The tokens are those of one optimizer step, so a step of
two batches of b is one of 2b. The aligned model is the base with the adapter switched off, or, in
full tuning, a frozen copy in the dtype that the training computes in.
"""

import copy
from typing import Any

import torch

from antidote_fast.models.blocks import by_token, mlp_modules, outputs_kept
from antidote_fast.models.undo import eval_mode, undoing
from antidote_fast.training.objective import Objective, num_response_tokens


class LDIFS(Objective):
    """One more forward pass a step, without gradients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._blocks = mlp_modules(self.model)
        self._copy = None
        if not hasattr(self.model, "disable_adapter"):  # the decoder alone: no logits are wanted
            decoder = copy.deepcopy(self.model.base_model).requires_grad_(False).eval()
            self._copy = decoder.to(self.dtype or self.model.dtype)

    def backward(self, number: int) -> float:
        batches = self.batches(number)
        total = sum(num_response_tokens(batch) for batch in batches)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            reference = self._features_of_aligned(batch)
            with outputs_kept(self._blocks) as features:
                part = self.loss(batch) / total
            penalty = _squares(features, reference, batch["attention_mask"]) / tokens
            loss += self.descend(part + self.config.ldifs_lambda * penalty)
        return loss

    @torch.no_grad()
    def _features_of_aligned(self, batch):
        if self._copy is not None:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            with outputs_kept(mlp_modules(self._copy)) as features:
                self._copy(**inputs, use_cache=False)
            return features
        # Before the forward pass that is trained: switching an adapter off and on touches it.
        with undoing() as undo:
            eval_mode(self.model, undo)
            with self.model.disable_adapter(), outputs_kept(self._blocks) as features:
                self.hidden(batch)
        return features


def _squares(features, reference, mask):
    """(1/L) * the sum over layers and tokens of the mean over features of squared differences."""
    total = 0.0
    for ours, theirs in zip(features, reference, strict=True):
        away = (by_token(ours, mask).float() - by_token(theirs, mask).float()).square().mean(-1)
        total = total + away.masked_fill(mask == 0, 0).sum()
    return total / len(features)
