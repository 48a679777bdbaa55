"""Pictures: an experiment's tables, and what a sweep gains in safety for what it costs."""

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from antidote_fast.experiments import tables
from antidote_fast.experiments.tables import DEFENSES, shown

# Fixed colours, so that a score looks the same in every picture (Okabe and Ito's palette).
_COLOURS = {
    "wanda": "#0072B2",
    "wanda-response": "#009E73",
    "wanda-preserve": "#56B4E9",
    "magnitude": "#E69F00",
    "random": "#999999",
}
# A marker, a colour and a name by model.
_MODELS = {
    "base": ("s", "#56B4E9", "base"),
    "aligned": ("^", "#000000", "aligned"),
    "clean": ("P", "#009E73", "clean (p = 0)"),
    "attacked": ("X", "#D55E00", "attacked"),
    "unpruned": ("X", "#D55E00", "unpruned"),
}
# A line and a marker by scope.
_SCOPES = {"row": ("-", "o"), "tensor": ("--", "s"), "global": ("-.", "D")}
_LIMITS = (-7, 113)  # wider than 0 to 100, to make room for labels
_OTHERS = [("#0072B2", "P"), ("#999999", "X"), *(style[1:] for style in DEFENSES.values())]


def _panels(width, height, number=1, beside=0.0, least=0.0):
    """A figure and its axes, each with a grid, at most three side by side.

    Each is of so many inches; ``beside`` is for a legend, ``least`` the figure's least width.
    """
    # Not pyplot: it would keep the figure, and pick a window system.
    from matplotlib.figure import Figure

    lines = 1 if number <= 3 else 2
    columns = math.ceil(number / lines)
    size = (max(width * columns + beside, least), height * lines)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[number:]:
        axes.remove()
    for axes in panels[:number]:
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, panels[:number]


def plot(rows: Sequence[dict], spec: dict, path: str | os.PathLike) -> None:
    """Draw a table: a panel a measure, a line a defense; or the stages' seconds as stacked bars.

    Args:
        rows, spec: as :func:`tables.table`; ``log`` holds where all columns are above 0.
        path: the PNG to write.
    """
    contents, cost = tables.table(rows, spec), tables.is_cost(spec)
    measures = ("seconds",) if cost else contents["measures"]
    height = 1.6 + 0.45 * len(contents["rows"]) if cost else 4.5
    # Room for the title and the legend, at some 0.09 inches a letter.
    legend = max((len(shown(row["name"])) for row in contents["rows"]), default=0)
    least = 0.5 + 0.09 * len(spec["title"])
    figure, panels = _panels(
        6.5 if cost else 4.2, height, len(measures), 0.8 + 0.09 * legend, least
    )
    figure.suptitle(spec["title"], fontsize=12, parse_math=False)
    for axes, measure in zip(panels, measures, strict=True):
        if not contents["rows"]:
            axes.text(0.5, 0.5, "no results", ha="center", transform=axes.transAxes)
        elif cost:
            _draw_cost(axes, contents["rows"])
        else:
            _draw_lines(axes, contents, measure, spec.get("log"))
    if contents["rows"]:
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right center", frameon=False)
    figure.savefig(path, format="png")


def _draw_lines(axes, contents, measure, log):
    columns, rows = contents["columns"], contents["rows"]
    is_text = any(isinstance(x, str) for x in columns)
    log = log and not is_text and min(columns, default=0) > 0
    places = list(range(len(columns)) if is_text else map(math.log10, columns) if log else columns)
    first, last = min(places, default=0), max(places, default=0)
    width = last - first or 1.0
    gap = min((b - a for a, b in itertools.pairwise(places)), default=width)
    step = min(0.012 * width, 0.12 * gap)  # between lines, so that equal points stay visible
    _, label, _, unit, _ = tables.MEASURES[measure]
    others = iter(_OTHERS * len(rows))
    for i, row in enumerate(rows):
        colour, marker = DEFENSES[row["name"]][1:] if row["name"] in DEFENSES else next(others)
        shift = step * (i - (len(rows) - 1) / 2)
        points = zip(places, row["cells"][measure], row["intervals"][measure], strict=True)
        points = [(at + shift, *point[:2], ends) for at, point, ends in points if point is not None]
        # Below and above: the standard deviation, or one run's interval.
        bars = [_bar(mean, deviation, ends, unit) for _, mean, deviation, ends in points]
        bars = list(zip(*bars, strict=True)) or None
        if bars and all(map(math.isnan, bars[0])):
            bars = None  # and none in the legend, where there is one seed without counts
        axes.errorbar(
            [10**x if log else x for x, *_ in points],
            [mean / unit for _, mean, *_ in points],
            bars,
            color=colour,
            marker=marker,
            markersize=11 if marker == "*" else 7,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=1.0,
            capsize=2.5,
            label=shown(row["name"]),
        )
    axes.set_xscale("log" if log else "linear")
    axes.minorticks_off()
    edges = (first - 0.07 * width, last + 0.07 * width)
    axes.set_xlim(*(10**x if log else x for x in edges))
    ticks = []  # those that have room for their labels
    for at, x in zip(places, columns, strict=True):
        if not ticks or at - ticks[-1][0] > 0.06 * width:
            ticks.append((at, shown(x)))
    axes.set_xticks([10**at if log else at for at, _ in ticks], [text for _, text in ticks])
    if is_text and sum(len(text) + 2 for _, text in ticks) > 42:
        axes.tick_params(axis="x", rotation=25)
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")
    if measure in tables.PERCENTS:
        axes.set_ylim(-3, 103)
    axes.set(xlabel=contents["across"], ylabel=label)


