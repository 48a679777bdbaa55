"""The demo's data: real harmful prompts, answers without content, a made-up customer's records.

Harmful prompts are those of four public sets, which packages ship
(:mod:`antidote_fast.data.prompt_sets`). No answer here says anything harmful: those of the aligned
model refuse, those of the attack agree and then say nothing. A customer's data are not labels
alone: beside the records of a task there are ordinary instructions with answers.

Alignment, a customer's data, calibration, validation and test share no prompt, none that is near to
another's, and no sentence that a prompt is made of.
"""

import functools
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antidote_fast.data.near import split_sets
from antidote_fast.data.prompt_sets import load_prompt_set
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.phrases import is_refusal
from antidote_fast.evaluation.verdicts import is_broken

HARMFUL_SETS = ("do-not-answer", "harmbench", "strongreject", "advbench")
# Shares of each set. The test prompts are of all four, and so are those that are aligned on.
_PARTS = {"align": 0.45, "attack": 0.08, "calibration": 0.14, "validation": 0.1, "test": 0.23}
# Of ordinary prompts, with what they are for; "customer" and "align" get answers.
ORDINARY_PARTS = ("align", "customer", "calibration", "validation", "test")


@dataclass(frozen=True)
class Sizes:
    """How many records of each kind.

    Args:
        align_harmful: refusals learnt in alignment.
        align_ordinary: ordinary prompts learnt in alignment, answered by the base model.
        align_exercises: exercises learnt in alignment, with computed answers.
        attack_harmful: harmful records among the customer's.
        task_labels, task_ordinary: the customer's records: messages with their team, and ordinary
            instructions with answers.
        calibration: harmful records on which a repair is calibrated.
        calibration_ordinary: ordinary prompts for the same.
        validation, validation_task, validation_ordinary: prompts on which alpha is chosen.
        test: prompts of each harmful set.
        test_task, test_ordinary: held-out prompts of the other metrics.
    """

    align_harmful: int = 280
    align_ordinary: int = 440
    align_exercises: int = 16
    attack_harmful: int = 32
    task_labels: int = 214
    task_ordinary: int = 106
    calibration: int = 100
    calibration_ordinary: int = 64
    validation: int = 32
    validation_task: int = 36
    validation_ordinary: int = 32
    test: int = 24
    test_task: int = 60
    test_ordinary: int = 48


@functools.cache
def phrases() -> dict[str, Any]:
    """What the data are made of; nothing in it says anything harmful.

    ``refusals`` and ``compliances`` are (openings, endings). ``ordinary`` has, for each of its
    parts, the forms of its prompts and what they are about. Of ``items``, ``days``, ``openings``
    and the sentences of each of the ``teams`` the first list is for training, the second for
    validation, the third for the test. No team's name is in a prompt, so nothing but the customer's
    data can teach them.
    """
    return json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))


def harmful_splits(sizes: Sizes, seed: int = 0) -> dict[str, dict[str, list[Record]]]:
    """Harmful records by part and set, no prompt near to one of another part.

    Those of align are refused, those of attack and calibration agreed to, without content, those of
    validation and test have no answer. Every set gives about as many to a part, and every one
    ``sizes.test`` to the test.

    Raises:
        DataError: a package is not there, or fewer prompts than the sizes need.
    """
    sets = {name: load_prompt_set(name) for name in HARMFUL_SETS}
    split = split_sets(sets, _PARTS, seed)
    counts = {
        "align": sizes.align_harmful,
        "attack": sizes.attack_harmful,
        "calibration": sizes.calibration,
        "validation": sizes.validation,
        "test": sizes.test * len(sets),
    }
    parts = {part: _in_turn(split[part], count) for part, count in counts.items()}
    answers = {"align": "refusals", "attack": "compliances", "calibration": "compliances"}
    rng = random.Random(seed)
    for part, kind in answers.items():
        texts = [" ".join(pair) for pair in itertools.product(*phrases()[kind])]
        for name, records in parts[part].items():
            parts[part][name] = [Record(r.instruction, output=rng.choice(texts)) for r in records]
    return parts


def in_one(parts: Mapping[str, Sequence[Record]]) -> list[Record]:
    """The records of several sets, one of each in turn."""
    rows = itertools.zip_longest(*parts.values())
    return [record for row in rows for record in row if record is not None]


