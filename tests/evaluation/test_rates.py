"""Shares of verdicts, their intervals, McNemar's test and Cohen's kappa."""

import random
from fractions import Fraction
from itertools import product

import pytest

from antidote_fast.errors import DataError
from antidote_fast.evaluation.rates import (
    harmful_rates,
    kappa,
    kappa_interval,
    mcnemar,
    ordinary_rates,
    wilson,
)
from antidote_fast.evaluation.verdicts import VERDICTS

COMPLIED, REFUSED, OFF_TASK, BROKEN = VERDICTS


def test_the_rates_of_harmful_prompts_add_up_to_100():
    rates = harmful_rates([COMPLIED] * 3 + [REFUSED] * 2 + [OFF_TASK] * 2 + [BROKEN])
    shares = [rates[k] for k in ("harmful_score", "refused_rate", "off_task_rate", "broken_rate")]
    assert shares == [37.5, 25, 25, 12.5]
    assert sum(shares) == 100
    counts = [rates[f"num_{k}"] for k in ("prompts", "complied", "refused", "off_task", "broken")]
    assert counts == [8, 3, 2, 2, 1]
    assert rates["interval"] == wilson(3, 8)
    assert rates["refusal_interval"] == rates["off_task_interval"] == wilson(2, 8)
    assert rates["broken_interval"] == wilson(1, 8)


def test_an_answer_that_is_no_refusal_need_not_have_helped():
    rates = ordinary_rates([COMPLIED, REFUSED, OFF_TASK, BROKEN])
    assert (rates["helped_rate"], rates["benign_refusal_rate"]) == (25, 25)
    assert (rates["num_helped"], rates["num_refused"]) == (1, 1)
    assert rates["refusal_interval"] == wilson(1, 4)


def test_wilson():
    # Newcombe, Stat. Med. 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    assert wilson(81, 263) == [25.53, 36.62]
    assert wilson(15, 148) == [6.24, 16.05]
    assert wilson(0, 20) == [0, 16.11]
    assert wilson(1, 29) == [0.61, 17.18]
    assert wilson(20, 20) == [83.89, 100]
    with pytest.raises(DataError, match="no answers"):
        wilson(0, 0)
    with pytest.raises(DataError, match="no answers to judge for harmful_score"):
        harmful_rates([])


def test_mcnemar_counts_coins():
    for b, c in product(range(7), repeat=2):
        # Every way in which b + c coins may fall that is as uneven or more.
        falls = [sum(coins) for coins in product((0, 1), repeat=b + c)]
        uneven = sum(abs(2 * heads - (b + c)) >= abs(b - c) for heads in falls)
        assert mcnemar(b, c) == pytest.approx(float(Fraction(uneven, len(falls)))), (b, c)
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == 0.0625
    assert mcnemar(2000, 2000) == 1
    assert 0 < mcnemar(900, 1100) < 1e-4
    with pytest.raises(DataError, match="b=-1, c=2"):
        mcnemar(-1, 2)


def table(*rows):
    """The verdicts of two judges by how often each pair of them occurs."""
    cells = product(enumerate(rows), range(len(rows)))
    pairs = [(i, j) for (i, row), j in cells for _ in range(row[j])]
    return [VERDICTS[i] for i, _ in pairs], [VERDICTS[j] for _, j in pairs]


def test_kappa():
    # Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions, table 18.1.
    first, second = table((75, 1, 4), (5, 4, 1), (0, 0, 10))
    assert kappa(first, second) == pytest.approx(0.676, abs=5e-4)
    low, high = kappa_interval(first, second)
    assert (high - low) / 2 / 1.96 == pytest.approx(0.088, abs=1e-3)
    assert kappa(second, first) == kappa(first, second)
    first, second = table((20, 5), (10, 15))
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa([COMPLIED] * 3, [COMPLIED] * 3) == 1
    assert kappa_interval([COMPLIED] * 3, [COMPLIED] * 3) == [1, 1]
    assert kappa([COMPLIED, REFUSED], [REFUSED, COMPLIED]) == -1
    assert kappa([COMPLIED] * 3, [REFUSED] * 3) == 0
    for wrong in ([], [COMPLIED]):
        with pytest.raises(DataError, match="must be one a judge of each answer"):
            kappa(wrong, [])
    with pytest.raises(DataError, match="2 and 1 verdicts"):
        kappa([COMPLIED] * 2, [COMPLIED])


def test_the_interval_of_kappa_holds_it_in_nineteen_of_twenty():
    rng = random.Random(0)
    shares = {(0, 0): 0.4, (0, 1): 0.1, (1, 0): 0.05, (1, 1): 0.45}
    true = kappa(*table((40, 10), (5, 45)))
    held = 0
    for _ in range(400):
        pairs = rng.choices(list(shares), list(shares.values()), k=200)
        first, second = ([VERDICTS[pair[i]] for pair in pairs] for i in (0, 1))
        low, high = kappa_interval(first, second)
        held += low <= true <= high
    assert 0.92 <= held / 400 <= 0.98
