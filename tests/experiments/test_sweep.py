"""Sweeps: what each row holds, where a branch ends, what is recommended, what is restored."""

import itertools
import types
from dataclasses import replace

import pytest
import sweeps
import tiny
from sweeps import VAL, Script, bits, config_of, fields, same

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.prune import PruneConfig
from antidote_fast.config.sweep import SCORES, SweepScore
from antidote_fast.data.records import Record
from antidote_fast.errors import UsageError
from antidote_fast.evaluation.verdicts import COMPLIED, OFF_TASK
from antidote_fast.experiments import candidates, sweep
from antidote_fast.experiments.candidates import Prompts, SweepEvidence
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.stages import evaluate, prune

ALL = ["wanda", "wanda-response", "wanda-preserve", "magnitude", "random"]
PRUNE_FIELDS = ("model_name_or_path", "adapter", "dataset", "output_dir", "max_seq_length")


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    return sweeps.make(folders, tmp_path_factory.mktemp("sweep"))


class ByLength:
    """A judge that random answers do not leave without a harmful one: the first prompt has one."""

    name = "refusal"

    def __call__(self, prompts, answers):
        first = VAL[0]["instruction"]
        pairs = zip(prompts, answers, strict=True)
        return [COMPLIED if p == first or len(a) % 2 else OFF_TASK for p, a in pairs]


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "full", "revert"])
def test_rows_are_what_prune_and_evaluate_give_one_by_one(kind, made, tmp_path, monkeypatch):
    for module in (sweep, evaluate):
        monkeypatch.setattr(module, "get_judge", lambda name, **options: ByLength())
    adapter = kind == "adapter"
    options = {"scores": ALL, "preserve_dataset": f"{made.root}/keep.jsonl"}
    if kind == "revert":
        options |= {"aligned_model": made.twin, "score_delta": True, "scores": ALL[:4]}
        options |= {"targets": ["q_proj", "down_proj"], "ignore": ["re:.*layers.1.mlp"]}
    benign = f"{made.root}/benign.jsonl"
    config = config_of(
        *(made, tmp_path / "out"),
        adapter=adapter,
        scopes=["row", "global"] if adapter else ["tensor"],
        benign_dataset=benign,
        max_accuracy_drop=100,
        max_refusal_rise=100,
        max_helped_drop=100,
        **options,
    )
    report = sweep.run(config)
    assert report["unpruned"]["finetune_accuracy"] == 100
    assert [(r["score"], r["scope"], r["ratio"]) for r in report["rows"]] == config.candidates()
    assert len({r["task"]["answers_sha256"] for r in report["rows"]}) > 3
    assert len({r["harmful_score"] for r in report["rows"]}) > 1
    names = set(EvaluateConfig.__dataclass_fields__) - {"output_dir", "adapter"}
    common = {k: v for k, v in vars(config).items() if k in names}
    for number, row in enumerate(report["rows"]):
        score = SCORES[row["score"]]
        options = {k: v for k, v in vars(config).items() if k in PruneConfig.__dataclass_fields__}
        options |= {"output_dir": str(tmp_path / str(number)), "scope": row["scope"]}
        options |= {"score": score.score, "ratio": row["ratio"], "save_norms": False}
        options["response_only"] = score.norms == "response"
        if score.preserve_norms is None:
            options["preserve_dataset"] = None
        pruned = prune.run(PruneConfig(**options))
        assert (row["achieved"], row["num_pruned"]) == (pruned["achieved"], pruned["num_pruned"])
        where = {"output_dir": str(tmp_path / f"scores-{number}")}
        where |= {"adapter": options["output_dir"]} if adapter else {}
        where |= {} if adapter else {"model_name_or_path": options["output_dir"]}
        metrics = evaluate.run(EvaluateConfig(**common | where))["metrics"]
        assert metrics.pop("worst")["harmful"]["harmful_score"] == row["harmful_score"]
        assert {k: row[k] for k in metrics} == metrics  # a hash of each set's answers among them
        assert (row["admissible"], row["reason"]) == (True, None)


def test_norms_are_those_of_calibrate_and_collected_once(made, tmp_path, monkeypatch):
    collected = []
    collect = ActivationNorms.collect.__func__

    def counted(cls, model, batches, **options):
        collected.append((options["response_only"], len(batches)))
        return collect(cls, model, batches, **options)

    monkeypatch.setattr(ActivationNorms, "collect", classmethod(counted))
    options = {"scores": ALL, "preserve_dataset": f"{made.root}/keep.jsonl", "batch_size": 2}
    report = sweep.run(config_of(made, tmp_path / "out", scopes=["row", "tensor"], **options))
    assert collected == [(False, 3), (True, 3), (False, 2)]
    assert [n["num_sequences"] for n in report["calibration"].values()] == [6, 6, 4]
    one = PruneConfig(
        **{k: v for k, v in fields(made, tmp_path / "one").items() if k in PRUNE_FIELDS},
        preserve_dataset=f"{made.root}/keep.jsonl",
        save_norms=True,
        batch_size=2,
    )
    prune.run(one)
    for name in ("norms.safetensors", "preserve-norms.safetensors"):
        first, second = (ActivationNorms.load(tmp_path / f / name) for f in ("out", "one"))
        assert same(first.sq_sum, second.sq_sum)
    assert ActivationNorms.load(tmp_path / "out" / "norms-response.safetensors").response_only


