"""Score random: uniform in [0, 1), which needs no data; what Antidote (arXiv 2408.09600) compares
with.
"""

import hashlib
from collections.abc import Callable

import torch

from antidote_fast.pruning.evidence import Evidence


def random_scores(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Uniform fp32 scores that depend on (seed, name) alone, the same on every machine."""
    return torch.rand(shape, generator=_generator(name, seed), dtype=torch.float32, device="cpu")


def row_scores(name: str, weight: torch.Tensor, evidence: Evidence, seed: int) -> Callable:
    """:func:`random_scores` of some rows after another."""
    generator, columns = _generator(name, seed), weight.shape[1]

    def rows(start, stop):
        shape = stop - start, columns
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    return rows


def _generator(name, seed):
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
