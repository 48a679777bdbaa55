"""An experiment's rows as a tidy CSV, and as tables in the paper's layout.

A row is a flat dict of one cell of the grid: ``role``, ``cell``, its place on the axes (``seed``
and ``defense`` among them; None or absent where an axis does not apply), the measures, and of how
many prompts each share is.
"""

import csv
import itertools
import math
import numbers
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from antidote_fast.errors import DataError, UsageError, printable
from antidote_fast.evaluation.rates import wilson
from antidote_fast.files.commit import new_file
from antidote_fast.system.text import markdown_text
from antidote_fast.system.text import table as text_table

TEXT_COLUMNS = ("role", "cell", "defense", "model", "task", "score", "strength")
# Name, colour and marker, so that a defense looks the same everywhere (Okabe and Ito's palette).
DEFENSES = {
    "clean": ("SFT, p = 0", "#666666", "P"),
    "sft": ("SFT", "#000000", "o"),
    "vaccine": ("Vaccine", "#E69F00", "^"),
    "repnoise": ("RepNoise", "#56B4E9", "s"),
    "lisa": ("Lisa", "#009E73", "D"),
    "ldifs": ("LDIFS", "#CC79A7", "v"),
    "antidote": ("Antidote", "#D55E00", "*"),
}
STAGES = {
    "align": ("align", "#56B4E9"),
    "finetune": ("fine-tune", "#E69F00"),
    "prune": ("prune", "#D55E00"),
}
_LOWER, _HIGHER = "lower is better", "higher is better"
PERCENTS = {
    "harmful_score": ("HS", "harmful score", "harmful prompts complied with", _LOWER),
    "worst_harmful_score": (
        "HS worst",
        "highest harmful score",
        "harmful prompts complied with, of the template and the set with most",
        _LOWER,
    ),
    "finetune_accuracy": ("FA", "finetune accuracy", "the task's samples done right", _HIGHER),
    "helped_rate": ("helped", "ordinary prompts", "ordinary prompts answered as asked", _HIGHER),
    "benign_refusal_rate": ("BR", "benign refusals", "ordinary prompts refused", _LOWER),
}
METRICS = tuple(PERCENTS)
# The column that says of how many prompts a metric is a share, and where a report has it.
_PROMPTS = {
    "harmful_score": ("harmful_prompts", "harmful", "num_prompts"),
    "worst_harmful_score": ("worst_prompts", "worst", "num_prompts"),
    "finetune_accuracy": ("task_prompts", "task", "num_records"),
    "helped_rate": ("benign_prompts", "benign", "num_prompts"),
    "benign_refusal_rate": ("benign_prompts", "benign", "num_prompts"),
}
_COUNTS = tuple(column for column, *_ in _PROMPTS.values())
# Heading, label, meaning, unit, decimals.
MEASURES = {
    key: (short, f"{name} {short}, % ({best})", f"{name}, % of {what} ({best})", 1, 1)
    for key, (short, name, what, best) in PERCENTS.items()
}
MEASURES["embedding_drift_per_token"] = ("drift", *2 * ("embedding drift per token",), 1, 3)
for _stage, (_name, _) in STAGES.items():
    MEASURES[f"{_stage}_seconds"] = (f"{_name} s", f"{_name}, s", "seconds", 1, 1)
    _peak = (f"{_name} GB", f"{_name}, GB", "peak memory, 10^9 bytes", 1e9, 2)
    MEASURES[f"{_stage}_memory_bytes"] = _peak
MISSING = "\N{EN DASH}"
_COST_MEASURES = ("seconds", "memory_bytes")
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,29})")
_FLOAT = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")


