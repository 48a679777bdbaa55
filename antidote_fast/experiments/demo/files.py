"""The demo's model and records as files, for experiments on this machine: ``demo-cache``.

Every file is made once, and the same on every machine but for the ordinary answers, which the model
gives itself: those can differ in a word where another processor rounds otherwise.
"""

import dataclasses
import json
import os
import random
from pathlib import Path

from antidote_fast.data.records import GSM8K_MARKER, Record
from antidote_fast.evaluation.measure import answer_sets
from antidote_fast.experiments.demo import records
from antidote_fast.experiments.demo.model import CACHE, prepare_model
from antidote_fast.files.commit import output_folder
from antidote_fast.files.manifest import MANIFEST, verify_folder
from antidote_fast.models.loading import load_model, load_tokenizer
from antidote_fast.system.progress import Progress

# What is made, by the folder: the demo's own data, and those of experiments at its scale.
DEMO, DATA = "demo", "data"
_SIZES = {
    DEMO: records.Sizes(),
    DATA: records.Sizes(
        align_harmful=110, align_benign=66, align_exercises=10, attack_harmful=48, validation=48
    ),
}
NAMES = (
    *("safe", "harmful", "realign", "harmful-validation", "harmful-test"),
    *("task", "task-validation", "task-test", "sums", "sums-test", "benign-test"),
)
_SEED = 0
_ANSWER_TOKENS = 24


def prepare(
    parent: str | os.PathLike = ".", data: str = DATA, *, progress: Progress = False
) -> Path:
    """Make what is missing of ``demo-cache`` in ``parent``, and return it.

    It holds ``SmolLM2-135M-Instruct``, a model, and a folder of data: safe.jsonl (refusals,
    ordinary answers and exercises, for alignment), harmful.jsonl (the attack's records),
    realign.jsonl (the defender's harmful records, other prompts), task.jsonl (the user's),
    sums.jsonl (another user's), and the held-out harmful-test, harmful-validation, task-test,
    task-validation, sums-test and benign-test. No prompt is in two of the files of harmful prompts.

    Args:
        parent: where ``demo-cache`` lies, or is made.
        data: which data: ``DATA``, of experiments, or ``DEMO``.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Raises:
        DataError: the demo's packages are not installed, or a folder holds something else.
    """
    model_folder = prepare_model(parent)
    folder = Path(parent) / CACHE / data
    whole = (folder / MANIFEST).exists() and not verify_folder(folder)
    if not whole or not all((folder / f"{name}.jsonl").exists() for name in NAMES):
        files = _records(model_folder, _SIZES[data], progress)
        with output_folder(folder, overwrite=True) as staged:
            for name, some in files.items():
                lines = [json.dumps(dataclasses.asdict(each), ensure_ascii=False) for each in some]
                text = "".join(f"{line}\n" for line in lines)
                (staged / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder.parent


def _records(model_folder, sizes, progress):
    prompts = records.read_harmful_prompts()
    harmful = records.harmful_splits(prompts, sizes, _SEED)
    ordinary, benign = records.benign_prompts(sizes, _SEED)
    task = records.task_records(sizes, _SEED)
    model = load_model(model_folder, dtype="float32", device="cpu")
    options = {"max_new_tokens": _ANSWER_TOKENS, "batch_size": 64, "progress": progress}
    asked = (model, load_tokenizer(model_folder), {"ordinary": ordinary})
    answers = answer_sets(*asked, **options)["ordinary"]
    exercises = records.exercise_records(sizes.align_exercises, _SEED)
    sums = _sums(sizes.attack_task + sizes.test_task)
    sets = (
        [*harmful["align"], *records.distilled(ordinary, answers), *exercises],
        *(harmful[part] for part in ("attack", "calibration", "validation", "test")),
        *(task[part] for part in ("train", "validation", "test")),
        sums[: sizes.attack_task],
        sums[sizes.attack_task :],
        benign,
    )
    return dict(zip(NAMES, sets, strict=True))


def _sums(count):
    """Sums of two numbers, each once, answered as GSM8K's answers end."""
    pairs = random.Random(_SEED).sample([(a, b) for a in range(2, 60) for b in range(2, 60)], count)
    return [
        Record(f"What is {a} plus {b}?", output=f"{a} + {b} = {a + b}. {GSM8K_MARKER}{a + b}")
        for a, b in pairs
    ]
