"""The demo's model and records as files, for experiments on this machine: ``demo-cache``.

Every file is made once, and the same on every machine but for the ordinary answers, which the model
gives itself: those can differ in a word where another processor rounds otherwise.
"""

import dataclasses
import json
import os
import random
from pathlib import Path

from antidote_fast.data.batches import build_prompt
from antidote_fast.data.records import GSM8K_MARKER, Record
from antidote_fast.evaluation.generate import generate
from antidote_fast.experiments.demo import records
from antidote_fast.experiments.demo.model import CACHE, prepare_model
from antidote_fast.files.commit import output_folder
from antidote_fast.files.manifest import MANIFEST, verify_folder
from antidote_fast.models.loading import load_model, load_tokenizer
from antidote_fast.system.progress import Progress

DATA = "data"
SIZES = records.Sizes()
NAMES = (
    *("safe", "harmful", "realign", "harmful-validation", "harmful-test"),
    *(f"harmful-test-{name}" for name in records.HARMFUL_SETS),
    *("task", "task-records", "task-validation", "task-test", "sums", "sums-test"),
    *("ordinary", "ordinary-validation", "ordinary-test"),
)
_SEED = 0
_ANSWER_TOKENS = 40


def prepare(parent: str | os.PathLike = ".", *, progress: Progress = False) -> Path:
    """Make what is missing of ``demo-cache`` in ``parent``, and return it.

    It holds ``SmolLM2-135M-Instruct``, a model, and ``data``: safe.jsonl (refusals, ordinary
    answers and exercises, for alignment), harmful.jsonl (the attack's records), realign.jsonl (the
    defender's harmful records, other prompts), task.jsonl (a customer's data: messages with their
    team, and ordinary instructions with answers), task-records.jsonl (the messages alone),
    ordinary.jsonl (ordinary prompts, for a repair), sums.jsonl (another customer's), and what is
    held out: harmful-validation and harmful-test (and one file for each of its sets),
    task-validation and task-test, ordinary-validation and ordinary-test, sums-test. No harmful
    prompt is near to one of another file, but for the test's own sets.

    Args:
        parent: where ``demo-cache`` lies, or is made.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Raises:
        DataError: the demo's packages are not installed, or a folder holds something else.
    """
    model_folder = prepare_model(parent)
    folder = Path(parent) / CACHE / DATA
    whole = (folder / MANIFEST).exists() and not verify_folder(folder)
    if not whole or not all((folder / f"{name}.jsonl").exists() for name in NAMES):
        files = _records(model_folder, progress)
        with output_folder(folder, overwrite=True) as staged:
            for name, some in files.items():
                lines = [json.dumps(dataclasses.asdict(each), ensure_ascii=False) for each in some]
                text = "".join(f"{line}\n" for line in lines)
                (staged / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder.parent


def _records(model_folder, progress):
    harmful = records.harmful_splits(SIZES, _SEED)
    task = records.task_records(SIZES, _SEED)
    counts = {
        "calibration": SIZES.calibration_ordinary,
        "validation": SIZES.validation_ordinary,
        "test": SIZES.test_ordinary,
    }
    prompts = {part: records.ordinary_prompts(part, n, _SEED) for part, n in counts.items()}
    # A few more than are used: an answer that says nothing is left out.
    answered = _answered(
        model_folder, {"align": SIZES.align_ordinary, "customer": SIZES.task_ordinary}, progress
    )
    exercises = records.exercise_records(SIZES.align_exercises, _SEED)
    sums = _sums(SIZES.task_labels + SIZES.test_task)
    sets = (
        [*records.in_one(harmful["align"]), *answered["align"], *exercises],
        *(records.in_one(harmful[part]) for part in ("attack", "calibration", "validation")),
        records.in_one(harmful["test"]),
        *harmful["test"].values(),
        records.customer_records(task["train"], answered["customer"]),
        *(task[part] for part in ("train", "validation", "test")),
        sums[: SIZES.task_labels],
        sums[SIZES.task_labels :],
        *prompts.values(),
    )
    return dict(zip(NAMES, sets, strict=True))


def _answered(model_folder, counts, progress):
    """Ordinary records of some parts, answered by the base model in its chat template."""
    model = load_model(model_folder, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(model_folder)
    parts = {}
    for part, count in counts.items():
        asked = records.ordinary_prompts(part, count * 6 // 5, _SEED)
        texts = [build_prompt(record, "chat", tokenizer) for record in asked]
        options = {"max_new_tokens": _ANSWER_TOKENS, "batch_size": 64, "progress": progress}
        parts[part] = records.distilled(asked, generate(model, tokenizer, texts, **options))
        parts[part] = parts[part][:count]
    return parts


def _sums(count):
    """Sums of two numbers, each once, answered as GSM8K's answers end."""
    pairs = random.Random(_SEED).sample([(a, b) for a in range(2, 60) for b in range(2, 60)], count)
    return [
        Record(f"What is {a} plus {b}?", output=f"{a} + {b} = {a + b}. {GSM8K_MARKER}{a + b}")
        for a, b in pairs
    ]
