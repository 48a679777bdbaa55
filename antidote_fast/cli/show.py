"""Folders, adapters, norms and reports in a few lines each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antidote_fast.system.text import number, table


def summary(report: Mapping[str, Any], output_dir: str | Path) -> str:
    """One line for a person about what a stage did and where it is."""
    seconds = report.get("seconds")
    if isinstance(seconds, dict):  # by step
        seconds = sum(seconds.values())
    took = f" in {seconds:.1f} s" if seconds is not None else ""
    if report.get("stage") == "run":
        return f"{_table(report['models'])}\n{len(report['models'])} models{took}: {output_dir}"
    if report.get("stage") == "experiment":
        return _experiment_lines(report, took, output_dir)
    if report.get("stage") == "sweep":
        return _sweep_lines(report, took, output_dir)
    if report.get("stage") == "fleet":
        return _fleet_line(report, took, output_dir)
    if report.get("stage") == "prune" and "num_pruned" in report:
        what = (
            f"{'reverted' if report.get('reverted') else 'removed'} {report['num_pruned']:,} of "
            f"{report['num_weights']:,} weights "
            f"({report['achieved']:.2%}) in {report['num_layers']} layers"
        )
        if report.get("num_preserved"):
            what += f", kept {report['num_preserved']:,} that other data need"
    elif report.get("stage") == "calibrate":
        what = f"norms over {report['num_sequences']} sequences, {report['num_tokens']} tokens"
    elif report.get("training"):
        training = report["training"]
        what = (
            f"{report['stage']}: {training['steps']} steps, loss {training['first_loss']:.3f} to "
            f"{training['last_loss']:.3f}"
        )
    else:
        metrics = report.get("metrics")
        numbers = metrics if isinstance(metrics, dict) else {}
        pairs = ((name.replace("_", " "), value) for name, value in numbers.items())
        what = ", ".join(f"{k} {v:.1f}" for k, v in pairs if isinstance(v, (int, float)))
    return f"{what or report.get('stage', 'done')}{took}: {output_dir}"


def _experiment_lines(report, took, output_dir):
    counts = [f"{report['num_computed']} cells computed{took}"]
    if report["num_left"]:
        counts.append(f"{report['num_left']} left, the same command goes on")
    if report["failed"]:
        counts.append(f"{len(report['failed'])} failed")
    text = Path(output_dir) / "tables.md"
    shown = [text.read_text(encoding="utf-8")] if text.is_file() else []
    return "\n".join([*shown, *report["failed"], f"{', '.join(counts)}: {output_dir}"])


def _fleet_line(report, took, output_dir):
    counts = report["counts"]
    parts = [f"{counts['done']} of {counts['jobs']} adapters pruned{took}"]
    if report["adapters_per_hour"]:
        parts.append(f"{report['adapters_per_hour']:,.0f} an hour")
    parts += [
        f"{counts[key]} {words}"
        for key, words in (
            ("skipped", "were done before"),
            ("failed", "set aside"),
            ("left", "left"),
        )
        if counts[key]
    ]
    return f"{', '.join(parts)}: {output_dir}"


def _sweep_lines(report, took, output_dir):
    """The rows, what is recommended, and the line that makes it."""
    columns = ("harmful_score", "finetune_accuracy", "benign_refusal_rate")
    heads = ("score", "scope", "ratio", "removed", *(name.replace("_", " ") for name in columns))
    best = report["recommended"]
    rows = [heads, ("unpruned", "", "", "", *_percents(report["unpruned"], columns))]
    for row in report["rows"]:
        what = (row["score"], row["scope"], f"{row['ratio']:g}", f"{row['achieved']:.2%}")
        mark = "<- recommended" if row == best else row["reason"]
        harmful = row.get("harmful", {})
        nothing = harmful.get("num_empty", 0) + harmful.get("num_garbled", 0)
        notes = (mark, f"empty or garbled: {nothing}" if nothing else None)
        rows.append((*what, *_percents(row, columns), *notes))
    lines = [table(rows, left=2)]
    if best is None:
        lines.append(f"recommended: none, {report['why_none']}")
    else:
        lines += [
            f"recommended: {best['score']}, {best['scope']} scope, ratio {best['ratio']:g}",
            f"  {report['command']}",
        ]
    stopped = report["early_stopping"]
    left_out, every = stopped["candidates_left_out"], stopped["candidates"]
    lines.append(
        f"{every - left_out} of {every} candidates tried, {stopped['answers']:,} answers"
        f"{took}: {output_dir}"
    )
    return "\n".join(lines)


def _percents(metrics, columns):
    return [number(metrics.get(column)) for column in columns]


def _table(models):
    """The headline metrics of several models, a row each."""
    columns = ("harmful_score", "finetune_accuracy", "benign_refusal_rate")
    rows = [("", *(name.replace("_", " ") for name in columns))]
    rows += [(name, *_percents(metrics, columns)) for name, metrics in models.items()]
    return table(rows)
