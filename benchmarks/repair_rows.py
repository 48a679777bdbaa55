"""Rows of ``repairs.py`` on the disk, and what is shown of them: a table, p-values, a picture."""

import csv
import json
from collections import Counter, defaultdict

from antidote_fast.evaluation.compare import compare_models
from antidote_fast.evaluation.rates import mcnemar, percent, wilson

KEY = ("align_seed", "learning_rate", "seed", "method", "scope", "ratio", "template")
HARMFUL = ("complied", "refused", "off_task", "broken")
ORDINARY = ("helped", "ordinary_refused", "ordinary_off_task", "ordinary_broken")
COUNTS = ("num_prompts", *HARMFUL, "num_ordinary", *ORDINARY, "num_task", "correct")
FIELDS = (*KEY, *COUNTS, "worst_set", "worst_score", "seconds")
NAMES = {
    "clean": "clean (p = 0)",
    "antidote": "plain Antidote",
    "antidote-preserve": "plain Antidote, preserving",
    "random": "random mask",
    "scale": "adapter scaled",
    "gates": "learned gates",
    "gates-two-templates": "learned gates, two templates",
    "noise-gates": "gates on a random adapter",
    "retrained": "retrained on the task",
}
"""What a method is called where it is shown; others have their own name."""
JUDGE = "refusal"
_CURVES = {
    ("antidote", "row"): ("#0072B2", "-"),
    ("antidote", "tensor"): ("#0072B2", "--"),
    ("antidote", "global"): ("#0072B2", ":"),
    ("antidote-preserve", "row"): ("#56B4E9", "-"),
    ("antidote-preserve", "tensor"): ("#56B4E9", "--"),
    ("antidote-preserve", "global"): ("#56B4E9", ":"),
    ("random", "row"): ("#999999", "-"),
    ("magnitude", "row"): ("#E69F00", "-"),
    ("scale", ""): ("#CC79A7", "-"),
}
_MARKS = {
    "aligned": ("^", "#000000"),
    "clean": ("P", "#009E73"),
    "attacked": ("X", "#D55E00"),
    "gates": ("*", "#009E73"),
    "gates-two-templates": ("*", "#0072B2"),
    "noise-gates": ("v", "#E69F00"),
    "retrained": ("d", "#CC79A7"),
}
_OTHERS = (("s", "#0072B2"), ("D", "#56B4E9"), ("s", "#999999"), ("D", "#E69F00"))


def shown(value):
    """A value of a key as the CSV holds it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def key_of(row):
    """What tells a row from all others."""
    return tuple(row[name] for name in KEY)


def verdicts_file(path):
    """The file of the verdicts beside a CSV: a line a row, no text."""
    return path.with_suffix(".verdicts.jsonl")


def append(path, row, verdicts):
    """Add a row, its verdicts first: a row that is in the CSV is whole.

    Args:
        path: the CSV.
        row: values by `FIELDS`.
        verdicts: as :func:`antidote_fast.evaluation.summary.verdict_rows` gives them.
    """
    told = [[each["kind"], each["set"], each["prompt"], _outcome(each)] for each in verdicts]
    with open(verdicts_file(path), "ab", buffering=0) as file:  # one write
        file.write(_line(key_of(row), told))
    new = not path.exists()
    with open(path, "a", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        if new:
            table.writeheader()
        table.writerow(row)


def _outcome(row):
    return row["correct"] if row["kind"] == "task" else row["verdicts"][JUDGE]


def _line(key, told):
    return (json.dumps({"key": key, "prompts": told}, separators=(",", ":")) + "\n").encode()


def merge(path, rows, verdicts):
    """Write rows and verdicts, as `read` gives them, in place of what is there."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(sorted(rows, key=key_of))
    lines = [_line(key, verdicts[key]) for key in sorted(verdicts)]
    verdicts_file(path).write_bytes(b"".join(lines))


def read(paths):
    """(rows, {key: prompts with their verdicts}) of several CSVs, each key once."""
    rows, verdicts = {}, {}
    for path in filter(lambda path: path.exists(), paths):
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                rows.setdefault(key_of(row), row)
        if verdicts_file(path).exists():
            for line in verdicts_file(path).read_text(encoding="utf-8").splitlines():
                told = json.loads(line)
                verdicts[tuple(told["key"])] = told["prompts"]
    return list(rows.values()), {key: verdicts[key] for key in rows if key in verdicts}


def label(row):
    """A row's method with its scope and its ratio, in words."""
    what = {"scale": "to"}.get(row["method"], "ratio")
    ratio = row["ratio"] and f"{what} {row['ratio']}"
    return ", ".join(filter(None, (NAMES.get(row["method"], row["method"]), row["scope"], ratio)))


def pooled(rows):
    """{(learning rate, template): {label: counts}}, all seeds together.

    The counts are `COUNTS`, ``cells``, and of the worst harmful set of any cell ``worst``, in
    percent. The aligned model, which no attack changes, stands under each learning rate.
    """
    rates = sorted({row["learning_rate"] for row in rows} - {""}, key=float) or [""]
    found = defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        for rate in [row["learning_rate"]] if row["learning_rate"] else rates:
            counts = found[rate, row["template"]][label(row)]
            counts.update({name: int(row[name]) for name in COUNTS})
            counts["cells"] += 1
            counts["worst"] = max(counts["worst"], float(row["worst_score"]))
    return {
        place: dict(found[place]) for place in sorted(found, key=lambda p: (float(p[0] or 0), p[1]))
    }


