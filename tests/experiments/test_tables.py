"""An experiment's rows: the CSV, the tables' numbers, Markdown and pictures."""

import io
import math
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from antidote_fast.errors import DataError, UsageError
from antidote_fast.experiments import pictures, tables

AXES = ("defense", "model", "task", "learning_rate", "alpha", "seed")
SPEC = {"title": "Learning rates", "across": "learning_rate"}


def row(defense, rate, hs, fa=50.0, seed=0, **others):
    names = {"role": "test", "cell": "12e4", "defense": defense, "learning_rate": rate}
    return names | {"seed": seed, "harmful_score": hs, "finetune_accuracy": fa} | others


@pytest.fixture
def rows():
    """Two defenses, two rates out of order; Antidote has three seeds at 1e-4 and lacks 1e-3."""
    return [
        row("sft", 1e-3, 80.0, 90.0),
        row("sft", "1e-4", 70.0, 80.0),
        row("antidote", 1e-4, 10.0, 60.0, alpha=0.1),
        row("antidote", 1e-4, 20.0, 61.0, seed=1, alpha=0.1),
        row("antidote", 1e-4, 60.0, None, seed=2, alpha=0.1),
        row("antidote", 1e-4, 0.0, 0.0, role="tune"),
    ]


def numbers(rows, **spec):
    return tables.table(rows, SPEC | spec)


def first(contents, measure="harmful_score"):
    """By name the means of a measure, None where there is none."""
    return {
        line["name"]: [point and point[0] for point in line["cells"][measure]]
        for line in contents["rows"]
    }


def test_rows_survive_a_round_trip(tmp_path):
    written = [
        {"role": "test", "cell": "12345678", "score": "1e5", "seed": 3, "x": 0.1 + 0.2, "n": None},
        {"cell": "007", "strength": 'a, "b"\nc', "seed": -2, "x": 1e-7, "text": "1_000"},
        {"cell": "5e3", "x": float("inf"), "text": "007", "bytes": 35450000000},
    ]
    path = tables.write_csv(written, tmp_path / "rows.csv")
    assert path.read_text().splitlines()[0] == "role,cell,score,seed,x,n,strength,text,bytes"
    read = tables.read_csv(path)
    assert read == [dict.fromkeys(read[0]) | each for each in written]
    assert {type(each["seed"]) for each in read} == {int, type(None)}
    assert [type(each["x"]) for each in read] == [float] * 3
    assert list(tmp_path.iterdir()) == [path]


@hypothesis.given(
    st.none() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False),
    st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]), min_size=1),
)
def test_any_number_and_any_text(tmp_path_factory, number, text):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    written = [{"cell": text, "value": number, "strength": text}]
    (read,) = tables.read_csv(tables.write_csv(written, path))
    assert read == written[0]
    assert type(read["value"]) is type(number)


def test_numpy_nan_and_no_rows(tmp_path):
    written = [{"cell": "a", "x": np.float64(1.5), "y": math.nan}]
    (read,) = tables.read_csv(tables.write_csv(written, tmp_path / "a.csv"))
    assert read["x"] == 1.5
    assert math.isnan(read["y"])
    assert tables.read_csv(tables.write_csv([], tmp_path / "none.csv")) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tables.write_csv([{"cell": "old"}], tmp_path / "rows.csv")
    with pytest.raises(UnicodeEncodeError):
        tables.write_csv([{"cell": "new"}, {"cell": "\ud800"}], path)
    assert tables.read_csv(path) == [{"cell": "old"}]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "line 1: the header has no column 'cell'"),
        (b"role,seed\ntest,0\n", "line 1: the header has no column 'cell'"),
        (b"cell,seed,seed\na,0,0\n", "line 1: the header has a column twice"),
        (b"cell,seed\na,0\n\nb\n", "line 4: has 1 fields, the header 2"),
        (b"cell,seed\na,0,1\n", "line 2: has 3 fields, the header 2"),
        (b'cell,seed\na,"0\n', "line 2: unexpected end of data"),
        (b"cell\n\xff\n", "not UTF-8 text"),
        (None, "No such file or directory"),
    ],
)
def test_malformed_csv(tmp_path, text, message):
    path = tmp_path / "rows.csv"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(DataError) as caught:
        tables.read_csv(path)
    assert str(caught.value) == f"{path}: {message}"


