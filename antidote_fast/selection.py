"""A Selection says how many weights are removed, and where; here a ratio becomes a count."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from antidote_fast.errors import UsageError

SCOPES = ("row", "tensor", "global")


@dataclass(frozen=True)
class Selection:
    """What is to be removed from a weight of shape (out_features, in_features).

    Args:
        ratio: the fraction removed, in [0, 1]. It may be left out where ``n_m`` says it.
        largest: True removes the highest scores (Antidote), False the lowest (Wanda).
        scope: ``"row"`` compares the scores of each output row, ``"tensor"`` those of one weight,
            ``"global"`` those of the list given to :func:`antidote_fast.prune_many_`.
        n_m: ``(n, m)`` removes n of each m consecutive columns; it needs row scope.
        preserve_ratio: the fraction protected where a ``preserve_norm`` is given; by default it is
            ``ratio``.
        score_delta: scores ``|weight - base_weight|`` instead of ``|weight|``.

    Raises:
        TypeError: an argument of another type, naming it, its value and what is accepted.
        ValueError: an argument out of range, likewise.
    """

    ratio: float | None = None
    largest: bool = field(default=True, kw_only=True)
    scope: str = field(default="row", kw_only=True)
    n_m: tuple[int, int] | None = field(default=None, kw_only=True)
    preserve_ratio: float | None = field(default=None, kw_only=True)
    score_delta: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("largest", "score_delta"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        if not isinstance(self.scope, str) or self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r}: must be one of {', '.join(SCOPES)}")
        for name in ("ratio", "preserve_ratio"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _checked_fraction(name, value))
        if self.n_m is not None:
            self._check_n_m()
        elif self.ratio is None:
            raise ValueError("ratio=None: must be a number in [0, 1] unless n_m is given")

    def _check_n_m(self) -> None:
        pair = self.n_m
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"n_m={pair!r}: must be a pair of integers (n, m)")
        if any(isinstance(v, bool) or not isinstance(v, Integral) for v in pair):
            raise TypeError(f"n_m={pair!r}: must be a pair of integers (n, m)")
        n, m = (int(v) for v in pair)
        if not (m >= 1 and 0 <= n <= m):
            raise ValueError(f"n_m={pair!r}: must satisfy 0 <= n <= m and m >= 1")
        object.__setattr__(self, "n_m", (n, m))
        if self.scope != "row":
            raise ValueError(f"n_m={pair!r} with scope={self.scope!r}: n_m needs scope='row'")
        if self.ratio is not None and not math.isclose(self.ratio, n / m, rel_tol=1e-9):
            raise ValueError(
                f"ratio={self.ratio!r} with n_m={pair!r}: must be None or n/m = {n / m}"
            )
        if self.preserve_ratio is not None:
            raise ValueError(f"preserve_ratio={self.preserve_ratio!r}: not accepted with n_m")

    @property
    def preserve(self) -> "Selection":
        """The Selection of what is protected: the top ``preserve_ratio``, in the same scope."""
        ratio = self.ratio if self.preserve_ratio is None else self.preserve_ratio
        return Selection(ratio, scope=self.scope, score_delta=self.score_delta)


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return the seed as an int.

    Raises:
        UsageError: it is no integer in [0, 2**64), which is what torch takes.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 1 << 64:
        shown = repr(seed) if not isinstance(seed, int) or abs(seed) < 10**40 else "a larger number"
        raise UsageError(f"{name}={shown:.80}: must be an integer in [0, 2**64)")
    return int(seed)


def _checked_fraction(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: must be a number in [0, 1]")
    value = float(value)
    if not 0.0 <= value <= 1.0:  # NaN fails here too
        raise ValueError(f"{name}={value!r}: must be in [0, 1]")
    return value


def num_pruned(n: int, selection: Selection) -> int:
    """Return how many of ``n`` compared weights a selection removes.

    ``largest=True`` gives ``n - int(n * (1 - ratio))``, at least 1 when ratio > 0 and n > 0 (the
    official Antidote code); ``largest=False`` gives ``int(n * ratio)`` (the official Wanda code).
    With ``n_m`` it is the count along a row of n columns. The arithmetic is that of Python floats:
    (10, 0.8) gives 9.
    """
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 0:
        raise ValueError(f"n={n!r}: must be an integer >= 0")
    n = int(n)
    if selection.n_m is not None:
        removed, group = selection.n_m
        tail = n % group
        return removed * (n // group) + tail * removed // group
    if not selection.largest:
        return int(n * selection.ratio)
    count = n - int(n * (1 - selection.ratio))
    if selection.ratio > 0 and n > 0:
        count = max(count, 1)
    return count