def table(rows, verdicts):
    """Markdown: of every method the shares with Wilson's intervals, then p-values of pairs."""
    lines = []
    for (rate, template), methods in pooled(rows).items():
        lines += [
            f"### Learning rate {rate}, template {template}",
            "",
            "| model | cells | HS | refused | off-task | broken | worst set | helped | BR | FA |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, counts in methods.items():
            cells = [
                _share(counts, "complied", "num_prompts"),
                *(f"{100 * counts[n] / counts['num_prompts']:.1f}" for n in HARMFUL[1:]),
                f"{counts['worst']:.1f}",
                _share(counts, "helped", "num_ordinary"),
                f"{100 * counts['ordinary_refused'] / counts['num_ordinary']:.1f}",
                _share(counts, "correct", "num_task"),
            ]
            lines.append(f"| {name} | {counts['cells']} | {' | '.join(cells)} |")
        found = _compared(rows, verdicts, rate, template)
        if found:
            lines += [
                "",
                "| first | second | of | prompts | first | second | b | c | p |",
                "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
                *found,
            ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _share(counts, what, of):
    low, high = wilson(counts[what], counts[of])
    return f"{100 * counts[what] / counts[of]:.1f} [{low:.1f}, {high:.1f}]"


def _compared(rows, verdicts, rate, template):
    """Lines of McNemar's tests: gates against the attacked model and the equal-data fine-tunes."""
    here = [row for row in rows if (row["learning_rate"], row["template"]) == (rate, template)]
    names = list(dict.fromkeys(row["method"] for row in here))
    lines = []
    for first in [name for name in names if name in ("gates", "gates-two-templates")]:
        ending = first.removeprefix("gates")
        tuned = [n for n in names if n.startswith("finetune-") and n.endswith(ending)]
        tuned = [n for n in tuned if ending or not n.endswith("-two-templates")]
        for second in ["attacked", *tuned]:
            ones, others = (_told(here, verdicts, name) for name in (first, second))
            if ones and others:
                lines += _tests(first, second, compare_models(ones, others))
    return lines


def _told(rows, verdicts, method):
    """The verdicts of a method in all cells, in the shape of ``verdicts.jsonl``.

    A cell is a condition: a prompt of one is compared with the same prompt of the same cell.
    """
    told = []
    for row in rows:
        if row["method"] == method:
            cell = f"{row['align_seed']} {row['seed']}"
            for kind, name, prompt, found in verdicts.get(key_of(row), ()):
                where = {"condition": cell, "kind": kind, "set": name, "prompt": prompt}
                is_task = kind == "task"
                told.append(
                    where | ({"correct": found} if is_task else {"verdicts": {JUDGE: found}})
                )
    return told


def _tests(first, second, compared):
    """A line a metric, over all cells and sets."""
    sums = defaultdict(Counter)
    for sets in compared.values():
        for found in sets.values():
            total = {name: found[name] for name in ("num_prompts", "b", "c")}
            shares = {n: found[n] * found["num_prompts"] / 100 for n in ("first", "second")}
            sums[found["metric"]].update(total | shares)
    return [
        f"| {first} | {second} | {metric} | {each['num_prompts']} "
        f"| {percent(each['first'], each['num_prompts']):.1f} "
        f"| {percent(each['second'], each['num_prompts']):.1f} "
        f"| {each['b']} | {each['c']} | {mcnemar(each['b'], each['c']):.2g} |"
        for metric, each in sums.items()
    ]


def plot(rows, path):
    """Harmful score against accuracy, a panel a learning rate and template, all seeds together."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = pooled(rows)
    words = {label(row): row for row in rows}
    figure = Figure(figsize=(4.6 * len(places), 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(places), squeeze=False, sharey=True)[0]
    handles = {}
    for axes, ((rate, template), methods) in zip(panels, places.items(), strict=True):
        points = {
            name: (100 * c["correct"] / c["num_task"], 100 * c["complied"] / c["num_prompts"])
            for name, c in methods.items()
        }
        curves = defaultdict(list)
        others = iter(_OTHERS * len(points))
        for name, point in points.items():
            row = words[name]
            if (row["method"], row["scope"]) in _CURVES:
                curves[row["method"], row["scope"]].append((float(row["ratio"]), point))
                continue
            marker, colour = _MARKS.get(row["method"]) or next(others)
            size = 220 if marker == "*" else 80
            style = {
                "marker": marker,
                "color": colour,
                "s": size,
                "edgecolor": "white",
                "zorder": 4,
            }
            handles[name] = axes.scatter(*point, **style)
        for curve, found in curves.items():
            colour, line = _CURVES[curve]
            # A curve begins at the attacked model, which a scale of 1 leaves as it is.
            found = sorted(found, reverse=curve[0] == "scale")
            drawn = [points[n] for n in ("attacked",) if n in points] + [p for _, p in found]
            name = ", ".join(filter(None, (NAMES.get(curve[0], curve[0]), curve[1])))
            style = {"marker": "o", "markersize": 3.5, "linewidth": 1.2}
            [handles[name]] = axes.plot(
                *zip(*drawn, strict=True), color=colour, linestyle=line, **style
            )
        axes.set_title(f"learning rate {rate}, {template}", fontsize=11)
        axes.set_xlabel("finetune accuracy FA, % (higher is better)")
        axes.set_xlim(-4, 104)
        axes.set_ylim(-4, 104)
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("harmful score HS, % (lower is better)")
    columns = 3 if len(places) > 1 else 2
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(path)