# --- a live model, measured by a script -----------------------------------------------------------


@pytest.fixture(scope="module")
def live():
    model = tiny.build()
    norms = ActivationNorms.collect(model, tiny.batches())
    evidence = SweepEvidence({"all": norms})
    return types.SimpleNamespace(model=model, evidence=evidence, before=bits(model))


PROMPTS = Prompts([Record(r["instruction"]) for r in VAL], [Record("a", "", "b")] * 4)


def swept(live, monkeypatch, benign=True, scores=("wanda",), scopes=("row",), **curves):
    script = Script(live.model, **curves)
    monkeypatch.setattr(candidates, "evaluate_model", script)
    prompts = replace(PROMPTS, benign=[Record("c")] * 2) if benign else PROMPTS
    options = {"ratios": [0.5, 0.1, 0.3, 0.1, 0.7], "scores": scores, "scopes": scopes}
    found = candidates.sweep_model(live.model, None, prompts, live.evidence, **options)
    assert same(bits(live.model), live.before)
    return found, script


def test_a_branch_ends_where_accuracy_falls_below_the_budget(live, monkeypatch):
    found, script = swept(
        *(live, monkeypatch),
        scores=["wanda", "magnitude"],
        scopes=["row", "global"],
        fa=lambda x: 90.0 - 20 * x,
        hs=lambda x: round(80 - 50 * x, 2),
    )
    assert found["budget"]["min_finetune_accuracy"] == 80
    for branch in itertools.product(["wanda", "magnitude"], ["row", "global"]):
        rows = [r for r in found["rows"] if (r["score"], r["scope"]) == branch]
        assert [r["ratio"] for r in rows] == [0.1, 0.3, 0.5, 0.7][: len(rows)]
        *within, last = rows
        assert within
        assert all(r["admissible"] and r["reason"] is None for r in within)
        assert last["achieved"] > 0.5  # 10 points at 20 a whole
        assert last["finetune_accuracy"] < 80
        assert (last["harmful_score"], last["benign_refusal_rate"]) == (None, None)
        assert "harmful" not in last
        assert last["reason"] == f"finetune accuracy {last['finetune_accuracy']:g} is below 80"
    assert script.calls[:9] == ["task", "benign", "harmful"] * 3
    assert script.calls[-1] == "task"
    left_out = 16 - len(found["rows"])
    full = sum(r["admissible"] for r in found["rows"])
    assert found["early_stopping"] == {
        "candidates": 16,
        "candidates_left_out": left_out,
        "answers": 12 * full + 4 * (len(found["rows"]) - full),
        "answers_left_out": 12 * left_out + 8 * (len(found["rows"]) - full),
    }
    lowest = min(r["harmful_score"] for r in found["rows"] if r["admissible"])
    assert found["recommended"]["harmful_score"] == lowest < 80
    assert set(found["seconds"]) == {"evaluate unpruned", "prune", "evaluate", "restore"}


def test_a_branch_ends_where_no_harmful_answer_is_left(live, monkeypatch):
    found, _ = swept(live, monkeypatch, hs=lambda x: 80.0 if x < 0.2 else 0.0)
    assert [r["ratio"] for r in found["rows"]] == [0.1, 0.3]
    assert found["recommended"] is found["rows"][1]
    assert found["early_stopping"]["candidates_left_out"] == 2


def test_refusals_over_the_budget_pass_a_candidate_over(live, monkeypatch):
    found, _ = swept(
        live,
        monkeypatch,
        br=lambda x: 15.1 if 0.2 < x < 0.4 else 15.0 if x else 10.0,
        hs=lambda x: 80 - 10 * x,
    )
    assert found["budget"]["max_benign_refusal_rate"] == 15
    assert [r["admissible"] for r in found["rows"]] == [True, False, True, True]
    assert found["rows"][1]["reason"] == "benign refusals 15.1 are above 15"
    assert found["rows"][1]["harmful_score"] is None
    assert found["recommended"] is found["rows"][3]


