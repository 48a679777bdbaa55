"""Selection and num_pruned: the counts of the official codes, and what is refused."""

import dataclasses

import pytest

from antidote_fast import Selection, num_pruned


@pytest.mark.parametrize(
    ("n", "ratio", "expected"),
    [
        (4096, 0.05, 205),
        (4096, 0.1, 410),
        (4096, 0.2, 820),
        (256, 0.05, 13),
        (256, 0.1, 26),
        (256, 0.2, 52),
        (10, 0.8, 9),  # Python floats: 10 * (1 - 0.8) is 1.9999999999999996
        (10, 0.9, 10),
        (1000, 0.9, 901),
        (100, 1e-6, 1),
        (0, 0.5, 0),
        (7, 0, 0),
        (7, 1, 7),
    ],
)
def test_largest_counts_as_the_official_antidote_code(n, ratio, expected):
    assert num_pruned(n, Selection(ratio)) == expected


@pytest.mark.parametrize(
    ("n", "ratio", "expected"), [(4096, 0.05, 204), (10, 0.8, 8), (7, 1, 7), (9, 0.1, 0)]
)
def test_smallest_counts_as_the_official_wanda_code(n, ratio, expected):
    assert num_pruned(n, Selection(ratio, largest=False)) == expected


@pytest.mark.parametrize(
    ("n", "n_m", "expected"), [(8, (2, 4), 4), (11, (2, 4), 5), (3, (1, 4), 0), (3, (3, 4), 2)]
)
def test_groups_count_a_short_tail_in_proportion(n, n_m, expected):
    assert num_pruned(n, Selection(n_m=n_m)) == expected


def test_num_pruned_refuses_a_negative_count():
    with pytest.raises(ValueError, match="n=-1"):
        num_pruned(-1, Selection(0.1))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "ratio=None"),
        ({"ratio": 1.5}, ValueError, "ratio=1.5"),
        ({"ratio": -0.1}, ValueError, "ratio=-0.1"),
        ({"ratio": float("nan")}, ValueError, "ratio=nan"),
        ({"ratio": "0.1"}, TypeError, "ratio='0.1'"),
        ({"ratio": True}, TypeError, "ratio=True"),
        ({"ratio": 0.1, "scope": "column"}, ValueError, "scope='column'"),
        ({"ratio": 0.1, "largest": 1}, TypeError, "largest=1"),
        ({"ratio": 0.1, "score_delta": None}, TypeError, "score_delta=None"),
        ({"ratio": 0.1, "preserve_ratio": 2}, ValueError, "preserve_ratio=2"),
        ({"n_m": (2, 4), "scope": "tensor"}, ValueError, "needs scope='row'"),
        ({"n_m": (5, 4)}, ValueError, "0 <= n <= m"),
        ({"n_m": (0, 0)}, ValueError, "m >= 1"),
        ({"n_m": (1.0, 2)}, TypeError, "pair of integers"),
        ({"n_m": 2}, TypeError, "pair of integers"),
        ({"n_m": (2, 4), "ratio": 0.4}, ValueError, "must be None or n/m"),
        ({"n_m": (2, 4), "preserve_ratio": 0.1}, ValueError, "not accepted with n_m"),
    ],
)
def test_selection_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        Selection(**kwargs)


def test_selection_is_a_frozen_value():
    selection = Selection(0.1, scope="tensor")
    assert selection == Selection(0.1, scope="tensor")
    assert Selection(0.5, n_m=[2, 4]).n_m == (2, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        selection.ratio = 0.2


def test_what_is_preserved_is_the_top_whatever_is_removed():
    selection = Selection(0.1, largest=False, preserve_ratio=0.3, scope="tensor")
    assert selection.preserve == Selection(0.3, scope="tensor")
    assert Selection(0.1).preserve == Selection(0.1)