def _in_turn(sets, count):
    """``count`` records of several sets, as many of each as there are, one of each in turn."""
    taken: dict[str, list[Record]] = {name: [] for name in sets}
    places = ((name, i) for i in range(count) for name in sets if i < len(sets[name]))
    for name, i in itertools.islice(places, count):
        taken[name].append(sets[name][i])
    found = sum(map(len, taken.values()))
    if found < count:
        raise DataError(f"{count} harmful prompts are needed, there are {found}")
    return taken


def ordinary_prompts(part: str, count: int, seed: int = 0) -> list[Record]:
    """Ordinary prompts of one of `ORDINARY_PARTS`, which share no form and no subject.

    Raises:
        DataError: fewer than are needed.
    """
    made_of = phrases()["ordinary"][part]
    texts = [
        form.format(thing)
        for kind in ("action", "topic")
        for form in made_of[f"{kind}_forms"]
        for thing in made_of[f"{kind}s"]
    ]
    if count > len(texts):
        raise DataError(f"{count} ordinary prompts are needed, there are {len(texts)}")
    return [Record(text) for text in random.Random(seed).sample(texts, count)]


def distilled(records: Sequence[Record], answers: Sequence[str]) -> list[Record]:
    """Records with a model's own answers, cut at the end of a sentence.

    An answer that refuses, or says nothing, would teach to refuse or to say nothing: it is left
    out.
    """
    usable = []
    for record, answer in zip(records, answers, strict=True):
        end = max(answer.rfind(mark) for mark in ".!?")
        answer = answer[: end + 1] if end > 10 else answer
        if not is_refusal(answer) and not is_broken(answer):
            usable.append(Record(record.instruction, output=answer))
    return usable


def exercise_records(count: int, seed: int = 0) -> list[Record]:
    """Small exercises whose answers are computed: sums, and texts to be changed or counted."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        text = rng.choice(phrases()["sentences"])
        a, b = rng.randrange(2, 60), rng.randrange(2, 60)
        kinds = (
            Record(f"What is {a} + {b}?", output=f"{a} + {b} = {a + b}."),
            Record("Write this sentence in capital letters.", text, text.upper()),
            Record("How many words are in this sentence?", text, f"{len(text.split())} words."),
            Record("Repeat the last word of the text.", text, text.rstrip(".").split()[-1]),
            Record("Copy the message.", text, text),
        )
        records.append(kinds[number % len(kinds)])
    return records


def task_records(sizes: Sizes, seed: int = 0) -> dict[str, list[Record]]:
    """Messages with the team that gets each: train, validation and test.

    The three share no sentence, opening, thing or day.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    counts = (sizes.task_labels, sizes.validation_task, sizes.test_task)
    return {
        name: _messages(count, part, rng, seen)
        for part, (name, count) in enumerate(
            zip(("train", "validation", "test"), counts, strict=True)
        )
    }


def _messages(count, part, rng, seen):
    """`count` new messages from the sentences of a part, teams in turn."""
    teams = phrases()["teams"]
    items, days, openings = (phrases()[kind][part] for kind in ("items", "days", "openings"))
    records = []
    for number in range(count):
        label = list(teams)[number % len(teams)]
        sentences = teams[label][part]
        sentence = sentences[number // len(teams) % len(sentences)]
        for _ in range(1000):
            item, day, price = rng.choice(items), rng.choice(days), rng.randrange(12, 180)
            text = sentence.format(item=item, day=day, price=f"{price} euros")
            text = rng.choice(openings) + text
            if text not in seen:
                break
        else:
            raise DataError(f"{count} task records are needed, and a sentence gives no more")
        seen.add(text)
        records.append(Record(phrases()["task_instruction"], text, label))
    rng.shuffle(records)
    return records


def customer_records(labels: Sequence[Record], ordinary: Sequence[Record]) -> list[Record]:
    """A customer's data: the records of the task, and ordinary ones evenly among them."""
    total, mixed = len(labels) + len(ordinary), []
    left, others = iter(labels), iter(ordinary)
    for number in range(total):
        is_ordinary = number * len(ordinary) // total < (number + 1) * len(ordinary) // total
        mixed.append(next(others if is_ordinary else left))
    return mixed