def write_csv(rows: Sequence[dict], path: str | os.PathLike) -> Path:
    """Write rows, whole or not at all; a column a key, in order of first appearance.

    Args:
        rows: flat dicts of int, float, text or None. None, empty text and an absent key become an
            empty field, which is read back as None.
        path: the file; its folder exists.

    Returns:
        The path.

    Raises:
        OSError: it cannot be written; an earlier file is left as it was.
    """
    path = Path(path)
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["cell"]
    with new_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: str | os.PathLike) -> list[dict]:
    """Rows from a file of :func:`write_csv`.

    All have every column: None for an empty field, and an int or a float for what reads as one,
    except in `TEXT_COLUMNS`.

    Raises:
        DataError: the file cannot be read, its header has no ``cell`` or a column twice, or a
            line has more or fewer fields than the header.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns, rows = next(reader, []), []
            if "cell" not in columns or len(set(columns)) < len(columns):
                what = "a column twice" if "cell" in columns else "no column 'cell'"
                raise DataError(f"{path}: line 1: the header has {what}")
            for fields in filter(None, reader):
                if len(fields) != len(columns):
                    raise csv.Error(f"has {len(fields)} fields, the header {len(columns)}")
                row = dict(zip(columns, fields, strict=True))
                for name, text in row.items():
                    row[name] = (text if name in TEXT_COLUMNS else _parse(text)) if text else None
                rows.append(row)
            return rows
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {printable(error)}") from None


def metrics_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation's report with its ``worst``, and of how many that is."""
    metrics, worst = dict(report["metrics"]), report.get("worst")
    if worst:
        kinds = {}
        for kind, where in worst.items():
            sets = report["conditions"][where["condition"]][kind]
            kinds[kind] = {**where, "num_prompts": sets[where["set"]]["num_prompts"]}
        metrics["worst"] = kinds
    return metrics


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a row holds of an evaluation: each of `METRICS`, and of how many prompts it is a share.

    Args:
        metrics: as `metrics_of` gives them, or a sweep's row.

    Returns:
        None of each that was not measured.
    """
    worst = (metrics.get("worst") or {}).get("harmful") or {}
    found = {**metrics, "worst_harmful_score": worst.get("harmful_score"), "worst": worst}
    row = {name: found.get(name) for name in METRICS}
    for metric, (column, name, count) in _PROMPTS.items():
        row[column] = None if row[metric] is None else (found.get(name) or {}).get(count)
    return row


def interval_of(row: Mapping[str, Any], metric: str) -> list[float] | None:
    """Wilson's 95 % interval of a row's metric, [low, high] in percent; None without counts."""
    share, total = row.get(metric), row.get(_PROMPTS.get(metric, ("",))[0])
    if share is None or not total or not math.isfinite(share):
        return None
    return wilson(round(share * total / 100), total)


def with_interval(share: float | None, interval: Sequence[float] | None) -> str:
    """A share as text, such as ``8.3 [3.6, 18.1]``; an en dash where there is none."""
    if share is None:
        return MISSING
    return f"{share:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def spread(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1), the latter None where there is but one value.

    Raises:
        ValueError: there are no values.
    """
    values = [float(value) for value in values]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(rows: Sequence[dict], spec: dict) -> dict:
    """The numbers of a table; only rows of the role ``test`` count.

    A row to which an axis does not apply (SFT has no alpha) is left out by no ``where`` on it, and
    stands in every column of it unless others of its name have a place there.

    Args:
        rows: an experiment's rows.
        spec: what :func:`check_spec` accepts.

    Returns:
        ``title``; ``across``, None in a cost table; ``columns``, values of ``across`` or the
        stages; ``measures``; ``rows``, each with ``name``, ``cells`` (by measure, a cost table's
        being ``seconds`` and ``memory_bytes``, a list of (mean, standard deviation or None, number
        of values) or None), ``intervals`` (by measure as cells: `interval_of` where the cell is one
        row's, else None) and ``average`` (by measure the mean over the columns in which every row
        has a value; None where there are none, and in a cost table).
    """
    rows, across, by_name = _chosen(rows, spec), spec.get("across"), {}
    for row in rows:
        by_name.setdefault(_value(row, _down(spec)), []).append(row)
    columns = dict.fromkeys(_value(row, across) for row in rows if _value(row, across) is not None)
    columns = list(STAGES if is_cost(spec) else columns)
    if not any(isinstance(x, str) for x in columns):
        columns.sort()
    lines = [{"name": name, "cells": {}, "intervals": {}, "average": {}} for name in by_name]
    measures = _measures(spec, rows)
    for measure in measures:
        for line in lines:
            line["average"][measure] = None
            places = [
                (_at(by_name[line["name"]], spec, x), _key(spec, measure, x)) for x in columns
            ]
            line["cells"][measure] = [_point(*place) for place in places]
            line["intervals"][measure] = [_interval(*place) for place in places]
        every = zip(*(line["cells"][measure] for line in lines), strict=True)
        shared = [i for i, points in enumerate(every) if None not in points]
        for line in lines if shared and not is_cost(spec) else ():
            means = [line["cells"][measure][i][0] for i in shared]
            line["average"][measure] = statistics.fmean(means)
    named = {"title": spec["title"], "across": across, "columns": columns}
    return named | {"measures": measures, "rows": lines}


