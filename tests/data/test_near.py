"""Near prompts: what counts as near, and splits in which none of them is apart from its like."""

import importlib.util
import itertools
import random
import subprocess
import sys

import pytest

from antidote_fast.data.load import load_records
from antidote_fast.data.near import NEAR_PERCENT, near_groups, split_sets, without_near
from antidote_fast.data.prompt_sets import PROMPT_SETS
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError

WORDS = ["write", "plan", "bake", "sing", "paint", "build", "letter", "garden", "window", "summer"]


def records_of(*texts):
    return [Record(text) for text in texts]


def made(count, seed=0, words=WORDS):
    """Prompts of 6 words, some of them near to others."""
    rng = random.Random(seed)
    return [Record(" ".join(rng.choices(words, k=6))) for _ in range(count)]


def grams(text):
    text = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.casefold()).split())} "
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def near(a, b):
    """The definition, pair by pair."""
    a, b = grams(a.instruction), grams(b.instruction)
    return 100 * len(a & b) >= NEAR_PERCENT * len(a | b)


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("How do I do the bad thing?", "how do i DO the bad thing", True),
        ("How do I do the bad thing?", "How do I do the bad thing!  ", True),
        ("How do I do the bad thing?", "How do I do the bad thing, now?", True),
        ("Write a plan for the bad thing", "Write a good plan for the bad thing", True),
        ("How do I do the bad thing?", "How do I bake a good cake?", False),
        ("How do I do the bad thing?", "What is the capital of France?", False),
        ("\uff57\uff49\uff44\uff45 letters", "wide letters", True),
        ("Straße", "STRASSE", True),
        ("?", "!", False),
        ("?", " ?", True),
        ("a", "A.", True),
        ("a", "b", False),
    ],
)
def test_two_prompts(one, other, together):
    groups = near_groups(records_of(one, other))
    assert groups == ([0, 0] if together else [0, 1])
    kept, num_dropped = without_near(records_of(one), records_of(other))
    assert (kept, num_dropped) == (([], 1) if together else (records_of(one), 0))


@pytest.mark.parametrize("size", [20, 100])
def test_the_bound_is_exact(size):
    """55 % of the grams are near, and one less are not; 0.55 * 100 is above 55 as a float."""
    rng = random.Random(0)
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=size + 1))
    whole = size * NEAR_PERCENT // 100
    for shared, groups in ((whole, [0, 0]), (whole - 1, [0, 1])):
        # With the blanks around it, a text of n letters has n - 2 grams.
        first = letters[: shared + 2]
        both = f"{first} {letters[shared + 2 : size + 1]}"
        assert len(grams(first)) == len(grams(first) & grams(both)) == shared
        assert len(grams(both)) == size
        assert near_groups(records_of(first, both)) == groups
        assert near_groups(records_of(both, first)) == groups


def test_groups_follow_the_definition():
    """A group is what is reached from near to near; numbers count from the first."""
    records = made(300)
    groups = near_groups(records)
    expected = list(range(len(records)))
    for i, j in itertools.combinations(range(len(records)), 2):
        if near(records[i], records[j]) and expected[i] != expected[j]:
            low, high = sorted((expected[i], expected[j]))
            expected = [low if number == high else number for number in expected]
    order = list(dict.fromkeys(expected))
    assert groups == [order.index(number) for number in expected]
    assert 30 < len(order) < 290
    assert max(map(groups.count, groups)) > 2


def test_without_near_follows_the_definition():
    records, others = made(150, seed=1), made(150, seed=2)
    kept, num_dropped = without_near(records, others)
    assert kept == [r for r in records if not any(near(r, other) for other in others)]
    assert num_dropped == len(records) - len(kept)
    assert 10 < num_dropped < 140
    # Those near to each other stay.
    assert len(set(near_groups(kept))) < len(kept)
    assert without_near(records, []) == (records, 0)
    assert without_near([], others) == ([], 0)
    assert near_groups([]) == []


def test_records_of_one_task():
    """They share an instruction and are no copies; nor are those of two tasks with one input."""
    task = "Analyze the sentiment of the input, and respond only positive or negative"
    inputs = ("A fine film.", "Nobody laughed at all", "a fine film!")
    records = [Record(task, text) for text in inputs]
    assert near_groups(records) == [0, 1, 0]
    assert near_groups([*records, Record("Count the words", inputs[0]), Record(task)]) == [
        0,
        1,
        0,
        2,
        3,
    ]


# --- splits ---------------------------------------------------------------------------------------


def distinct(count, seed):
    rng = random.Random(seed)
    return [Record("".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=40))) for _ in range(count)]


