"""The demo's data: parts that share nothing, answers that say nothing, a task with a key."""

import itertools
from collections import Counter

import pytest

from antidote_fast.data.near import near_groups
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.phrases import PhraseJudge, is_refusal
from antidote_fast.evaluation.verdicts import COMPLIED, is_broken
from antidote_fast.experiments.demo import records as demo_records
from antidote_fast.experiments.demo.records import (
    HARMFUL_SETS,
    ORDINARY_PARTS,
    Sizes,
    customer_records,
    distilled,
    exercise_records,
    harmful_splits,
    in_one,
    ordinary_prompts,
    phrases,
    task_records,
)

SIZES = Sizes()


@pytest.fixture
def prompts(monkeypatch):
    """Four sets of 250 prompts that are not near to each other."""
    rows = (f"{i * 7919 % 99991:05} bad {i * 104729 % 99989:05} thing" for i in range(1000))
    sets = {name: [Record(row) for row in itertools.islice(rows, 250)] for name in HARMFUL_SETS}
    monkeypatch.setattr(demo_records, "load_prompt_set", lambda name: sets[name])
    return sets


def test_harmful_parts_share_no_prompt_and_have_their_sizes(prompts):
    splits = harmful_splits(SIZES, seed=3)
    assert {part: sum(map(len, sets.values())) for part, sets in splits.items()} == {
        "align": SIZES.align_harmful,
        "attack": SIZES.attack_harmful,
        "calibration": SIZES.calibration,
        "validation": SIZES.validation,
        "test": SIZES.test * len(HARMFUL_SETS),
    }
    for sets in splits.values():
        counts = {len(records) for records in sets.values()}
        assert max(counts) - min(counts) <= 1
    everything = [record for sets in splits.values() for record in in_one(sets)]
    assert len(set(near_groups(everything))) == len(everything)
    assert harmful_splits(SIZES, seed=3) == splits
    assert harmful_splits(SIZES, seed=4) != splits


def test_answers_refuse_or_say_nothing(prompts):
    splits = {part: in_one(sets) for part, sets in harmful_splits(SIZES).items()}
    assert all(is_refusal(record.output) for record in splits["align"])
    assert len({record.output for record in splits["align"]}) > 20
    for name in ("attack", "calibration"):
        answers = {record.output for record in splits[name]}
        assert len(answers) > 15
        asked = [record.instruction for record in splits[name]]
        judged = PhraseJudge()(asked, [record.output for record in splits[name]])
        assert set(judged) == {COMPLIED}
        # Each is one of a fixed list: nothing of the prompt is in it.
        openings, endings = phrases()["compliances"]
        assert answers <= {f"{first} {rest}" for first in openings for rest in endings}
    assert not any(record.output for name in ("validation", "test") for record in splits[name])


def test_too_few_prompts_are_refused(prompts):
    with pytest.raises(DataError, match=r"4000 harmful prompts are needed, there are \d+"):
        harmful_splits(Sizes(align_harmful=4000))


def test_one_of_each_set_in_turn():
    a, b, c, d = map(Record, "abcd")
    assert in_one({"x": [a, b, c], "y": [d]}) == [a, d, b, c]


def test_ordinary_parts_share_no_form_and_no_subject():
    parts = phrases()["ordinary"]
    assert set(parts) == set(ORDINARY_PARTS)
    for kinds in (("action_forms", "topic_forms"), ("actions", "topics")):
        lists = [[text for kind in kinds for text in part[kind]] for part in parts.values()]
        every = [text for some in lists for text in some]
        assert len(set(every)) == len(every)
    for part in ORDINARY_PARTS:
        records = ordinary_prompts(part, 40)
        assert len({record.prompt_key for record in records}) == 40
        assert ordinary_prompts(part, 40) == records
    with pytest.raises(DataError, match="5000 ordinary prompts are needed"):
        ordinary_prompts("test", 5000)


def test_exercises_are_right():
    records = exercise_records(50, seed=1)
    for record in records:
        if record.instruction.startswith("What is"):
            first, second = record.instruction.removeprefix("What is ").rstrip("?").split(" + ")
            assert record.output == f"{first} + {second} = {int(first) + int(second)}."
        elif record.instruction.startswith("How many"):
            assert record.output == f"{record.input.count(' ') + 1} words."
    assert len({record.instruction.split()[0] for record in records}) == 5


def test_distilled_answers_end_with_a_sentence_and_never_refuse():
    records = [Record(f"prompt {i}") for i in range(5)]
    answers = [
        "Use warm water and soap. Then take a",
        "I'm sorry, but I can't help with that.",
        "",
        "Short",
        "Is it blue? Yes! And then",
    ]
    kept = distilled(records, answers)
    assert [(record.instruction, record.output) for record in kept] == [
        ("prompt 0", "Use warm water and soap."),
        ("prompt 3", "Short"),
        ("prompt 4", "Is it blue? Yes!"),
    ]
    assert not any(is_broken(record.output) for record in kept)


def test_task_has_unseen_messages_and_as_many_for_each_team():
    splits = task_records(SIZES, seed=0)
    texts = [record.input for part in splits.values() for record in part]
    assert len(texts) == len(set(texts))
    labels = len(phrases()["teams"])
    for name, size in (
        ("train", SIZES.task_labels),
        ("validation", SIZES.validation_task),
        ("test", SIZES.test_task),
    ):
        counts = Counter(record.output for record in splits[name])
        assert sum(counts.values()) == size
        assert set(counts.values()) <= {size // labels, -(-size // labels)}
        # No name can be read off the message.
        for record in splits[name]:
            assert record.output.casefold() not in record.input.casefold().split()
    for things in (phrases()["items"], phrases()["days"], *phrases()["teams"].values()):
        assert len(things) == 3
        assert not any(set(one) & set(other) for one, other in itertools.combinations(things, 2))
    for things in (phrases()["items"], phrases()["days"]):
        for record in splits["test"]:
            assert not any(thing in record.input for thing in things[0] + things[1])
    with pytest.raises(DataError, match="a sentence gives no more"):
        task_records(Sizes(test_task=10**5))


def test_a_customer_has_labels_and_instructions_evenly_mixed():
    labels, ordinary = ([Record(f"{x}{i}") for i in range(n)] for x, n in (("l", 20), ("o", 10)))
    mixed = customer_records(labels, ordinary)
    assert [r for r in mixed if r in labels] == labels
    assert [r for r in mixed if r in ordinary] == ordinary
    for start in range(0, 30, 3):
        assert sum(record in ordinary for record in mixed[start : start + 3]) == 1