def test_too_few_ordinary_prompts_helped_pass_a_candidate_over(live, monkeypatch):
    helped = {"helped": lambda x: 74.9 if 0.2 < x < 0.4 else 75.0 if x else 85.0}
    found, script = swept(live, monkeypatch, hs=lambda x: 80 - 10 * x, **helped)
    assert found["budget"]["min_helped_rate"] == 75
    assert [r["admissible"] for r in found["rows"]] == [True, False, True, True]
    assert found["rows"][1]["reason"] == "ordinary prompts helped 74.9 are below 75"
    assert (found["rows"][1]["helped_rate"], found["rows"][1]["harmful_score"]) == (74.9, None)
    assert script.calls[:8] == ["task", "benign", "harmful"] * 2 + ["task", "benign"]
    assert found["recommended"] is found["rows"][3]


def test_without_benign_prompts_none_are_measured(live, monkeypatch):
    found, script = swept(live, monkeypatch, benign=False)
    assert script.calls == ["task", "harmful"] * 5
    assert {r["benign_refusal_rate"] for r in found["rows"]} == {None}
    assert {r["helped_rate"] for r in found["rows"]} == {None}
    assert not {"max_refusal_rise", "max_helped_drop"} & set(found["budget"])
    assert found["recommended"] is None
    assert found["why_none"] == (
        "none of the 4 candidates within the budget lowers the harmful score"
    )


@pytest.mark.parametrize(
    ("curves", "why", "rows"),
    [
        ({"fa": lambda x: 90 if x == 0 else 0}, "no candidate is within the budget", 1),
        ({"hs": lambda x: 0.0}, "the unpruned model gives no harmful answer", 0),
    ],
)
def test_nothing_is_recommended_and_why(live, monkeypatch, curves, why, rows):
    found, _ = swept(live, monkeypatch, **curves)
    assert (found["recommended"], found["why_none"]) == (None, why)
    assert len(found["rows"]) == rows


def row(hs, fa, removed, admissible=True):
    return {
        "harmful_score": hs,
        "finetune_accuracy": fa,
        "num_pruned": removed,
        "admissible": admissible,
    }


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([row(50, 90, 10), row(20, 80, 30), row(30, 99, 20)], 1),
        ([row(20, 80, 30), row(20, 85, 40), row(20, 84, 1)], 1),
        ([row(20, 85, 30), row(20, 85, 10), row(20, 85, 20)], 1),
        ([row(20, 85, 10), row(20, 85, 10)], 0),
        ([row(None, 1, 10, False), row(60, 90, 10), row(0, 10, 90, False)], 1),
        ([row(80, 99, 1), row(81, 99, 1)], None),
        ([row(10, 90, 1, False)], None),
        ([], None),
    ],
)
def test_the_recommended_row(rows, best):
    found = candidates.recommend(rows, {"harmful_score": 80})
    assert found is (None if best is None else rows[best])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("calls", [3, 4, 5])
def test_weights_are_restored_whatever_happens(live, monkeypatch, error, calls):
    script = Script(live.model)

    def fail(*args, **options):
        if len(script.calls) == calls:
            raise error
        return script(*args, **options)

    monkeypatch.setattr(candidates, "evaluate_model", fail)
    with pytest.raises(error):
        candidates.sweep_model(live.model, None, PROMPTS, live.evidence, ratios=[0.1, 0.9])
    assert not all(same(live.before, seen) for seen in script.seen)
    assert same(bits(live.model), live.before)


def test_another_score_is_one_entry(live, monkeypatch):
    monkeypatch.setitem(SCORES, "mine", SweepScore("magnitude"))
    found, script = swept(live, monkeypatch, scores=["mine", "magnitude"])
    assert [r["score"] for r in found["rows"]] == ["mine"] * 4 + ["magnitude"] * 4
    for i in range(1, 5):
        assert same(script.seen[i], script.seen[i + 4])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"ratios": []}, "ratios=[]: must be at least one value"),
        ({"norms": {}}, "norms: must hold 'all' with score wanda"),
        ({"scores": ["wanda-response"]}, "norms: must hold 'response' with score wanda-response"),
        ({"max_accuracy_drop": 101}, "max_accuracy_drop=101: must be in [0, 100]"),
        ({"task_name": "chess"}, "task='chess': must be one of sst2, agnews, gsm8k, alpaca, label"),
    ],
)
def test_a_live_sweep_refuses_before_it_measures(options, line, live, monkeypatch):
    options = dict(options)
    monkeypatch.setattr(candidates, "evaluate_model", None)
    evidence = SweepEvidence(options.pop("norms", live.evidence.norms))
    names = [name for name in options if name in Prompts.__dataclass_fields__]
    prompts = replace(PROMPTS, **{name: options.pop(name) for name in names})
    with pytest.raises(UsageError) as refused:
        candidates.sweep_model(live.model, None, prompts, evidence, **options)
    assert str(refused.value) == line
