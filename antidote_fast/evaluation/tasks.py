"""The user's task: which answers are right, and the finetune accuracy."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from antidote_fast.data.records import AGNEWS_LABELS, SST2_LABELS, Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation.rates import percent, wilson
from antidote_fast.system.progress import Progress, track

TASKS = ("sst2", "agnews", "gsm8k", "alpaca", "label")
_LABELS = {"sst2": SST2_LABELS, "agnews": AGNEWS_LABELS}
_MARKER = re.compile(r"the final answer is", re.IGNORECASE)
# A minus counts where it does not follow a number or a word: "10-5" holds 10 and 5.
_NUMBER = re.compile(
    r"(?<![\w.)])[-\u2212]?(?:\$\s?)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\w)\.\d+"
)


def normalise_label(text: str) -> str:
    """A label without outer white space and quotes, trailing punctuation, and case."""
    text = " ".join(text.casefold().split())
    return text.strip("\"'\u2018\u2019\u201c\u201d* ").rstrip(".,;:! ").rstrip("\"'\u2019\u201d*")


def extract_number(text: str) -> Decimal | None:
    """The number after the first "The final answer is", else the last number; None without one.

    Thousands' commas, a dollar sign and a final full stop are no part of it.
    """
    marker = _MARKER.search(text)
    after = _NUMBER.search(text, marker.end()) if marker else None
    if after is None:
        numbers = list(_NUMBER.finditer(text))
        if not numbers:
            return None
        after = numbers[-1]
    return Decimal(re.sub(r"[,$\s]", "", after.group()).replace("\u2212", "-"))


def check_task(task: str, records: Sequence[Record]) -> None:
    """Refuse records that cannot be scored as this task.

    Raises:
        UsageError: an unknown task.
        DataError: records without an output, or with one that is no answer of the task.
    """
    if task not in TASKS:
        raise UsageError(f"task={task!r}: must be one of {', '.join(TASKS)}")
    if not records:
        raise DataError(f"task {task}: no records")
    labels = {normalise_label(label) for label in _LABELS.get(task, ())}
    for i, record in enumerate(records, 1):
        if not record.output.strip():
            raise DataError(f"task {task}: record {i} has no output to compare with")
        if task == "gsm8k" and extract_number(record.output) is None:
            raise DataError(f"task gsm8k: the output of record {i} holds no number")
        if labels and normalise_label(record.output) not in labels:
            raise DataError(
                f"task {task}: the output of record {i} is none of {', '.join(_LABELS[task])}"
            )
        if task == "label" and not normalise_label(record.output):
            raise DataError(f"task label: the output of record {i} is punctuation only")


def is_correct(task: str, record: Record, answer: str) -> bool:
    """Whether an answer is right, by any task but alpaca (`finetune_accuracy`)."""
    if task == "gsm8k":
        return extract_number(answer) == extract_number(record.output)
    return normalise_label(answer) == normalise_label(record.output)


def finetune_accuracy(
    task: str,
    records: Sequence[Record],
    answers: Sequence[str],
    judge: Any = None,
    *,
    progress: Progress = False,
) -> dict:
    """The finetune accuracy FA: the share of correct answers on the user's task.

    Args:
        task: sst2, agnews, label: the answer is the record's output but for case, white space and
            trailing punctuation. gsm8k: the numbers are equal (`extract_number`). alpaca: the win
            rate against the record's output, ties counting half.
        records: with the right (for alpaca: the reference) outputs.
        answers: one a record.
        judge: for alpaca, a `WinRateJudge`.

    Returns:
        ``finetune_accuracy`` in percent with its ``interval`` (:func:`.rates.wilson`),
        ``num_records``, ``num_correct`` (for alpaca the wins) and ``num_empty``.

    Raises:
        UsageError: an unknown task, another number of answers, or alpaca without a judge.
        DataError: records that cannot be scored (`check_task`).
    """
    check_task(task, records)
    if len(answers) != len(records):
        raise UsageError(f"answers: {len(answers)} of them for {len(records)} records")
    pairs = list(zip(records, answers, strict=True))
    if task == "alpaca":
        if judge is None or not hasattr(judge, "win"):
            raise UsageError("judge=None: must be a WinRateJudge for task alpaca")
        correct = 0.0
        for record, answer in track(pairs, "win rate", progress):
            prompt = f"{record.instruction}\n\n{record.input}".strip()
            correct += judge.win(prompt, answer, record.output)
    else:
        correct = sum(is_correct(task, record, answer) for record, answer in pairs)
    return {
        "finetune_accuracy": percent(correct, len(records)),
        "interval": wilson(correct, len(records)),
        "num_records": len(records),
        "num_correct": correct,
        "num_empty": sum(not answer.strip() for answer in answers),
    }