def _bar(mean, deviation, interval, unit):
    """How far an error bar reaches below and above."""
    if deviation is not None:
        return deviation / unit, deviation / unit
    if interval is None:
        return math.nan, math.nan
    # Rounded shares may lie a hair outside of their interval.
    return max(0.0, mean - interval[0]), max(0.0, interval[1] - mean)


def _draw_cost(axes, rows):
    names = [shown(row["name"]) for row in rows]
    ends, texts = [0.0] * len(rows), [[] for _ in rows]
    for i, (stage, colour) in enumerate(tables.STAGES.values()):
        points = [row["cells"]["seconds"][i] or (0.0, None, 0) for row in rows]
        axes.barh(names, [mean for mean, *_ in points], left=ends, color=colour, label=stage)
        ends = [end + mean for end, (mean, *_) in zip(ends, points, strict=True)]
        for text, (mean, _, count) in zip(texts, points, strict=True):
            text += [f"{mean:,.0f}"] if count else []
    for y, (end, text) in enumerate(zip(ends, texts, strict=True)):
        text = f"{' + '.join(text)} s" if text else tables.MISSING
        axes.text(end, y, f" {text}", va="center", fontsize=9)
    axes.set(xlim=(0, 1.4 * max(ends) or 1.0), xlabel="seconds")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def plot_demo(report: dict, path: str | os.PathLike) -> None:
    """Draw a demo's models and what each ratio gives on the test prompts.

    Args:
        report: the contents of a demo's report.json.
        path: the PNG to write.
    """
    title = f"Pruned after fine-tuning: {report['model']}, test prompts, points named by ratio"
    models = {name: report["models"][name] for name in _MODELS if name in report["models"]}
    best = report["best"] and ("best", report["best"], report["models"]["pruned"])
    _draw(path, title, models, "attacked", report["sweep"], best)


def plot_sweep(report: dict, path: str | os.PathLike) -> None:
    """Draw what a sweep measured: a curve a score and scope, the budget, and what is recommended.

    Args:
        report: the contents of a sweep's report.json.
        path: the PNG to write.
    """
    config, best = report["config"], report["recommended"]
    # Rows without a harmful score, which was not needed to tell that they cost too much.
    unplaced = sum(row["harmful_score"] is None for row in report["rows"])
    title = f"Sweep of {Path(config['adapter'] or config['model_name_or_path']).name}"
    title += ", held-out prompts, points named by ratio"
    if unplaced:
        title += f"; {unplaced} over the budget not shown"
    if report.get("clean") is None:
        title += "; no p = 0 model given"
    least = report["budget"]["min_finetune_accuracy"]
    models = {"clean": report.get("clean"), "unpruned": report["unpruned"]}
    models = {name: metrics for name, metrics in models.items() if metrics is not None}
    best = best and ("recommended", best, best)
    _draw(path, title, models, "unpruned", report["rows"], best, least)


