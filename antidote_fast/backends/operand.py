"""One weight of a call with what belongs to it: what every backend prunes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False, slots=True)
class Operand:
    """A weight and what belongs to it; None where absent.

    Args:
        weight: (N, K) bf16, fp16 or fp32, or a matrix of scores.
        act_norm: (K,) fp32.
        preserve_norm: (K,) fp32; of what ranks high by it, nothing is removed.
        base_weight: a matrix like weight, whose bits removed weights take.
        bits: a zeroed uint8 mask (N, ceil(K/8)) to fill.
        thresholds: (N,) fp32, NaN, to fill with the score at the edge of the selection (the
            smallest removed where largest, else the largest removed; NaN where there is none).
    """

    weight: Tensor
    act_norm: Tensor | None = None
    preserve_norm: Tensor | None = None
    base_weight: Tensor | None = None
    bits: Tensor | None = None
    thresholds: Tensor | None = None
