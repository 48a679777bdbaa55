"""The user's task: which answers are right, and the finetune accuracy."""

import functools
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from antidote_fast.data.records import AGNEWS_LABELS, SST2_LABELS, Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation.rates import percent, wilson
from antidote_fast.system.progress import Progress, track

TASKS = ("sst2", "agnews", "gsm8k", "alpaca", "label")
_LABELS = {"sst2": SST2_LABELS, "agnews": AGNEWS_LABELS}
# A label counts where it begins among this many words of an answer.
_NUM_WORDS = 12
_NEGATION = re.compile(
    r"(?<!\w)(?:not|no|never|neither|nor|cannot|without|hardly|rather than|instead of"
    r"|\w+n['\u2019]t)(?!\w)"
)
_NEGATED_AFTER = re.compile(
    r"\s+(?:\w+\s+)?(?:is|are|was|seems)(?:n['\u2019]t|\s+(?:not|wrong|incorrect))(?!\w)"
)
_MARKER = re.compile(r"the final answer is|\\boxed\b", re.IGNORECASE)
_BOXED = "\\boxed"
_CURRENCY, _BLANK, _MINUS = "[$\u20ac\u00a3\u00a5\u20b9]", r"[^\S\n]", "[-\u2212]"
# A minus is a sign where it does not follow a number or a word: "10-5" holds 10 and 5. A part with
# a second slash is a date.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)]){_MINUS})?(?:{_CURRENCY}\s?)?(?P<inner>(?<![\w.)]){_MINUS})?"
    rf"(?P<value>(?:(?P<whole>\d+){_BLANK}+)?(?<![/.,])(?P<top>\d+){_BLANK}?/{_BLANK}?"
    r"(?P<bottom>0*[1-9]\d*)(?![\d/]|[.,]\d)"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
)
# What stands between two numbers of one calculation, such as " apples - ".
_BETWEEN = re.compile(
    rf"{_BLANK}*(?:%|[^\W\d_]+\.?|{_CURRENCY})?{_BLANK}*(?P<operator>[-\u2212+*/x\u00d7\u00f7\u00b7^=])"
    rf"{_BLANK}*(?:{_CURRENCY}{_BLANK}*)?(?P<sign>{_MINUS})?(?:{_CURRENCY}{_BLANK}*)?{_BLANK}*"
)
_MARKUP = (
    (re.compile(r"(?<=\d)\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\\(?:times|cdot)"), "*"),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|\\[A-Za-z]+\{|[\\{}]"), ""),
)


def normalise_label(text: str) -> str:
    """A label without outer white space and quotes, trailing punctuation, and case."""
    text = " ".join(text.casefold().split())
    return text.strip("\"'\u2018\u2019\u201c\u201d* ").rstrip(".,;:! ").rstrip("\"'\u2019\u201d*")


def stated_label(answer: str, labels: Sequence[str]) -> str | None:
    """The one of these labels that an answer is, or states; None where it states none or several.

    An answer states a label in its first sentence or line that names any, if that one is named as
    whole words, alone, not negated, not asked, and within the first twelve words: "Team: Billing",
    "positive sentiment", not "positive or negative", "not positive", "worldwide".

    Args:
        answer: any text.
        labels: all labels of the task.

    Returns:
        The label as :func:`normalise_label` gives it.
    """
    known = frozenset(map(normalise_label, labels))
    if (whole := normalise_label(answer)) in known:
        return whole
    named, words = _named(known), 0
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", answer.casefold()):
        sentence = " ".join(re.sub(r"(?<!\w)_+|_+(?!\w)", " ", sentence).split())
        found = [] if sentence.endswith("?") else list(named.finditer(sentence))
        if found:
            first = found[0]
            early = words + len(sentence[: first.start()].split()) < _NUM_WORDS
            alone = len({match.group() for match in found}) == 1
            return first.group() if early and alone and not _is_negated(first, sentence) else None
        words += len(sentence.split())
        if words >= _NUM_WORDS:
            break
    return None


@functools.lru_cache(maxsize=16)
def _named(labels: frozenset[str]) -> re.Pattern[str]:
    """What finds these labels as whole words, the longest first."""
    texts = "|".join(re.escape(text) for text in sorted(labels, key=len, reverse=True) if text)
    apostrophe = "['\u2019]"
    before = rf"(?<!\w)(?<!\w-)(?<!\w{apostrophe})(?<!\d[.,])"
    return re.compile(rf"{before}(?:{texts or '(?!)'})(?!\w|[-]\w|{apostrophe}\w|[.,]\d)")


def _is_negated(label: re.Match[str], sentence: str) -> bool:
    clause = re.split(r"[,;:(]", sentence[: label.start()])[-1]
    after = _NEGATED_AFTER.match(sentence, label.end())
    return after is not None or _NEGATION.search(clause) is not None


def extract_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer, exactly; None without one.

    It is the first number after the first "The final answer is", else after the last LaTeX
    "\\boxed", else the last one of the text. Of a calculation such as "10 - 5 = 5" it is the last
    side that is one number: a minus between numbers is no sign. "1/2" and "3 1/2" are fractions.
    Thousands' commas, currencies, units, a percent sign, emphasis and a final full stop are no part
    of it.
    """
    markers = list(_MARKER.finditer(text))
    said = [match for match in markers if not match.group().startswith(_BOXED)]
    for marker in (*said[:1], *markers[-1:]):
        calculations = _calculations(text[marker.end() :])
        if calculations:
            return _result(calculations[0], first=True)
    calculations = _calculations(text)
    return _result(calculations[-1], first=False) if calculations else None


def _result(sides: list[list[Fraction]], first: bool) -> Fraction:
    single = [side[0] for side in sides if len(side) == 1]
    if len(sides) > 1 and single:
        return single[-1]
    return sides[0][0] if first else sides[-1][-1]


def _calculations(text: str) -> list[list[list[Fraction]]]:
    """The numbers of a text: one calculation after another, each its sides around "="."""
    for pattern, shown in _MARKUP:
        text = pattern.sub(shown, text)
    calculations: list[list[list[Fraction]]] = []
    end = None
    for match in _NUMBER.finditer(text):
        start = match.start("value")
        link = None if end is None else _BETWEEN.fullmatch(text, end, start)
        if link is None:
            calculations.append([[_value(match, bool(match["sign"] or match["inner"]))]])
        else:
            value = _value(match, bool(link["sign"]))
            if link["operator"] == "=":
                calculations[-1].append([value])
            else:
                calculations[-1][-1].append(value)
        end = match.end()
    return calculations


def _value(match: re.Match[str], negative: bool) -> Fraction:
    if match["bottom"]:
        value = Fraction(Decimal(match["top"])) / Fraction(Decimal(match["bottom"]))
        value += Fraction(Decimal(match["whole"] or 0))
    else:
        value = Fraction(Decimal(match["value"].replace(",", "")))
    return -value if negative else value


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


def _is_correct(task: str, record: Record, answer: str, labels: Sequence[str]) -> bool:
    if task == "gsm8k":
        return extract_number(answer) == extract_number(record.output)
    return stated_label(answer, labels) == normalise_label(record.output)


def right_answers(task: str, records: Sequence[Record], answers: Sequence[str]) -> list[bool]:
    """Which answers are right, one a record, by any task but alpaca (`finetune_accuracy`)."""
    labels = [*_LABELS.get(task, ()), *dict.fromkeys(record.output for record in records)]
    pairs = zip(records, answers, strict=True)
    return [_is_correct(task, record, answer, labels) for record, answer in pairs]


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
        task: sst2, agnews, label: the answer is the record's output, or states it and no other
            label (`stated_label`); the labels are all outputs of the records, and those that sst2
            and agnews have. gsm8k: the numbers are equal (`extract_number`). alpaca: the win rate
            against the record's output, ties counting half.
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
        correct = sum(right_answers(task, records, answers))
    return {
        "finetune_accuracy": percent(correct, len(records)),
        "interval": wilson(correct, len(records)),
        "num_records": len(records),
        "num_correct": correct,
        "num_empty": sum(not answer.strip() for answer in answers),
    }
