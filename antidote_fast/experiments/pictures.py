"""An experiment's tables as pictures: a line a defense, or what each stage costs as bars."""

import itertools
import math
from pathlib import Path

from antidote_fast.experiments.tables import (
    DEFENSES,
    MEASURES,
    MISSING,
    PERCENTS,
    STAGES,
    is_cost,
    measures_of,
    shown,
    table,
)

_OTHERS = [("#0072B2", "P"), ("#999999", "X"), *(style[1:] for style in DEFENSES.values())]


def plot(rows, spec, path) -> Path:
    """Draw a table: a panel a measure, a line a defense; or the stages' seconds as stacked bars.

    Args:
        rows: an experiment's rows.
        spec: what :func:`check_spec` accepts; its ``log`` holds where all columns are above 0.
        path: the PNG to write.

    Returns:
        The path.
    """
    # Not pyplot: it would keep the figure, and pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    contents, cost = table(rows, spec), is_cost(spec)
    measures = ("seconds",) if cost else measures_of(spec)
    height = 1.6 + 0.45 * len(contents["rows"]) if cost else 4.5
    # Room for the title and the legend, at some 0.09 inches a letter.
    legend = max((len(shown(row["name"])) for row in contents["rows"]), default=0)
    width = (6.5 if cost else 4.2 * len(measures)) + 0.8 + 0.09 * legend
    width = max(width, 0.5 + 0.09 * len(spec["title"]))
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(spec["title"], fontsize=12, parse_math=False)
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
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
    return Path(path)


def _draw_lines(axes, contents, measure, log):
    columns, rows = contents["columns"], contents["rows"]
    is_text = any(isinstance(x, str) for x in columns)
    log = log and not is_text and min(columns, default=0) > 0
    places = list(range(len(columns)) if is_text else map(math.log10, columns) if log else columns)
    first, last = min(places, default=0), max(places, default=0)
    width = last - first or 1.0
    gap = min((b - a for a, b in itertools.pairwise(places)), default=width)
    step = min(0.012 * width, 0.12 * gap)  # between lines, so that equal points stay visible
    _, label, _, unit, _ = MEASURES[measure]
    others = iter(_OTHERS * len(rows))
    for i, row in enumerate(rows):
        colour, marker = DEFENSES[row["name"]][1:] if row["name"] in DEFENSES else next(others)
        shift = step * (i - (len(rows) - 1) / 2)
        points = zip(places, row["cells"][measure], strict=True)
        points = [(place + shift, *point[:2]) for place, point in points if point is not None]
        axes.errorbar(
            [10**x if log else x for x, *_ in points],
            [mean / unit for _, mean, _ in points],
            # No bar, and none in the legend, where there is one seed.
            [math.nan if sd is None else sd / unit for *_, sd in points]
            if any(sd is not None for *_, sd in points)
            else None,
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
    kept = []  # ticks that have room for their labels
    for at, x in zip(places, columns, strict=True):
        if not kept or at - kept[-1][0] > 0.06 * width:
            kept.append((at, shown(x)))
    axes.set_xticks([10**at if log else at for at, _ in kept], [text for _, text in kept])
    if is_text and sum(len(text) + 2 for _, text in kept) > 42:
        axes.tick_params(axis="x", rotation=25)
        for text in axes.get_xticklabels():
            text.set(horizontalalignment="right", rotation_mode="anchor")
    if measure in PERCENTS:
        axes.set_ylim(-3, 103)
    axes.set_xlabel(contents["across"])
    axes.set_ylabel(label)


def _draw_cost(axes, rows):
    names = [shown(row["name"]) for row in rows]
    ends, texts = [0.0] * len(rows), [[] for _ in rows]
    for i, (stage, colour) in enumerate(STAGES.values()):
        points = [row["cells"]["seconds"][i] or (0.0, None, 0) for row in rows]
        axes.barh(names, [mean for mean, *_ in points], left=ends, color=colour, label=stage)
        ends = [end + mean for end, (mean, *_) in zip(ends, points, strict=True)]
        for text, (mean, _, count) in zip(texts, points, strict=True):
            text += [f"{mean:,.0f}"] if count else []
    for y, (end, text) in enumerate(zip(ends, texts, strict=True)):
        text = f"{' + '.join(text)} s" if text else MISSING
        axes.text(end, y, f" {text}", va="center", fontsize=9)
    axes.set_xlim(0, 1.4 * max(ends) or 1.0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