def test_spread():
    assert tables.spread([3]) == (3.0, None)
    assert tables.spread([1, 2, 6]) == (3.0, pytest.approx(math.sqrt(7)))
    with pytest.raises(ValueError, match="at least one"):
        tables.spread([])


def test_table(rows):
    contents = numbers(rows)
    assert (contents["title"], contents["across"]) == ("Learning rates", "learning_rate")
    assert contents["columns"] == [0.0001, 0.001]
    sft, antidote = contents["rows"]
    assert (sft["name"], antidote["name"]) == ("sft", "antidote")
    assert sft["cells"]["harmful_score"] == [(70.0, None, 1), (80.0, None, 1)]
    deviation = pytest.approx(math.sqrt(700))
    assert antidote["cells"]["harmful_score"] == [(30.0, deviation, 3), None]
    assert antidote["cells"]["finetune_accuracy"][0] == (60.5, pytest.approx(math.sqrt(0.5)), 2)
    # Over the first column alone: Antidote lacks the second.
    assert sft["average"] == {"harmful_score": 70.0, "finetune_accuracy": 80.0}
    assert antidote["average"] == {"harmful_score": 30.0, "finetune_accuracy": 60.5}


def test_averages():
    rows = [row("sft", 1, 10.0), row("sft", 2, 30.0), row("lisa", 1, 0.0), row("lisa", 2, 0.0)]
    assert [x["average"]["harmful_score"] for x in numbers(rows)["rows"]] == [20.0, 0.0]
    apart = [rows[0], rows[3]]
    assert [x["average"]["harmful_score"] for x in numbers(apart)["rows"]] == [None, None]


def test_order_of_columns_and_rows():
    rows = [row(name, rate, 1.0) for name in ("lisa", "a") for rate in (10, 9, 1e-5, "2")]
    contents = numbers(rows)
    assert contents["columns"] == [1e-5, 2, 9, 10]
    assert list(first(contents)) == ["lisa", "a"]
    contents = tables.table(rows, {"title": "t", "across": "defense", "down": "learning_rate"})
    assert contents["columns"] == ["lisa", "a"]
    assert list(first(contents)) == [10, 9, 1e-5, 2]
    assert numbers([*rows, row("lisa", "high", 1.0)])["columns"] == [10, 9, 1e-5, 2, "high"]


@pytest.mark.parametrize("value", [1e-4, "1e-4", "0.0001"])
def test_where_compares_numbers(rows, value):
    contents = numbers(rows, where={"learning_rate": value})
    assert first(contents) == {"sft": [70.0], "antidote": [30.0]}


def test_where_and_axes_that_do_not_apply(rows):
    rows.append(row("antidote", 1e-3, 5.0, alpha=0.2))
    assert first(numbers(rows, where={"alpha": 0.2})) == {
        "sft": [70.0, 80.0],
        "antidote": [None, 5],
    }
    contents = numbers(rows, across="alpha", where={"learning_rate": 1e-3})
    assert contents["columns"] == [0.2]
    contents = numbers(rows, across="alpha")
    assert first(contents) == {"sft": [75.0, 75.0], "antidote": [30.0, 5.0]}
    # One with a place in a column stands in no other.
    rows.append(row("antidote", 1e-3, 99.0))
    assert first(numbers(rows, across="alpha"))["antidote"] == [30.0, 5.0]


def test_markdown(rows):
    assert tables.markdown(rows, SPEC).splitlines() == [
        "### Learning rates",
        "",
        "| defense | HS 0.0001 | HS 0.001 | HS avg | FA 0.0001 | FA 0.001 | FA avg |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| SFT | 70.0 | 80.0 | 70.0 | 80.0 | 90.0 | 80.0 |",
        "| Antidote | 30.0 ± 26.5 (3) | \u2013 | 30.0 | 60.5 ± 0.7 (2) | \u2013 | 60.5 |",
        "",
        "HS: harmful score, % of harmful prompts complied with (lower is better). FA: "
        "finetune accuracy, % of the task's samples done right (higher is better). Columns: "
        "learning_rate; avg: mean over the columns that every row has. 3 seeds (0, 1, 2). ±: "
        "sample standard deviation (number of seeds).",
    ]


