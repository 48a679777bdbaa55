"""Folders, adapters, norms and reports in a few lines each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antidote_fast.system.text import number, table

_COLUMNS = ("harmful_score", "finetune_accuracy", "helped_rate", "benign_refusal_rate")
_HEADS = tuple(name.replace("_", " ") for name in _COLUMNS)


def summary(report: Mapping[str, Any], output_dir: str | Path) -> str:
    """One line for a person about what a stage did and where it is."""
    seconds = report.get("seconds")
    if isinstance(seconds, dict):  # by step
        seconds = sum(seconds.values())
    took = f" in {seconds:.1f} s" if seconds is not None else ""
    lines = _LINES.get(report.get("stage"))
    if lines is not None:
        return lines(report, took, output_dir)
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
        pairs = metrics.items() if isinstance(metrics, dict) else ()
        numbers = ((name, value) for name, value in pairs if isinstance(value, (int, float)))
        what = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in numbers)
    return f"{what or report.get('stage', 'done')}{took}{_not_used(report)}: {output_dir}"


def _not_used(report):
    """How many records of a data set were not used, where that is some."""
    data = report.get("data")
    parts = [
        f", {counts['num_used']:,} of {counts['num_records']:,} records of {name} used"
        for name, counts in (data if isinstance(data, dict) else {}).items()
        if counts["num_used"] < counts["num_records"]
    ]
    return "".join(parts)


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
    words = {"skipped": "were done before", "failed": "set aside", "left": "left"}
    parts += [f"{counts[key]} {text}" for key, text in words.items() if counts[key]]
    return f"{', '.join(parts)}: {output_dir}"


def _sweep_lines(report, took, output_dir):
    """The rows, what is recommended, and the line that makes it."""
    heads = ("score", "scope", "ratio", "removed", *_HEADS)
    best = report["recommended"]
    models = {"clean": report.get("clean"), "unpruned": report["unpruned"]}
    rows = [heads]
    rows += [(name, "", "", "", *_percents(each)) for name, each in models.items() if each]
    for row in report["rows"]:
        what = (row["score"], row["scope"], f"{row['ratio']:g}", f"{row['achieved']:.2%}")
        mark = "<- recommended" if row == best else row["reason"]
        harmful = row.get("harmful", {})
        nothing = harmful.get("num_empty", 0) + harmful.get("num_garbled", 0)
        notes = (mark, f"empty or garbled: {nothing}" if nothing else None)
        rows.append((*what, *_percents(row), *notes))
    lines = [table(rows, left=2)]
    if best is None:
        lines.append(f"recommended: none, {report['why_none']}")
    else:
        chosen = f"{best['score']}, {best['scope']} scope, ratio {best['ratio']:g}"
        lines += [f"recommended: {chosen}", f"  {report['command']}"]
    stopped = report["early_stopping"]
    left_out, every = stopped["candidates_left_out"], stopped["candidates"]
    lines.append(
        f"{every - left_out} of {every} candidates tried, {stopped['answers']:,} answers"
        f"{took}: {output_dir}"
    )
    return "\n".join(lines)


def _percents(metrics):
    return [number(metrics.get(column)) for column in _COLUMNS]


def _run_lines(report, took, output_dir):
    """The headline metrics of several models, a row each."""
    models = report["models"]
    rows = [("", *_HEADS), *((name, *_percents(metrics)) for name, metrics in models.items())]
    return f"{table(rows)}\n{len(models)} models{took}: {output_dir}"


def _evaluate_lines(report, took, output_dir):
    """A row a condition, then the worst, the judges' agreement and the other model."""
    conditions = report["conditions"]
    heads = ("", "HS", "refused", "off-task", "broken", "helped", "BR", "FA")
    rows = [heads, *((name, *_rates(told)) for name, told in conditions.items())]
    lines = [table(rows), *_headline(report)] if any(conditions.values()) else []
    for kind, name in (("harmful", "harmful_score"), ("benign", "helped_rate")):
        if (worst := report["metrics"]["worst"].get(kind)) is not None:
            where = f"{worst['condition']}, {worst['set']}"
            what = f"{_word(name)} {worst[name]:.1f} {_range(worst['interval'])}"
            lines.append(f"worst {what}: {where}")
    for judges, found in report["agreement"].items():
        low, high = found["interval"]
        lines.append(
            f"kappa of {judges}: {found['kappa']:.2f} [{low:.2f}, {high:.2f}], "
            f"{found['num']:,} answers"
        )
    for condition, sets in (report["compared"] or {}).items():
        for name, found in sets.items():
            lines.append(
                f"{condition}, {name}: {found['metric']} {found['first']:.1f}, the other model "
                f"{found['second']:.1f} of {found['num_prompts']:,} prompts; McNemar p = "
                f"{found['p']:.2g} ({found['b']} against {found['c']})"
            )
    drift = report["metrics"].get("drift")
    if drift is not None:
        lines.append(f"embedding drift {drift['embedding_drift_per_token']:.3g} per token")
    done = f"{len(conditions)} conditions{took}: {output_dir}"
    return "\n".join([*lines, done])


def _rates(told):
    """The cells of a condition, all sets of a kind together."""
    harmful, benign = list(told.get("harmful", {}).values()), list(told.get("benign", {}).values())
    counts = ("complied", "refused", "off_task", "broken")
    shares = [_share(harmful, f"num_{name}") for name in counts]
    shares += [_share(benign, f"num_{name}") for name in ("helped", "refused")]
    return [number(share) for share in (*shares, told.get("task", {}).get("finetune_accuracy"))]


def _share(rates, count):
    if not rates:
        return None
    return 100 * sum(each[count] for each in rates) / sum(each["num_prompts"] for each in rates)


def _headline(report):
    """The intervals of the first condition's metrics, in one line."""
    metrics = report["metrics"]
    told = [
        (name, metrics[kind][interval])
        for name, kind, interval in (
            ("harmful_score", "harmful", "interval"),
            ("finetune_accuracy", "task", "interval"),
            ("helped_rate", "benign", "interval"),
            ("benign_refusal_rate", "benign", "refusal_interval"),
        )
        if name in metrics
    ]
    parts = [f"{_word(name)} {metrics[name]:.1f} {_range(interval)}" for name, interval in told]
    return [f"{next(iter(report['conditions']))}: {', '.join(parts)} (95 %)"] if parts else []


def _word(metric):
    return metric.replace("_", " ")


def _range(interval):
    low, high = interval
    return f"[{low:.1f}, {high:.1f}]"


_LINES = {
    "evaluate": _evaluate_lines,
    "run": _run_lines,
    "experiment": _experiment_lines,
    "sweep": _sweep_lines,
    "fleet": _fleet_line,
}
