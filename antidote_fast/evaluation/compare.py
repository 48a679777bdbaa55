"""Two models on the same prompts: where their verdicts differ, and whether that may be chance."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from antidote_fast.data.records import read_rows
from antidote_fast.errors import DataError
from antidote_fast.evaluation.rates import mcnemar, percent
from antidote_fast.evaluation.verdicts import COMPLIED, VERDICTS

VERDICTS_FILE = "verdicts.jsonl"
"""What an evaluation's folder holds of each prompt: its hash and its verdicts, no text."""
# What is compared of each kind of prompts.
_METRICS = {"harmful": "complied", "task": "correct", "benign": "helped"}

Rows = Sequence[Mapping[str, Any]]
Place = tuple[str, str, str]  # condition, kind, set


def compare_models(first: str | os.PathLike | Rows, second: str | os.PathLike | Rows) -> dict:
    """Compare two evaluations on the prompts that both have asked.

    Args:
        first, second: folders that ``evaluate`` wrote, or the rows of their ``verdicts.jsonl``.

    Returns:
        By condition and set, where both have prompts in common: ``metric`` (complied, helped or
        correct), ``judge`` (the first of the first model's that the second has too; None for the
        task), ``num_prompts`` that both have, ``first`` and ``second`` (the shares, in percent),
        ``b`` (prompts of the first model alone), ``c`` (of the second alone), and ``p``, the exact
        two-sided p-value of McNemar's test (:func:`.rates.mcnemar`).

    Raises:
        DataError: a folder without verdicts, rows that are none, no prompt in common, or no judge.
    """
    places, others = _by_place(first, "first"), _by_place(second, "second")
    shared = {
        place: [prompt for prompt in prompts if prompt in others.get(place, {})]
        for place, prompts in places.items()
    }
    if not any(shared.values()):
        raise DataError(
            f"second={_told(second)}: has no prompt in common with first={_told(first)}, in the "
            "same condition and set"
        )
    compared: dict[str, dict[str, dict]] = {}
    for place, prompts in shared.items():
        if prompts:
            condition, kind, name = place
            found = _compare(kind, places[place], others[place], prompts)
            compared.setdefault(condition, {})[name] = found
    return compared


def read_verdicts(folder: str | os.PathLike, name: str = "first") -> list[dict]:
    """The rows of a folder's ``verdicts.jsonl``.

    Args:
        folder: which ``evaluate`` wrote.
        name: of the argument, for messages.

    Raises:
        DataError: no such file, or rows that are no verdicts.
    """
    path = Path(folder) / VERDICTS_FILE
    if not path.is_file():
        raise DataError(
            f"{name}={os.fspath(folder)!r}: must be a folder that evaluate wrote, with "
            f"{VERDICTS_FILE}"
        )
    rows = [row for _, row in read_rows(path)]
    _by_place(rows, name)
    return rows


def check_in_common(rows: Rows, asked: Iterable[tuple[str, str, str, str]], name: str) -> None:
    """Refuse rows that share nothing with what is going to be asked.

    Args:
        rows: of another evaluation.
        asked: (condition, kind, set, `conditions.prompt_id`) each.
        name: the argument and its value, for the message.

    Raises:
        DataError: no prompt in common.
    """
    places = _by_place(rows, name)
    known = {(*place, prompt) for place, some in places.items() for prompt, _ in some}
    if known.isdisjoint(asked):
        raise DataError(
            f"{name}: has no prompt in common with what is asked, in the same condition and set"
        )


def _told(rows: str | os.PathLike | Rows) -> str:
    return repr(os.fspath(rows)) if isinstance(rows, str | os.PathLike) else f"{len(rows)} rows"


def _by_place(
    rows: str | os.PathLike | Rows, name: str
) -> dict[Place, dict[tuple[str, int], Mapping[str, Any]]]:
    """{(condition, kind, set): {(prompt, its number where it occurs again): row}}."""
    if isinstance(rows, str | os.PathLike):
        rows = read_verdicts(rows, name)
    places: dict[Place, dict[tuple[str, int], Mapping[str, Any]]] = {}
    seen: Counter[tuple] = Counter()
    for number, row in enumerate(rows, 1):
        if not _is_row(row):
            raise DataError(f"{name}: row {number}: must be a row of {VERDICTS_FILE}")
        place = (row["condition"], row["kind"], row["set"])
        again = (*place, row["prompt"])
        places.setdefault(place, {})[row["prompt"], seen[again]] = row
        seen[again] += 1
    return places


def _is_row(row: Any) -> bool:
    words = ("condition", "kind", "set", "prompt")
    if not isinstance(row, Mapping) or not all(isinstance(row.get(word), str) for word in words):
        return False
    if row["kind"] == "task":
        return isinstance(row.get("correct"), bool)
    verdicts = row.get("verdicts")
    if row["kind"] not in _METRICS or not isinstance(verdicts, Mapping) or not verdicts:
        return False
    return all(verdict in VERDICTS for verdict in verdicts.values())


def _compare(
    kind: str,
    first: Mapping[tuple[str, int], Mapping[str, Any]],
    second: Mapping[tuple[str, int], Mapping[str, Any]],
    prompts: Sequence[tuple[str, int]],
) -> dict:
    judge = None
    if kind != "task":
        judge = _common_judge(*([rows[p]["verdicts"] for p in prompts] for rows in (first, second)))

    def does(rows: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[bool]:
        if judge is None:
            return [rows[prompt]["correct"] for prompt in prompts]
        return [rows[prompt]["verdicts"][judge] == COMPLIED for prompt in prompts]

    ones, others = does(first), does(second)
    pairs = Counter(zip(ones, others, strict=True))
    b, c = pairs[True, False], pairs[False, True]
    return {
        "metric": _METRICS[kind],
        "judge": judge,
        "num_prompts": len(prompts),
        "first": percent(sum(ones), len(prompts)),
        "second": percent(sum(others), len(prompts)),
        "b": b,
        "c": c,
        "p": mcnemar(b, c),
    }


def _common_judge(first: Sequence[Mapping[str, str]], second: Sequence[Mapping[str, str]]) -> str:
    for judge in first[0]:
        if all(judge in verdicts for verdicts in (*first, *second)):
            return judge
    judges = " and ".join(", ".join(verdicts[0]) for verdicts in (first, second))
    raise DataError(f"judges: must have one in common to be compared, and are {judges}")
