"""Score random: uniform in [0, 1), which needs no data; what Antidote (arXiv 2408.09600) compares
with.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from antidote_fast.pruning.evidence import Evidence


def row_scores(name: str, weight: torch.Tensor, evidence: Evidence, seed: int) -> Callable:
    """Uniform scores that depend on (seed, name) alone, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    columns = weight.shape[1]
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    return lambda start, stop: torch.rand(stop - start, columns, **options)
