"""Tables and plots from report.json alone."""

from pathlib import Path

# Fixed colours, so that a score looks the same in every picture (Okabe and Ito's palette).
_COLOURS = {
    "wanda": "#0072B2",
    "wanda-response": "#009E73",
    "wanda-preserve": "#56B4E9",
    "magnitude": "#E69F00",
    "random": "#999999",
}
_MARKERS = {"base": ("s", "#56B4E9"), "aligned": ("^", "#000000"), "attacked": ("X", "#D55E00")}
# A line and a marker by scope.
_SCOPES = {"row": ("-", "o"), "tensor": ("--", "s"), "global": ("-.", "D")}
_LIMITS = (-7, 113)  # wider than 0 to 100, to make room for labels
METRICS = ("harmful_score", "finetune_accuracy", "benign_refusal_rate")


def demo_rows(report) -> list[dict]:
    """The models of a demo's report as rows: base, aligned, attacked, then each pruned one.

    Returns:
        Dicts with ``model``, ``ratio`` (None where nothing was pruned), the three metrics on the
        test split in percent, and ``best``: whether it is the one that was chosen.
    """
    rows = [
        {"model": name, "ratio": None, "best": False} | {key: scores[key] for key in METRICS}
        for name, scores in report["models"].items()
    ]
    best = report.get("best")
    for point in report["sweep"]:
        chosen = best is not None and (best["score"], best["ratio"]) == (
            point["score"],
            point["ratio"],
        )
        rows.append(
            {"model": point["score"], "ratio": point["ratio"], "best": chosen}
            | {key: point["test"][key] for key in METRICS}
        )
    return rows


def demo_table(report):
    """The rows of `demo_rows` as a rich table."""
    from rich.table import Table

    title = "Held-out prompts, %: harmful score, finetune accuracy, benign refusals"
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for name in ("ratio", "HS (lower)", "FA (higher)", "BR (lower)"):
        table.add_column(name, justify="right")
    previous = None
    for row in demo_rows(report):
        if row["model"] != previous and row["ratio"] is not None:
            table.add_section()
        name = row["model"] if row["model"] != previous else ""
        previous = row["model"]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:g}"
        table.add_row(
            f"{name} <- best" if row["best"] else name,
            ratio,
            *(f"{row[key]:.1f}" for key in METRICS),
            style="bold" if row["best"] else None,
        )
    return table


def best_line(report) -> str:
    """One sentence: the ratio that was chosen, how, and what it does on the test split."""
    budget = report["budget"]
    rule = (
        f"lowest HS on the {budget['chosen_on']} split among those that lower it there and whose "
        f"FA there is at most {budget['max_accuracy_drop']:g} points below the attacked model's"
    )
    best = report.get("best")
    if best is None:
        return f"Best: none. No pruned model qualifies ({rule})."
    attacked = report["models"]["attacked"]
    return (
        f"Best: {best['score']} at ratio {best['ratio']:g} ({rule}). Test: HS "
        f"{attacked['harmful_score']:.1f} -> {best['test']['harmful_score']:.1f}, FA "
        f"{attacked['finetune_accuracy']:.1f} -> {best['test']['finetune_accuracy']:.1f}."
    )


def plot_pareto(report, path) -> Path:
    """Draw harmful score against finetune accuracy: one curve a score, its points named by ratio.

    Args:
        report: the contents of a demo's report.json.
        path: the picture to write; its ending says which kind.

    Returns:
        The path.
    """
    curves = {}
    for point in report["sweep"]:
        curves.setdefault(point["score"], []).append((point["ratio"], _place(point["test"])))
    best = report.get("best")
    return _draw(
        path,
        f"Pruned after fine-tuning: {report['model']['name']}, test split, points named by ratio",
        {name: (_place(report["models"][name]), *look) for name, look in _MARKERS.items()},
        "attacked",
        [(score, _COLOURS.get(score), *_SCOPES["row"], points) for score, points in curves.items()],
        best and (f"best: {best['score']} at {best['ratio']:g}", _place(best["test"])),
    )