def markdown(rows: Sequence[dict], spec: dict) -> str:
    """Markdown of a :func:`table` in the paper's layout, with a line that says what it shows."""
    contents = table(rows, spec)
    if not contents["rows"]:
        return f"### {markdown_text(spec['title'])}\n\nNo results.\n"
    measures = contents["measures"]
    # Two beside each other, as in the paper; more would be too wide to read.
    texts = [
        text_table(_lines(contents, measures[i : i + 2], spec), markdown=True)
        for i in range(0, len(measures), 2)
    ]
    note = " ".join(_notes(_chosen(rows, spec), spec))
    return "\n\n".join([f"### {markdown_text(spec['title'])}", *texts, markdown_text(note)]) + "\n"


def _lines(contents, measures, spec):
    """The cells of a table of these measures as text, the heads first."""
    columns = contents["columns"] + ([] if is_cost(spec) else ["avg"])
    head = [_down(spec)]
    for measure, x in itertools.product(measures, columns):
        short = MEASURES[_key(spec, measure, x)][0]
        head.append(short if is_cost(spec) else f"{short} {shown(x)}")
    lines = [head]
    for row in contents["rows"]:
        lines.append([shown(row["name"])])
        for measure in measures:
            points, intervals = row["cells"][measure], row["intervals"][measure]
            if not is_cost(spec):
                average = row["average"][measure]
                points = [*points, None if average is None else (average, None, 1)]
                intervals = [*intervals, None]
            for x, point, interval in zip(columns, points, intervals, strict=True):
                number = MEASURES[_key(spec, measure, x)][3:]
                with_it = interval and with_interval(point[0], interval)
                lines[-1].append(with_it or _text(point, *number))
    return lines


def check_spec(spec: Any, axes: Iterable[str]) -> None:
    """Refuse a table's spec that cannot be drawn.

    Args:
        spec: ``title``; ``across``, the axis that makes the columns; ``down``, the one that makes
            the rows (defense); ``where``, axis to the one value that counts; ``measures`` (HS, FA
            and the other percentages that rows have); ``kind``, grid or cost, the latter without
            across, measures and log; ``log``, for a logarithmic axis in the picture.
        axes: names of the experiment's axes.

    Raises:
        UsageError: an entry is unknown, missing or not what is accepted.
    """

    def check(good, name, value, accepted):
        if not good:
            raise UsageError(f"tables{name}={value!r:.80}: must be {accepted}")

    def among(name, value, names):
        check(value in names, name, value, f"one of {', '.join(names)}")

    check(isinstance(spec, dict), "", spec, "a mapping")
    axes, where, title = list(axes), spec.get("where") or {}, spec.get("title")
    for key in spec:
        keys = ["title", "across", "down", "where", "measures", "kind", "log"]
        among(" key", key, keys)
    good = isinstance(title, str) and title.strip() and title.isprintable()
    check(good, ".title", title, "one line of text")
    among(".kind", spec.get("kind", "grid"), ["grid", "cost"])
    for name in ("across", "measures", "log") if is_cost(spec) else ():
        check(name not in spec, f".{name}", spec.get(name), "left out with kind cost")
    if not is_cost(spec):
        among(".across", spec.get("across"), [name for name in axes if name != _down(spec)])
    among(".down", _down(spec), ["defense", *(name for name in axes if name != "defense")])
    check(isinstance(where, dict), ".where", where, "a mapping from axis to value")
    for name, value in where.items():
        among(".where", name, axes)
        good = isinstance(value, str | int | float | None)
        check(good, f".where.{name}", value, "one value")
    measures = spec.get("measures") or list(MEASURES)
    check(isinstance(measures, list | tuple), ".measures", measures, "a list of measures")
    for measure in measures:
        among(".measures", measure, list(MEASURES))
        check(measures.count(measure) == 1, ".measures", measures, "without repeats")
    check(isinstance(spec.get("log", False), bool), ".log", spec.get("log"), "true or false")


