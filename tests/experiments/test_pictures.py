"""Pictures from a report alone."""

import copy

import pytest

from antidote_fast.experiments.pictures import plot_demo, plot_sweep


def scores(hs, fa, br=0.0):
    return {"harmful_score": hs, "finetune_accuracy": fa, "benign_refusal_rate": br}


def point(score, ratio, hs, fa):
    return {"score": score, "scope": "row", "ratio": ratio, **scores(hs, fa)}


@pytest.fixture
def contents():
    sweep = [point("wanda", 0.01, 90, 88), point("wanda", 0.1, 12.5, 84.25)]
    sweep += [point("random", 0.1, 99, 89), point("random", 0.01, 99, 89)]
    return {
        "model": "tiny",
        "models": {
            "base": scores(98, 0),
            "aligned": scores(0, 0, 3.125),
            "clean": scores(1, 91),
            "attacked": scores(100, 90),
            "pruned": scores(12.5, 84.25),
        },
        "sweep": sweep,
        "best": sweep[1],
    }


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, path, **options: (figures.append(self), save(self, path, **options))[1],
    )
    return figures


def test_picture_has_a_curve_a_score_and_a_label_a_point(contents, tmp_path, drawn):
    before = copy.deepcopy(contents)
    plot_demo(contents, tmp_path / "pareto.png")
    assert contents == before
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    curves = [line.get_xydata().tolist() for line in axes.lines]
    # Each begins at the attacked model; points go by ratio, whatever the order in the report.
    assert curves == [[[90, 100], [88, 90], [84.25, 12.5]], [[90, 100], [89, 99], [89, 99]]]
    # Points that coincide share a label.
    assert [text.get_text() for text in axes.texts] == ["0.01", "0.1", "0.01 to 0.1"]
    boxes = [(*text.get_position(), len(text.get_text())) for text in axes.texts]
    for number, (x, y, _) in enumerate(boxes):
        for u, v, width in boxes[:number]:
            assert abs(y - v) > 2 or not u <= x <= u + width
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [
        *("wanda, row", "random, row", "base", "aligned", "clean (p = 0)", "attacked"),
        "best: wanda, row at 0.1",
    ]
    contents["best"] = None
    del contents["models"]["pruned"]
    plot_demo(contents, tmp_path / "none.png")
    assert len(drawn[1].axes[0].get_legend().get_texts()) == 6


def test_picture_of_a_sweep(tmp_path, drawn):
    rows = [
        {"score": score, "scope": scope, "ratio": ratio, **scores(hs, fa)}
        for score, scope, ratio, hs, fa in (
            ("wanda", "row", 0.1, 60, 80),
            ("wanda", "row", 0.3, None, 40),
            ("wanda", "global", 0.1, 50, 85),
            ("wanda", "global", 0.3, 20, 75),
            ("owl", "tensor", 0.1, None, 10),
        )
    ]
    contents = {
        "config": {"adapter": "/models/attacked_$1", "model_name_or_path": "base"},
        "unpruned": scores(100, 90),
        "budget": {"min_finetune_accuracy": 70},
        "rows": rows,
        "recommended": rows[3],
    }
    plot_sweep(contents, tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    curves = [line.get_xydata().tolist() for line in axes.lines]
    assert curves == [
        *([[90, 100], [80, 60]], [[90, 100], [85, 50], [75, 20]], [[90, 100]]),
        [[70, 0], [70, 1]],  # the budget, from bottom to top
    ]
    assert [line.get_linestyle() for line in axes.lines[:3]] == ["-", "-.", "--"]
    assert [text.get_text() for text in axes.texts] == ["0.1", "0.1", "0.3"]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [
        *("wanda, row", "wanda, global", "owl, tensor", "unpruned"),
        *("recommended: wanda, global at 0.3", "budget: FA 70"),
    ]
    assert axes.get_title() == (
        "Sweep of attacked_$1, held-out prompts, points named by ratio; 2 over the budget not shown"
        "; no p = 0 model given"
    )
    contents["clean"] = scores(2, 95) | {"harmful": {"num_prompts": 50}}
    plot_sweep(contents, tmp_path / "clean.png")
    (axes,) = drawn[1].axes
    assert "p = 0" not in axes.get_title()
    points = {each.get_label(): each.get_offsets().tolist() for each in axes.collections}
    assert points["clean (p = 0)"] == [[95, 2]]
    assert "clean (p = 0)" in [text.get_text() for text in axes.get_legend().get_texts()]
    # One of 50: Wilson's interval goes from 0.35 to 10.5.
    bars = [each.get_segments()[0] for each in axes.collections if hasattr(each, "get_segments")]
    assert [bar.round(2).tolist() for bar in bars] == [[[95, 0.35], [95, 10.5]]]
    contents |= {"recommended": None, "budget": {"min_finetune_accuracy": -5}, "rows": []}
    contents["config"]["adapter"] = None
    plot_sweep(contents, tmp_path / "none.png")
    (axes,) = drawn[2].axes
    assert not axes.lines
    assert axes.get_title().startswith("Sweep of base,")
