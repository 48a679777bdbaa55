"""Tables and plots from report.json alone."""

from pathlib import Path

# Fixed colours, so that a score looks the same in every picture (Okabe and Ito's palette).
_COLOURS = {
    "wanda": "#0072B2",
    "wanda-response": "#009E73",
    "magnitude": "#E69F00",
    "random": "#999999",
}
_MARKERS = {"base": ("s", "#56B4E9"), "aligned": ("^", "#000000"), "attacked": ("X", "#D55E00")}
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
        f"lowest HS on the {budget['chosen_on']} split among those whose FA there is at most "
        f"{budget['max_accuracy_drop']:g} points below the attacked model's"
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
    # Not pyplot: it would keep the figure, and pick a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    taken = []
    attacked = report["models"]["attacked"]
    by_score = {}
    for point in report["sweep"]:
        by_score.setdefault(point["score"], []).append(point)
    for score, points in by_score.items():
        points = sorted(points, key=lambda point: point["ratio"])
        places = [_place(attacked), *(_place(point["test"]) for point in points)]
        colour = _COLOURS.get(score)
        (line,) = axes.plot(
            *zip(*places, strict=True), color=colour, linewidth=1.6, alpha=0.8, zorder=2
        )
        axes.scatter(
            *zip(*places[1:], strict=True), color=line.get_color(), s=26, zorder=3, label=score
        )
        for place, point in zip(places[1:], points, strict=True):
            _label(axes, place, f"{point['ratio']:g}", line.get_color(), taken)
    for name, (marker, colour) in _MARKERS.items():
        place = _place(report["models"][name])
        axes.scatter(
            *place, marker=marker, color=colour, edgecolor="white", s=150, zorder=4, label=name
        )
    best = report.get("best")
    if best is not None:
        axes.scatter(
            *_place(best["test"]),
            facecolor="none",
            edgecolor="#CC79A7",
            linewidth=2.2,
            s=260,
            zorder=5,
            label=f"best: {best['score']} at {best['ratio']:g}",
        )
    axes.set_xlabel("finetune accuracy FA, % (higher is better)")
    axes.set_ylabel("harmful score HS, % (lower is better)")
    axes.set_xlim(-5, 105)
    axes.set_ylim(-5, 105)
    axes.set_title(
        f"Pruned after fine-tuning: {report['model']['name']}, test split, points named by ratio",
        fontsize=11,
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    path = Path(path)
    figure.savefig(path)
    return path


def _place(scores):
    return scores["finetune_accuracy"], scores["harmful_score"]


def _label(axes, place, text, colour, taken):
    """Write beside a point, further away where another label already is."""
    # In units of the axes: a label is about 3.4 wide and 2.2 high at this size.
    offsets = [
        (dx, dy)
        for distance in (1.0, 1.9, 2.8, 3.7)
        for dx, dy in (
            *((1.2 * distance, 1.2 * distance), (1.2 * distance, -2.6 * distance)),
            *((-4.2 * distance, 1.2 * distance), (-4.2 * distance, -2.6 * distance)),
        )
    ]
    x, y = next(
        (
            (place[0] + dx, place[1] + dy)
            for dx, dy in offsets
            if all(abs(place[0] + dx - u) > 3.6 or abs(place[1] + dy - v) > 2.3 for u, v in taken)
        ),
        (place[0] + 1.2, place[1] + 1.2),
    )
    taken.append((x, y))
    axes.annotate(
        text,
        place,
        xytext=(x, y),
        textcoords="data",
        color=colour,
        fontsize=8,
        zorder=6,
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6},
    )