def sets_of_three():
    a, b, c = (distinct(count, seed) for seed, count in enumerate((40, 20, 100)))
    twins = [Record(f"{record.instruction}!") for record in a[:10]]
    return {"a": [*a, *a[:3]], "b": [*twins, *b], "c": [*c, b[0], *twins]}


def everything(parts):
    return [r for part in parts.values() for records in part.values() for r in records]


def test_split_of_sets():
    sets = sets_of_three()
    parts = split_sets(sets, {"choose": 0.25, "test": 0.5}, seed=3)
    sizes = {part: {name: len(found) for name, found in of.items()} for part, of in parts.items()}
    assert sizes == {
        "choose": {"a": 10, "b": 5, "c": 25},
        "test": {"a": 20, "b": 10, "c": 50},
    }
    assert list(parts) == ["choose", "test"]
    assert list(parts["test"]) == ["a", "b", "c"]
    # No prompt is near to another, in its part or in any.
    assert len(set(near_groups(everything(parts)))) == len(everything(parts))
    for name, records in sets.items():
        for part in parts.values():
            places = [records.index(record) for record in part[name]]
            assert places == sorted(places)
    assert not any(record.instruction.endswith("!") for record in everything(parts))


def test_the_first_of_a_group_is_kept():
    sets = sets_of_three()
    whole = split_sets({"b": sets["b"], "a": sets["a"]}, {"all": 1.0})["all"]
    assert whole["b"] == sets["b"]
    assert whole["a"] == sets["a"][10:40]


def test_splits_are_repeated():
    sets, fractions = sets_of_three(), {"choose": 0.3, "test": 0.7}
    parts = split_sets(sets, fractions, seed=5)
    assert split_sets(sets, fractions, seed=5) == parts
    assert split_sets(sets, fractions, seed=6) != parts
    # A set that comes later changes nothing of those before it.
    fewer = split_sets({name: sets[name] for name in ("a", "b")}, fractions, seed=5)
    for part in fractions:
        assert fewer[part] == {name: parts[part][name] for name in ("a", "b")}


def test_another_process_splits_alike():
    """The order of a Python set of texts changes from process to process."""
    code = (
        "import random\n"
        "from antidote_fast.data.near import split_sets\n"
        "from antidote_fast.data.records import Record\n"
        f"rng, words = random.Random(0), {WORDS!r}\n"
        "many = [Record(' '.join(rng.choices(words, k=6))) for _ in range(120)]\n"
        "a, b = many[:60], many[60:]\n"
        "parts = split_sets({'a': a, 'b': b}, {'x': 0.5, 'y': 0.5})\n"
        "print([r.instruction for p in parts.values() for s in p.values() for r in s])\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert len(told.pop()) > 100


def test_refused_splits():
    sets = sets_of_three()
    for fractions in ({}, {"a": 0.0, "b": 0.5}, {"a": 0.7, "b": 0.7}):
        with pytest.raises(UsageError, match="fractions="):
            split_sets(sets, fractions)
    with pytest.raises(UsageError, match="seed"):
        split_sets(sets, {"a": 0.5}, seed=-1)
    copies = sets | {"d": sets["a"][:7]}
    with pytest.raises(DataError, match="d: of 7 records 0 distinct prompts are too few"):
        split_sets(copies, {"a": 0.5})


def test_progress_is_told():
    told = []

    def progress(iterable, what, total):
        told.append((what, total))
        return iterable

    near_groups(made(4), progress=progress)
    without_near(made(4), made(3), progress=progress)
    split_sets({"a": distinct(5, 0)}, {"x": 1.0}, progress=progress)
    assert told == [("compare prompts", 4), ("compare prompts", 7), ("compare prompts", 5)]


def test_the_real_sets():
    """What they share, as docs/prompt-sets.md says it."""
    names = ("do-not-answer", "harmbench", "strongreject", "advbench")
    for known in map(PROMPT_SETS.get, names):
        if importlib.util.find_spec(known.package) is None:
            pytest.skip(f"{known.package} is not installed: {known.pip}")
    sets = {name: load_records(name) for name in names}
    shared = {
        (a, b): without_near(sets[b], sets[a])[1] for a, b in itertools.combinations(names, 2)
    }
    assert shared == {
        ("do-not-answer", "harmbench"): 0,
        ("do-not-answer", "strongreject"): 1,
        ("do-not-answer", "advbench"): 1,
        ("harmbench", "strongreject"): 0,
        ("harmbench", "advbench"): 1,
        ("strongreject", "advbench"): 27,
    }
    whole = split_sets(sets, {"all": 1.0})["all"]
    assert [len(whole[name]) for name in names] == [401, 187, 312, 405]