def plot_sweep(report, path) -> Path:
    """Draw what a sweep measured: a curve a score and scope, the budget, and what is recommended.

    Rows without a harmful score, which was not needed to tell that they cost too much, have no
    place.

    Args:
        report: the contents of a sweep's report.json.
        path: the picture to write; its ending says which kind.

    Returns:
        The path.
    """
    curves, unplaced = {}, 0
    for row in report["rows"]:
        points = curves.setdefault((row["score"], row["scope"]), [])
        if row["harmful_score"] is None:
            unplaced += 1
        else:
            points.append((row["ratio"], _place(row)))
    best, config = report["recommended"], report["config"]
    least = report["budget"]["min_finetune_accuracy"]
    label = best and f"recommended: {best['score']}, {best['scope']} at {best['ratio']:g}"
    title = f"Sweep of {Path(config['adapter'] or config['model_name_or_path']).name}"
    title += ", validation prompts, points named by ratio"
    if unplaced:
        title += f"; {unplaced} over the budget not shown"
    return _draw(
        path,
        title,
        {"unpruned": (_place(report["unpruned"]), *_MARKERS["attacked"])},
        "unpruned",
        [
            (f"{score}, {scope}", _COLOURS.get(score), *_SCOPES[scope], points)
            for (score, scope), points in curves.items()
        ],
        best and (label, _place(best)),
        least if least > 0 else None,
    )


def _draw(path, title, models, start, curves, best, least=None):
    """Harmful score against finetune accuracy, places as (FA, HS).

    Args:
        path: the picture.
        title: its title.
        models: {name: (place, marker, colour)} of models that no curve made.
        start: the one of them at which every curve begins.
        curves: (label, colour or None, line style, marker, [(ratio, place)]) each; points go by
            ratio.
        best: (label, place) of what was chosen, or None.
        least: the accuracy that is just within the budget, or None.
    """
    # Not pyplot: it would keep the figure, and pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    curves = [(*look, sorted(points)) for *look, points in curves]
    every = [place for place, *_ in models.values()]
    every += [place for *_, points in curves for _, place in points]
    # Where nothing may be written: (left, bottom, width).
    taken = [(x - 1.2, y - 1.2, 2.4) for x, y in every]
    labels = []
    for label, colour, style, dot, points in curves:
        places = [models[start][0], *(place for _, place in points)]
        (line,) = axes.plot(
            *zip(*places, strict=True),
            color=colour,
            linestyle=style,
            linewidth=1.6,
            alpha=0.8,
            zorder=2,
        )
        xs, ys = [x for x, _ in places[1:]], [y for _, y in places[1:]]
        axes.scatter(xs, ys, marker=dot, color=line.get_color(), s=26, zorder=3, label=label)
        for place, ratios in _groups(points):
            text = f"{ratios[0]:g}" if len(ratios) == 1 else f"{ratios[0]:g} to {ratios[-1]:g}"
            labels.append((place, text, line.get_color()))
    for place, text, colour in labels:
        _label(axes, place, text, colour, taken)
    for name, (place, marker, colour) in models.items():
        axes.scatter(
            *place, marker=marker, color=colour, edgecolor="white", s=150, zorder=4, label=name
        )
    if best is not None:
        label, place = best
        axes.scatter(
            *place,
            facecolor="none",
            edgecolor="#CC79A7",
            linewidth=2.2,
            s=260,
            zorder=5,
            label=label,
        )
    if least is not None:
        axes.axvline(
            least, color="#555555", linestyle=(0, (1, 2)), label=f"budget: FA {least:g}", zorder=1
        )
    axes.set_xlabel("finetune accuracy FA, % (higher is better)")
    axes.set_ylabel("harmful score HS, % (lower is better)")
    axes.set_xlim(*_LIMITS)
    axes.set_ylim(*_LIMITS)
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(range(0, 101, 20))
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    path = Path(path)
    figure.savefig(path)
    return path


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
    written = axes.annotate(
        text,
        place,
        xytext=(x, y),
        textcoords="data",
        color=colour,
        fontsize=8,
        zorder=6,
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7},
    )
    written.set_path_effects([withStroke(linewidth=2, foreground="white")])
