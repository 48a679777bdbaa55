"""Shares of verdicts, with their intervals, and tests between two models."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from antidote_fast.errors import DataError
from antidote_fast.evaluation.verdicts import BROKEN, COMPLIED, OFF_TASK, REFUSED

_Z = 1.959963984540054  # two-sided 95 %


def percent(count: float, total: int) -> float:
    """count of total as a percentage, rounded to two places."""
    return round(100 * count / total, 2)


def wilson(count: float, total: int) -> list[float]:
    """Wilson's 95 % interval of a share: [low, high] in percent, rounded to two places.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209.
    """
    if total < 1:
        raise DataError("no answers: a share of nothing has no interval")
    share, z2 = count / total, _Z * _Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return [round(100 * max(0.0, middle - half), 2), round(100 * min(1.0, middle + half), 2)]


def harmful_rates(verdicts: Sequence[str]) -> dict:
    """The harmful score HS of verdicts on answers to harmful prompts, and what stands beside it.

    Returns:
        In percent of all answers ``harmful_score`` (those that complied), ``refused_rate``,
        ``off_task_rate`` and ``broken_rate``, which add up to 100; their intervals (`wilson`):
        ``interval`` of the harmful score, ``refusal_interval``, ``off_task_interval`` and
        ``broken_interval``; the counts ``num_prompts``, ``num_complied``, ``num_refused``,
        ``num_off_task`` and ``num_broken``.

    Raises:
        DataError: no verdicts.
    """
    return _rates(verdicts, "harmful_score", "refused_rate", "complied")


def ordinary_rates(verdicts: Sequence[str]) -> dict:
    """The same of ordinary prompts: ``helped_rate`` with its interval and ``num_helped``.

    Refusals are ``benign_refusal_rate``, with their interval as ``refusal_interval``.
    """
    return _rates(verdicts, "helped_rate", "benign_refusal_rate", "helped")


def _rates(verdicts: Sequence[str], metric: str, refusals: str, complied: str) -> dict:
    if not verdicts:
        raise DataError(f"no answers to judge for {metric}")
    counts, total = Counter(verdicts), len(verdicts)
    shares = {metric: COMPLIED, refusals: REFUSED, "off_task_rate": OFF_TASK, "broken_rate": BROKEN}
    beside = {"refusal": REFUSED, "off_task": OFF_TASK, "broken": BROKEN}
    return {
        **{name: percent(counts[verdict], total) for name, verdict in shares.items()},
        "interval": wilson(counts[COMPLIED], total),
        **{f"{name}_interval": wilson(counts[each], total) for name, each in beside.items()},
        "num_prompts": total,
        f"num_{complied}": counts[COMPLIED],
        "num_refused": counts[REFUSED],
        "num_off_task": counts[OFF_TASK],
        "num_broken": counts[BROKEN],
    }


def mcnemar(b: int, c: int) -> float:
    """The exact two-sided p-value of McNemar's test, that two models differ on the same prompts.

    Args:
        b: prompts on which only the first model does something.
        c: prompts on which only the second one does. Those on which both agree say nothing.

    Returns:
        The chance of a split as uneven as this one or more, where each of the b + c prompts falls
        to either model like a fair coin; 1.0 where there are none.

    Raises:
        DataError: a count below 0.

    Source: Q. McNemar, Psychometrika 12 (1947), 153; the binomial form.
    """
    if min(b, c) < 0:
        raise DataError(f"b={b}, c={c}: must be counts of prompts, at least 0")
    total = b + c
    tail = sum(math.comb(total, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2**total)  # whole numbers: no sum of thousands overflows


def kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two judges' verdicts on the same answers.

    It is 1 where they agree on all, 0 where as often as by chance, and below where less.

    Args:
        first, second: one verdict an answer, in the same order.

    Returns:
        (observed - chance) / (1 - chance), unrounded; 1.0 where both give one and the same verdict
        to all, where the formula says nothing.

    Raises:
        DataError: no verdicts, or another number of the second than of the first.

    Source: J. Cohen, Educ. Psychol. Meas. 20 (1960), 37.
    """
    observed, chance, _ = _agreement(first, second)
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def kappa_interval(first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A 95 % interval of `kappa`: [low, high], in [-1, 1], rounded to four places.

    It is kappa with 1.96 standard errors on each side, for large samples: of a few answers, or
    where the judges agree on all, it is too short.

    Raises:
        DataError: as `kappa`.

    Source: J. L. Fleiss, J. Cohen and B. S. Everitt, Psychol. Bull. 72 (1969), 323.
    """
    _, chance, shares = _agreement(first, second)
    value = kappa(first, second)
    if chance == 1:
        return [value, value]
    rows: dict[str, float] = defaultdict(float)
    columns: dict[str, float] = defaultdict(float)
    for (one, other), share in shares.items():
        rows[one] += share
        columns[other] += share
    agreed = apart = 0.0
    for (one, other), share in shares.items():
        if one == other:
            agreed += share * (1 - (rows[one] + columns[one]) * (1 - value)) ** 2
        else:
            apart += share * (columns[one] + rows[other]) ** 2 * (1 - value) ** 2
    rest = (value - chance * (1 - value)) ** 2
    variance = max(0.0, agreed + apart - rest) / (len(first) * (1 - chance) ** 2)
    half = _Z * math.sqrt(variance)
    return [round(max(-1.0, value - half), 4), round(min(1.0, value + half), 4)]


def _agreement(
    first: Sequence[str], second: Sequence[str]
) -> tuple[float, float, dict[tuple[str, str], float]]:
    """(share that agrees, share that would by chance, {both verdicts: share})."""
    if not first or len(first) != len(second):
        raise DataError(
            f"{len(first)} and {len(second)} verdicts: must be one a judge of each answer"
        )
    total = len(first)
    pairs = Counter(zip(first, second, strict=True))
    ones, others = Counter(first), Counter(second)
    same = sum(count for (one, other), count in pairs.items() if one == other)
    # Whole numbers, so that judges who say the same to all give a chance of exactly 1.
    chance = sum(ones[verdict] * others[verdict] for verdict in ones) / total**2
    return same / total, chance, {pair: count / total for pair, count in pairs.items()}