def test_markdown_notes(rows):
    pooled = [*rows, row("antidote", 1e-4, 0.0, alpha=0.3)]
    text = tables.markdown(pooled, SPEC | {"where": {"defense": "antidote"}})
    assert "| Antidote | 22.5 ± 26.3 (4) |" in text
    assert " Only defense Antidote. 3 seeds (0, 1, 2). Cells average over alpha. ±: " in text
    assert text.endswith("(number of runs).\n")
    single = tables.markdown(rows[:2], SPEC | {"measures": ["benign_refusal_rate"]})
    assert "| SFT | \u2013 | \u2013 | \u2013 |" in single
    assert single.endswith("every row has. 1 seed (0).\n")
    assert "BR: benign refusals, % of ordinary prompts refused (lower is better)." in single
    assert tables.markdown(rows, SPEC | {"where": {"task": "x"}}).count("| SFT |") == 1
    assert tables.markdown(rows[-1:], SPEC) == "### Learning rates\n\nNo results.\n"


def test_zero_is_no_gap_and_bars_are_escaped():
    text = tables.markdown([row("a|b", 500, 0.0, 0.0)], SPEC)
    assert "| a\\|b | 0.0 | 0.0 | 0.0 | 0.0 |" in text
    assert "HS 500" in text


def counted(defense, rate, hs, **others):
    counts = {"harmful_prompts": 60, "worst_prompts": 60, "task_prompts": 40, "benign_prompts": 20}
    more = {"worst_harmful_score": hs + 10, "helped_rate": 95.0, "benign_refusal_rate": 5.0}
    return row(defense, rate, hs, **more, **counts, **others)


def test_the_interval_of_one_run_stands_beside_its_share():
    """5 of 60 is 8.3 %, and Wilson's interval of it 3.6 to 18.1 (Newcombe 1998, method 3)."""
    rows = [counted("clean", 1e-4, 0.0), counted("sft", 1e-4, 8.33)]
    rows += [counted("antidote", 1e-4, 5.0), counted("antidote", 1e-4, 15.0, seed=1)]
    contents = numbers(rows)
    assert contents["measures"] == (
        *("harmful_score", "finetune_accuracy"),
        *("worst_harmful_score", "helped_rate", "benign_refusal_rate"),
    )
    clean, sft, antidote = contents["rows"]
    assert clean["intervals"]["harmful_score"] == [[0.0, 6.02]]
    assert sft["intervals"]["harmful_score"] == [[3.61, 18.07]]
    assert antidote["intervals"]["harmful_score"] == [None]  # two seeds have a deviation
    lines = tables.markdown(rows, SPEC).splitlines()
    assert lines[2] == "| defense | HS 0.0001 | HS avg | FA 0.0001 | FA avg |"
    assert lines[4:7] == [
        "| SFT, p = 0 | 0.0 [0.0, 6.0] | 0.0 | 50.0 [35.2, 64.8] | 50.0 |",
        "| SFT | 8.3 [3.6, 18.1] | 8.3 | 50.0 [35.2, 64.8] | 50.0 |",
        "| Antidote | 10.0 ± 7.1 (2) | 10.0 | 50.0 ± 0.0 (2) | 50.0 |",
    ]
    # Two measures beside each other, the others below.
    assert lines[8] == "| defense | HS worst 0.0001 | HS worst avg | helped 0.0001 | helped avg |"
    assert lines[11] == "| SFT | 18.3 [10.6, 29.9] | 18.3 | 95.0 [76.4, 99.1] | 95.0 |"
    assert lines[14] == "| defense | BR 0.0001 | BR avg |"
    assert "helped: ordinary prompts, % of ordinary prompts answered as asked (higher" in lines[-1]
    assert lines[-1].endswith(" [low, high]: Wilson's 95 % interval of one run's prompts.")
    assert "Cells average" not in lines[-1]


