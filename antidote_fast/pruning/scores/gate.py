"""Score gate: ``1 - m``, the learned gate of each weight, as it is given.

:mod:`antidote_fast.stages.gates.learn` learns them; the report and its docstring say how.
"""

import math
from collections.abc import Callable

import torch

from antidote_fast.errors import DataError
from antidote_fast.pruning.evidence import Evidence, beside


def row_scores(name: str, weight: torch.Tensor, evidence: Evidence, seed: int) -> Callable:
    """Rows of ``evidence.scores[name]``.

    Raises:
        DataError: no such matrix, or one that no order can be read from.
    """
    accepted = f"torch.float32 {tuple(weight.shape)}"
    scores = beside("scores", evidence.scores, name, [torch.float32], weight, accepted)
    if scores.numel():
        low, high = (bound.item() for bound in torch.aminmax(scores))
        if not (low >= 0 and math.isfinite(high)):  # NaN fails here too
            raise DataError(f"{name}: its scores must be finite and at least 0")
    return lambda start, stop: scores[start:stop].contiguous()
