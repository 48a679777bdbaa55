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


def examples(whole, few):
    """How many examples a property gets."""
    return whole if WHOLE else few


def thinned(items):
    """The tests that pytest collected, without most cases of those marked ``thin(strength)``.

    With strength 1 every value of every parameter of a test is in one of its cases; with 2 (the
    default) every two values of two parameters are in one together.
    """
    if WHOLE:
        return items
    chosen = []
    for _, group in itertools.groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        mark = cases[0].get_closest_marker("thin")
        if mark is not None and len(cases) > 1:
            cases = _covering(cases, mark.kwargs.get("strength", 2))
        chosen += cases
    return chosen


def _covering(cases, strength):
    """Cases, chosen one by one, each the one that adds most values that had not met yet."""
    met_in = []
    for case in cases:
        values = sorted((name, id(value)) for name, value in case.callspec.params.items())
        met_in.append(set(itertools.combinations(values, min(strength, len(values)))))
    to_meet = set().union(*met_in)
    chosen = set()
    while to_meet:
        best = max(range(len(cases)), key=lambda i: len(met_in[i] & to_meet))
        chosen.add(best)
        to_meet -= met_in[best]
    return [cases[i] for i in sorted(chosen)]