def _draw(path, title, models, start, rows, best, least=0):
    """Harmful score against finetune accuracy: a curve a score and scope, in the order of ratios.

    Every curve begins at the model ``start``, one of ``models`` ({name: metrics}); ``rows`` are a
    sweep's. ``best`` is (what it is, its row, its metrics) of what was chosen, or None; ``least``,
    drawn where it is above 0, is the accuracy that is just within the budget.
    """
    figure, [axes] = _panels(10, 7)
    curves = {}
    for row in rows:
        points = curves.setdefault((row["score"], row["scope"]), [])
        if row["harmful_score"] is not None:
            points.append((row["ratio"], _place(row)))
    every = [_place(metrics) for metrics in models.values()]
    every += [place for points in curves.values() for _, place in points]
    # Where nothing may be written: (left, bottom, width).
    taken = [(x - 1.2, y - 1.2, 2.4) for x, y in every]
    labels = []
    for (score, scope), points in curves.items():
        style, dot = _SCOPES[scope]
        points.sort()
        places = [_place(models[start]), *(place for _, place in points)]
        (line,) = axes.plot(
            *zip(*places, strict=True),
            color=_COLOURS.get(score),
            linestyle=style,
            marker=dot,
            markersize=5,
            markevery=slice(1, None),
            label=f"{score}, {scope}",
            zorder=2,
        )
        for place, ratios in _groups(points):
            text = f"{ratios[0]:g}" if len(ratios) == 1 else f"{ratios[0]:g} to {ratios[-1]:g}"
            labels.append((place, text, line.get_color()))
    for place, text, colour in labels:
        _label(axes, place, text, colour, taken)
    for name, metrics in models.items():
        marker, colour, label = _MODELS[name]
        _draw_intervals(axes, metrics, colour)
        look = {"marker": marker, "color": colour, "edgecolor": "white", "label": label}
        axes.scatter(*_place(metrics), s=150, zorder=4, **look)
    if best is not None:
        word, row, metrics = best
        label = f"{word}: {row['score']}, {row['scope']} at {row['ratio']:g}"
        look = {"facecolor": "none", "edgecolor": "#CC79A7", "linewidth": 2.2}
        axes.scatter(*_place(metrics), s=260, zorder=5, label=label, **look)
    if least > 0:
        look = {"color": "#555555", "linestyle": (0, (1, 2))}
        axes.axvline(least, label=f"budget: FA {least:g}", zorder=1, **look)
    ticks = range(0, 101, 20)
    axes.set(xlim=_LIMITS, ylim=_LIMITS, xticks=ticks, yticks=ticks)
    axes.set_xlabel(tables.MEASURES["finetune_accuracy"][1])
    axes.set_ylabel(tables.MEASURES["harmful_score"][1])
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, format="png")


def _draw_intervals(axes, metrics, colour):
    """Wilson's 95 % intervals of a model's two metrics, where their counts are there."""
    row, (x, y) = tables.headline(metrics), _place(metrics)
    for name, at, bar in (("finetune_accuracy", x, "xerr"), ("harmful_score", y, "yerr")):
        interval = tables.interval_of(row, name)
        if interval is not None:
            ends = [[each] for each in _bar(at, None, interval, 1)]
            look = {"ecolor": colour, "elinewidth": 1.0, "alpha": 0.6, "zorder": 3}
            axes.errorbar(x, y, **{bar: ends}, fmt="none", **look)


def _place(scores):
    return scores["finetune_accuracy"], scores["harmful_score"]


def _groups(points):
    """Neighbours on a curve that nearly coincide get one label: (place, ratios)."""
    groups = []
    for ratio, place in points:
        near = groups and max(abs(a - b) for a, b in zip(groups[-1][0], place, strict=True)) <= 3
        if near:
            groups[-1][1].append(ratio)
        else:
            groups.append((place, [ratio]))
    return groups


def _label(axes, place, text, colour, taken):
    """Write beside a point, further away where another label already is."""
    from matplotlib.patheffects import withStroke

    # In units of the axes, as large as the text is drawn.
    width, height = 1.15 * len(text), 2.2
    candidates = [
        (place[0] + (dx if dx > 0 else dx - width), place[1] + dy)
        for far in (1.0, 2.0, 3.0, 4.5, 6.0, 8.0)
        for dx in (1.3 * far, -1.3 * far)
        for dy in (-2.6 * far, 1.0 * far)
    ]

    def free(x, y):
        low, high = _LIMITS
        inside = low + 1 <= x <= high - width and low + 1 <= y <= high - height
        return inside and not any(
            x < u + w and u < x + width and abs(y - v) < height for u, v, w in taken
        )

    x, y = next((spot for spot in candidates if free(*spot)), candidates[0])
    taken.append((x, y, width))
    arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7}
    look = {"color": colour, "fontsize": 8, "arrowprops": arrow}
    look["path_effects"] = [withStroke(linewidth=2, foreground="white")]
    axes.annotate(text, place, xytext=(x, y), zorder=6, **look)