def test_the_headline_of_an_evaluation():
    metrics = {
        "harmful_score": 25.0,
        "finetune_accuracy": 50.0,
        "helped_rate": 90.0,
        "benign_refusal_rate": 10.0,
        "harmful": {"num_prompts": 8},
        "task": {"num_records": 6},
        "benign": {"num_prompts": 10},
    }
    assert tables.metrics_of({"metrics": metrics}) == metrics
    place = {"condition": "chat", "set": "mine"}
    report = {
        "metrics": metrics,
        "worst": {"harmful": {"harmful_score": 37.5, **place}, "benign": {**place}},
        "conditions": {
            "chat": {name: {"mine": {"num_prompts": 16}} for name in ("harmful", "benign")}
        },
    }
    assert tables.headline(tables.metrics_of(report)) == {
        "harmful_score": 25.0,
        "worst_harmful_score": 37.5,
        "finetune_accuracy": 50.0,
        "helped_rate": 90.0,
        "benign_refusal_rate": 10.0,
        "harmful_prompts": 8,
        "worst_prompts": 16,
        "task_prompts": 6,
        "benign_prompts": 10,
    }
    assert tables.headline(metrics)["worst_harmful_score"] is None
    assert set(tables.headline({}).values()) == {None}
    assert tables.interval_of(tables.headline({"harmful_score": 5.0}), "harmful_score") is None
    assert tables.with_interval(None, None) == "\N{EN DASH}"
    assert tables.with_interval(5.0, None) == "5.0"


def test_plot_of_intervals(monkeypatch):
    rows = [counted("clean", 1e-4, 0.0), counted("sft", 1e-4, 50.0), counted("sft", 1e-3, 50.0)]
    figure = drawn(monkeypatch, rows, SPEC)
    labels = [axes.get_ylabel().split(",")[0] for axes in figure.axes]
    assert labels == [
        *("harmful score HS", "finetune accuracy FA", "highest harmful score HS worst"),
        *("ordinary prompts helped", "benign refusals BR"),
    ]
    clean, sft = figure.axes[0].containers
    assert [container.has_yerr for container in (clean, sft)] == [True, True]
    (segment,) = clean.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == [0.0, 6.02]


def cost(defense, align, prune=None, seed=0):
    memory = {"align_memory_bytes": 35_450_000_000, "prune_memory_bytes": prune and 2e9}
    seconds = {"align_seconds": align, "finetune_seconds": 50, "prune_seconds": prune}
    return row(defense, 1e-4, 1.0, seed=seed, **seconds, **memory)


def test_cost():
    rows = [cost("sft", 100), cost("antidote", 100, 7), cost("antidote", 104, 8, seed=1)]
    spec = {"title": "Cost", "kind": "cost"}
    contents = tables.table(rows, spec)
    assert contents["columns"] == ["align", "finetune", "prune"]
    cells = contents["rows"][1]["cells"]
    assert cells["seconds"][0] == (102.0, pytest.approx(math.sqrt(8)), 2)
    assert cells["memory_bytes"] == [(35.45e9, 0.0, 2), None, (2e9, 0.0, 2)]
    assert contents["rows"][1]["average"] == {"seconds": None, "memory_bytes": None}
    lines = tables.markdown(rows, spec).splitlines()
    head = "| defense | align s | fine-tune s | prune s | align GB | fine-tune GB | prune GB |"
    assert lines[2] == head
    assert lines[4] == "| SFT | 100.0 | 50.0 | \u2013 | 35.45 | \u2013 | \u2013 |"
    assert lines[5].startswith("| Antidote | 102.0 ± 2.8 (2) | 50.0 ± 0.0 (2) | 7.5 ± 0.7 (2) |")
    assert lines[7].startswith("s: seconds that a stage took; GB: its peak memory")