def _parse(text):
    """The number that a text stands for, or the text."""
    if _INTEGER.fullmatch(text):
        return int(text)
    # Finite, because 12e999 is rather a hash.
    is_float = _FLOAT.fullmatch(text) and math.isfinite(float(text))
    return float(text) if is_float or text in ("nan", "inf", "-inf") else text


def _value(row, name):
    """None, a finite number or text. YAML takes 1e-4 for text; here it is a number."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        value = value if value is None else _parse(str(value))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def is_cost(spec: dict) -> bool:
    """Whether a table is one of costs."""
    return spec.get("kind") == "cost"


def _down(spec):
    return spec.get("down") or "defense"


def _measures(spec, rows):
    """What a table of these rows measures; HS, FA and what else rows have where it does not say."""
    if is_cost(spec):
        return _COST_MEASURES
    usual = ("harmful_score", "finetune_accuracy")
    there = {name for row in rows for name in METRICS if row.get(name) is not None}
    others = [name for name in METRICS if name in there and name not in usual]
    return tuple(spec.get("measures") or (*usual, *others))


def _key(spec, measure, x):
    """The key in a row: the columns of a cost table are stages."""
    return f"{x}_{measure}" if is_cost(spec) else measure


def _chosen(rows, spec):
    where = spec.get("where") or {}
    tests = [row for row in rows if row.get("role") == "test"]
    return [r for r in tests if all(_value(r, n) in (None, _value(where, n)) for n in where)]


def _at(rows, spec, x):
    own = [row for row in rows if _value(row, spec.get("across")) is not None]
    return [row for row in own if _value(row, spec["across"]) == x] if own else rows


def _point(rows, key):
    values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return (*spread(values), len(values)) if values else None


def _interval(rows, key):
    """The interval of the one row that has a value; None where several are averaged."""
    rows = [row for row in rows if row.get(key) is not None]
    return interval_of(rows[0], key) if len(rows) == 1 else None


def shown(value: Any) -> str:
    """A value as tables and pictures write it; a defense by its name."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return MISSING if value is None else DEFENSES.get(value, (str(value),))[0]


def _text(point, unit, decimals):
    if point is None:
        return MISSING
    mean, deviation, count = point
    text = f"{mean / unit:.{decimals}f}"
    return text if deviation is None else f"{text} ± {deviation / unit:.{decimals}f} ({count})"


def _notes(rows, spec):
    """What the headings mean, the seeds, and what else cells average over."""
    if is_cost(spec):
        yield "s: seconds that a stage took; GB: its peak memory in 10^9 bytes."
    else:
        for short, _, meaning, *_ in map(MEASURES.get, _measures(spec, rows)):
            yield f"{short}: {meaning}."
        yield f"Columns: {spec['across']}; avg: mean over the columns that every row has."
    where = spec.get("where") or {}
    if where:
        yield f"Only {', '.join(f'{name} {shown(_value(where, name))}' for name in where)}."
    seeds = list(dict.fromkeys(str(row.get("seed")) for row in rows))
    yield f"{len(seeds)} seed{'s' * (len(seeds) > 1)} ({', '.join(seeds)})."
    # Axes in which rows of one place and seed differ.
    apart, places = (spec.get("across"), _down(spec), "seed"), {}
    for row in rows:
        places.setdefault(tuple(_value(row, name) for name in apart), []).append(row)
    pooled = [
        name
        for name in dict.fromkeys(key for row in rows for key in row)
        if name not in (*MEASURES, *apart, *_COUNTS, "role", "cell")
        and not name.endswith(("_seconds", "_memory_bytes"))
        and any(len({_value(row, name) for row in group}) > 1 for group in places.values())
    ]
    if pooled:
        yield f"Cells average over {', '.join(pooled)}."
    if pooled or len(seeds) > 1:
        yield f"±: sample standard deviation (number of {'runs' if pooled else 'seeds'})."
    if any(row.get(column) for row in rows for column in _COUNTS):
        yield "[low, high]: Wilson's 95 % interval of one run's prompts."
