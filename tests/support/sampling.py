"""Which cases run: all of them with ``pytest --whole`` (make test-all), else a fixed few.

What is left out is not made at all, rather than skipped.
"""

import itertools
import random

WHOLE = False  # set by conftest.py before it imports a test


def sample(cases, count):
    """The first, the last and others of the cases, ``count`` in all and always the same."""
    cases = list(cases)
    if WHOLE or len(cases) <= count:
        return cases
    inner = random.Random(0).sample(range(1, len(cases) - 1), count - 2)
    return [cases[i] for i in (0, *sorted(inner), len(cases) - 1)]


def pairs(*axes):
    """So many cases of a product that every two values of two axes meet in one of them."""
    product = list(itertools.product(*axes))
    if WHOLE:
        return product
    axes_of_two = list(itertools.combinations(range(len(axes)), 2))

    def met(case):
        return {(i, j, case[i], case[j]) for i, j in axes_of_two}

    to_meet = set().union(*map(met, product))
    chosen = []
    while to_meet:
        chosen.append(max(product, key=lambda case: len(met(case) & to_meet)))
        to_meet -= met(chosen[-1])
    return chosen


def examples(whole, few):
    """How many examples a property gets."""
    return whole if WHOLE else few