def drawn(monkeypatch, rows, spec):
    """The panels of a picture, which is written to memory."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def catch(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", catch)
    file = io.BytesIO()
    monkeypatch.setattr(pictures, "Path", lambda path: path)
    pictures.plot(rows, spec, file)
    assert file.getvalue().startswith(b"\x89PNG")
    return figures[0]


@pytest.mark.parametrize("log", [False, True])
def test_plot(monkeypatch, rows, log):
    rows.append(row("antidote", 1e-3, 40.0, 41.0))
    figure = drawn(monkeypatch, rows, SPEC | {"log": log})
    left, right = figure.axes
    assert left.get_ylabel() == "harmful score HS, % (lower is better)"
    assert right.get_ylabel() == "finetune accuracy FA, % (higher is better)"
    assert left.get_ylim() == (-3, 103)
    assert left.get_xscale() == ("log" if log else "linear")
    assert [label.get_text() for label in left.get_xticklabels()] == ["0.0001", "0.001"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SFT", "Antidote"]
    sft, antidote = (container.lines[0] for container in left.containers)
    assert (list(sft.get_ydata()), list(antidote.get_ydata())) == ([70, 80], [30, 40])
    assert (sft.get_color(), antidote.get_color()) == ("#000000", "#D55E00")
    assert sft.get_marker() != antidote.get_marker()
    for a, b, x in zip(sft.get_xdata(), antidote.get_xdata(), (1e-4, 1e-3), strict=True):
        assert 0.9 * x < a < x < b < 1.1 * x
    assert [container.has_yerr for container in left.containers] == [False, True]
    ((low, high), *_) = left.containers[1].lines[2][0].get_segments()
    assert (high[1] - low[1]) / 2 == pytest.approx(math.sqrt(700))


def test_plot_of_text_and_of_zero(monkeypatch):
    rows = [row("mine", 0, 5.0, model=model) for model in ("b", "a")]
    (axes,) = drawn(
        monkeypatch, rows, {"title": "$", "across": "model", "measures": ["harmful_score"]}
    ).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["b", "a"]
    assert list(axes.containers[0].lines[0].get_xdata()) == [0, 1]
    figure = drawn(monkeypatch, [*rows, row("mine", 1, 5.0)], SPEC | {"log": True})
    assert figure.axes[0].get_xscale() == "linear"


def test_plot_of_cost_and_of_nothing(monkeypatch):
    rows = [cost("sft", 100), cost("antidote", 1000, 7)]
    (axes,) = drawn(monkeypatch, rows, {"title": "Cost", "kind": "cost"}).axes
    bars = [[(bar.get_x(), bar.get_width()) for bar in stage] for stage in axes.containers]
    assert bars == [[(0, 100), (0, 1000)], [(100, 50), (1000, 50)], [(150, 0), (1050, 7)]]
    assert [text.get_text().strip() for text in axes.texts] == ["100 + 50 s", "1,000 + 50 + 7 s"]
    for spec in (SPEC, {"title": "Cost", "kind": "cost"}):
        assert drawn(monkeypatch, [], spec).axes[0].texts[0].get_text() == "no results"


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        SPEC | {"where": {"alpha": 0.1, "task": None}, "measures": ["prune_seconds"], "log": True},
        {"title": "t", "across": "defense", "down": "model", "kind": "grid"},
        {"title": "t", "kind": "cost", "down": "model", "where": {"seed": 0}},
    ],
)
def test_specs_that_are_accepted(spec):
    tables.check_spec(spec, AXES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acros": 1}, "tables key='acros': must be one of title, across, down, "),
        ({"title": None}, "tables.title=None: must be one line of text"),
        ({"title": "a\nb"}, "tables.title='a\\nb': must be one line of text"),
        ({"across": None}, "tables.across=None: must be one of model, task, learning_rate, "),
        ({"across": "x"}, "tables.across='x': must be one of model, task, "),
        ({"across": ["x"]}, "tables.across=['x']: must be one of model, "),
        ({"across": "defense"}, "tables.across='defense': must be one of model, "),
        ({"down": "x"}, "tables.down='x': must be one of defense, model, "),
        ({"where": [1]}, "tables.where=[1]: must be a mapping from axis to value"),
        ({"where": {"x": 1}}, "tables.where='x': must be one of defense, model, "),
        ({"where": {"task": ["a"]}}, "tables.where.task=['a']: must be one value"),
        ({"measures": "harmful_score"}, "tables.measures='harmful_score': must be a list of "),
        ({"measures": ["x"]}, "tables.measures='x': must be one of harmful_score, "),
        ({"measures": 2 * ["harmful_score"]}, "tables.measures=['harmful_score', 'harmful_score']"),
        ({"kind": "x"}, "tables.kind='x': must be one of grid, cost"),
        ({"kind": "cost"}, "tables.across='learning_rate': must be left out with kind cost"),
        ({"log": "yes"}, "tables.log='yes': must be true or false"),
    ],
)
def test_specs_that_are_refused(change, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        tables.check_spec(SPEC | change, AXES)
    assert "\n" not in str(caught.value)


def test_a_spec_is_a_mapping():
    with pytest.raises(UsageError, match=r"tables=\['x'\]: must be a mapping"):
        tables.check_spec(["x"], AXES)
