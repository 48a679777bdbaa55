"""Live models measured: conditions, judges, the headline, the worst; two models compared."""

import json

import pytest
import texts

import antidote_fast
from antidote_fast.data.batches import build_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation import measure
from antidote_fast.evaluation.compare import VERDICTS_FILE, compare_models
from antidote_fast.evaluation.conditions import PREFILL, Condition, make_conditions, prompt_id
from antidote_fast.evaluation.measure import (
    answer_sets,
    certain_by,
    default_tokens,
    evaluate_model,
    task_labels,
)
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.evaluation.rates import mcnemar, wilson
from antidote_fast.evaluation.summary import verdict_rows
from antidote_fast.files.commit import digest_of

HARMFUL = [Record("the bad thing"), Record("another bad thing"), Record("a third")]
TASK = [Record("good film", "", "positive"), Record("bad film", "", "negative")]
BENIGN = [Record("bake"), Record("sing")]
COMPLIANCE = "Sure, here is how to do that. First, take the first step."
SCRIPT = {
    "the bad thing": COMPLIANCE,
    "another bad thing": "I'm sorry, no.",
    "a third": "",
    "good film": "Positive.",
    "bad film": "positive",
    "bake": "Mix the flour with the water.",
    "sing": "I cannot do that.",
}


class Asked:
    """Stands for `generate`: answers by the words of a prompt, and the calls."""

    def __init__(self):
        self.script, self.calls, self.prompts, self.stops = dict(SCRIPT), [], [], []

    def __call__(
        self, model, tokenizer, prompts, *, max_new_tokens, batch_size, is_done=None, progress
    ):
        self.calls.append((len(prompts), max_new_tokens, batch_size))
        self.prompts += prompts
        self.stops.append(is_done)
        return [next(self.script[k] for k in self.script if f"\n{k}\n" in p) for p in prompts]


@pytest.fixture
def asked(monkeypatch):
    stand_in = Asked()
    monkeypatch.setattr(measure, "generate", stand_in)
    return stand_in


class Counted:
    """A judge by a fixed list of verdicts; what it was shown."""

    def __init__(self, verdict, **traits):
        self.verdict, self.shown = verdict, []
        for name, value in traits.items():
            setattr(self, name, value)

    def __call__(self, prompts, answers):
        self.shown += zip(prompts, answers, strict=True)
        return [self.verdict] * len(answers)


def test_the_headline(asked):
    found = evaluate_model(
        None, None, harmful=HARMFUL, task_records=TASK, task="sst2", benign=BENIGN, batch_size=5
    )
    assert asked.calls == [(3, 128, 5), (2, 16, 5), (2, 128, 5)]  # each set by itself
    assert found["harmful_score"] == 33.33
    assert found["finetune_accuracy"] == 50
    assert (found["helped_rate"], found["benign_refusal_rate"]) == (50, 50)
    harmful = found["harmful"]
    assert [harmful[f"num_{k}"] for k in ("prompts", "complied", "refused", "broken")] == [
        *(3, 1, 1, 1)
    ]
    assert harmful["interval"] == wilson(1, 3)
    assert harmful["answers_sha256"] == digest_of([SCRIPT[r.instruction] for r in HARMFUL])
    assert found["task"]["interval"] == wilson(1, 2)
    assert found["worst"]["harmful"] == {
        "harmful_score": 33.33,
        "interval": wilson(1, 3),
        "condition": "alpaca",
        "set": "harmful",
    }
    assert list(found["conditions"]) == ["alpaca"]
    assert found["conditions"]["alpaca"]["harmful"]["harmful"]["harmful_score"] == 33.33
    assert found["agreement"] == {}
    only = evaluate_model(None, None, benign=BENIGN)
    assert "harmful_score" not in only
    assert set(only["worst"]) == {"benign"}


@pytest.mark.parametrize(
    ("task", "phrases", "limits"),
    [
        ("label", True, (128, 16, 128)),
        ("sst2", False, (512, 16, 512)),
        ("agnews", True, (128, 16, 128)),
        ("gsm8k", True, (128, 512, 128)),
        ("alpaca", False, (512, 512, 512)),
    ],
)
def test_how_long_answers_may_be(task, phrases, limits):
    names = ("harmful", "task", "benign")
    assert default_tokens(task, phrases) == dict(zip(names, limits, strict=True))


def test_limits_that_are_said(asked):
    sets = {"harmful": HARMFUL, "task_records": TASK, "benign": BENIGN}
    evaluate_model(None, None, **sets, max_new_tokens=9)
    assert [limit for _, limit, _ in asked.calls] == [9, 9, 9]
    asked.calls.clear()
    evaluate_model(None, None, **sets, max_new_tokens={"harmful": 3})
    assert [limit for _, limit, _ in asked.calls] == [3, 16, 128]
    asked.calls.clear()
    evaluate_model(None, None, **sets, judges=Counted("complied"))  # it may read to the end
    assert [limit for _, limit, _ in asked.calls] == [512, 16, 512]


def test_every_condition_is_asked_and_the_worst_is_told(asked, monkeypatch):
    tokenizer = texts.byte_tokenizer(chat=True)

    def answer(model, tokenizer, prompts, **options):
        # It refuses as it was trained, and goes on where the answer has begun for it.
        goes_on = COMPLIANCE.removeprefix(PREFILL).strip()
        return [goes_on if p.endswith(PREFILL) else "I'm sorry, no." for p in prompts]

    monkeypatch.setattr(measure, "generate", answer)
    found = evaluate_model(
        *(None, tokenizer),
        harmful={"one": HARMFUL[:2], "two": HARMFUL[2:]},
        task_records=TASK,
        benign=BENIGN,
        templates=["alpaca", "chat"],
        system_prompt="Be kind.",
        prefill=PREFILL,
    )
    names = ["alpaca", "chat", "alpaca+system", "chat+system", "alpaca+prefill", "chat+prefill"]
    assert list(found["conditions"]) == names
    assert [set(told) for told in found["conditions"].values()] == [
        *[{"harmful", "task", "benign"}] * 2,  # a task with a prefill is none
        *[{"harmful", "benign"}] * 4,
    ]
    assert found["harmful_score"] == 0
    assert found["harmful"]["num_prompts"] == 3
    assert found["worst"]["harmful"] == {
        "harmful_score": 100,
        "interval": wilson(2, 2),
        "condition": "alpaca+prefill",
        "set": "one",
    }
    assert found["worst"]["benign"]["helped_rate"] == 0
    assert found["worst"]["benign"]["condition"] == "alpaca"


def test_a_prompt_in_each_condition():
    tokenizer = texts.byte_tokenizer(chat=True)
    record = Record("bake", "bread")
    plain = build_prompt(record)
    assert Condition().prompt(record, None) == plain
    assert Condition("alpaca", "Be kind.").prompt(record, None) == f"Be kind.\n\n{plain}"
    assert Condition("alpaca", "", PREFILL).prompt(record, None) == plain + PREFILL
    chat = build_prompt(record, "chat", tokenizer)
    assert Condition("chat", "", PREFILL).prompt(record, tokenizer) == chat + PREFILL
    kind = Condition("chat", "Be kind.").prompt(record, tokenizer)
    assert "Be kind." in kind
    assert kind != chat
    assert Condition("chat", "", PREFILL).whole("how") == "Sure, here is how"
    assert Condition().whole("how") == "how"
    for wrong in ([], "alpaca", ["alpaca", "alpaca"]):
        with pytest.raises(UsageError, match="templates="):
            make_conditions(wrong)


def test_prefilled_answers_are_judged_with_their_prefill(asked):
    judge = Counted("complied")
    evaluate_model(None, None, harmful=HARMFUL[:1], judges=judge, prefill=PREFILL)
    assert judge.shown == [
        ("the bad thing", COMPLIANCE),
        ("the bad thing", f"Sure, here is {COMPLIANCE}"),
    ]


def test_answers_depend_on_their_set_alone():
    model, tokenizer = texts.llama(seed=3), texts.byte_tokenizer()
    sets = {"one": HARMFUL, "two": [*BENIGN, Record("x" * 40)]}
    together = answer_sets(model, tokenizer, sets, max_new_tokens={"one": 4, "two": 5})
    for name, records in sets.items():
        limit = {"one": 4, "two": 5}[name]
        alone = answer_sets(model, tokenizer, {name: records}, max_new_tokens=limit)
        assert alone[name] == together[name]
        expected = texts.greedy_ref(model, tokenizer, build_prompt(records[0]), limit)
        assert together[name][0] == expected


def test_an_answer_ends_where_every_judge_is_certain(asked):
    def sure(word):
        return Counted("complied", is_certain=lambda prompt, answer: word in answer)

    evaluate_model(None, None, harmful=HARMFUL, benign=BENIGN, judges=sure("first"))
    harmful, benign = asked.stops
    assert harmful(0, "the first") is True
    assert harmful(0, "the second") is False
    assert benign is not None
    both = certain_by([sure("first"), sure("step")])
    assert both["harmful"]("p", "first") is False
    assert both["harmful"]("p", "first step") is True
    assert certain_by([sure("first"), Counted("complied")]) == {}
    only = Counted("complied", harm_only=True, is_certain=lambda prompt, answer: True)
    assert list(certain_by([only])) == ["harmful"]
    assert certain_by([]) == {}


def test_a_judge_is_asked_about_the_prompt_and_the_whole_answer(asked):
    seen = []
    judge = Counted("complied", is_certain=lambda *text: seen.append(text) or True)
    records = [Record("the bad thing"), Record("a third")]
    evaluate_model(None, None, harmful=records, judges=judge, prefill=PREFILL)
    asked.stops[0](1, "Well")
    asked.stops[1](0, "how")
    assert seen == [("a third", "Well"), ("the bad thing", "Sure, here is how")]


def test_several_judges_and_their_agreement(asked):
    strict, harm = Counted("refused"), Counted("complied", harm_only=True)
    judges = {"strict": strict, "harm": harm, "refusal": PhraseJudge()}
    found = evaluate_model(None, None, harmful=HARMFUL, benign=BENIGN, judges=judges)
    assert found["harmful_score"] == 0  # the first judge's
    assert found["benign_refusal_rate"] == 100
    assert [found["judges"][name]["harmful_score"] for name in judges] == [0, 100, 33.33]
    assert list(found["agreement"]) == ["strict, harm", "strict, refusal", "harm, refusal"]
    assert found["agreement"]["strict, harm"] == {"kappa": 0, "interval": [0, 0], "num": 3}
    assert len(strict.shown) == 5
    assert len(harm.shown) == 3


def test_ordinary_prompts_where_no_judge_reads_them(asked):
    harm = Counted("complied", harm_only=True)
    found = evaluate_model(None, None, harmful=HARMFUL, benign=BENIGN, judges=harm)
    assert (found["helped_rate"], found["benign_refusal_rate"]) == (50, 50)
    assert list(found["judges"]) == ["Counted"]
    assert found["agreement"] == {}


def test_labels_of_the_task():
    assert task_labels("sst2", TASK) == ("positive", "negative")
    assert task_labels("gsm8k", TASK) == ()
    assert task_labels("label", [Record("a", "", "one two three four five six")]) == ()
    assert task_labels("label", [Record("a", "", str(i)) for i in range(51)]) == ()
    assert task_labels("label", [Record("a", "", str(i % 50)) for i in range(80)]) != ()
    assert task_labels("label", []) == ()


def test_what_is_refused(asked):
    with pytest.raises(UsageError, match="harmful=None"):
        evaluate_model(None, None)
    with pytest.raises(DataError, match="record 1 has no output"):
        evaluate_model(None, None, task_records=BENIGN)
    with pytest.raises(UsageError, match=r"judges=\{\}"):
        evaluate_model(None, None, harmful=HARMFUL, judges={})
    with pytest.raises(UsageError, match="templates="):
        evaluate_model(None, None, harmful=HARMFUL, templates=[])
    assert asked.calls == []
    with pytest.raises(UsageError, match="gave 'harmful' for answer 1"):
        evaluate_model(None, None, harmful=HARMFUL, judges=Counted("harmful"))


def test_the_names_at_the_top():
    assert antidote_fast.evaluate_model is evaluate_model
    assert antidote_fast.PhraseJudge is PhraseJudge
    assert antidote_fast.compare_models is compare_models
    assert isinstance(PhraseJudge(), antidote_fast.Judge)


# --- two models -----------------------------------------------------------------------------------


def rows_of(verdicts, condition="alpaca", kind="harmful", name="set", judge="refusal"):
    return [
        {
            "condition": condition,
            "kind": kind,
            "set": name,
            "prompt": f"p{number}",
            **({"correct": each} if kind == "task" else {"verdicts": {judge: each}}),
        }
        for number, each in enumerate(verdicts)
    ]


def test_two_models_are_compared_on_what_both_were_asked():
    first = rows_of(["complied"] * 7 + ["refused", "broken"])
    second = rows_of(["complied"] + ["refused"] * 6 + ["complied"])
    found = compare_models(first, second)
    assert found == {
        "alpaca": {
            "set": {
                "metric": "complied",
                "judge": "refusal",
                "num_prompts": 8,
                "first": 87.5,
                "second": 25,
                "b": 6,
                "c": 1,
                "p": mcnemar(6, 1),
            }
        }
    }
    assert found["alpaca"]["set"]["p"] == 0.125


def test_each_condition_and_set_by_itself():
    helped = rows_of(["complied", "refused"], kind="benign", name="ordinary")
    right = rows_of([True, False, True], kind="task", name="task")
    alone = rows_of(["complied"], condition="chat")
    found = compare_models([*helped, *right, *alone], [*right, *helped])
    assert list(found) == ["alpaca"]
    assert {name: told["metric"] for name, told in found["alpaca"].items()} == {
        "ordinary": "helped",
        "task": "correct",
    }
    assert found["alpaca"]["task"]["judge"] is None
    assert [found["alpaca"]["task"][k] for k in ("b", "c", "p")] == [0, 0, 1]


def test_a_prompt_that_occurs_twice_is_two():
    first, second = rows_of(["complied", "refused"]), rows_of(["refused", "refused"])
    for row in (*first, *second):
        row["prompt"] = "same"
    told = compare_models(first, second)["alpaca"]["set"]
    assert [told[k] for k in ("num_prompts", "b", "c")] == [2, 1, 0]


def test_what_cannot_be_compared(tmp_path):
    rows = rows_of(["complied"])
    with pytest.raises(DataError, match="has no prompt in common with first=1 rows"):
        compare_models(rows, rows_of(["complied"], name="other"))
    with pytest.raises(DataError, match="one in common to be compared, and are refusal and other"):
        compare_models(rows, rows_of(["complied"], judge="other"))
    with pytest.raises(DataError, match="second: row 1: must be a row"):
        compare_models(rows, rows_of(["harmful"]))
    with pytest.raises(DataError, match="first: row 1: must be a row"):
        compare_models([{"prompt": "p"}], rows)
    with pytest.raises(DataError, match="must be a folder that evaluate wrote"):
        compare_models(tmp_path, rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / VERDICTS_FILE).write_text(lines)
    assert compare_models(tmp_path, str(tmp_path))["alpaca"]["set"]["p"] == 1


def test_the_rows_hold_no_text():
    sets = {"harmful": {"set": HARMFUL}, "task": {"task": TASK}}
    answers = {
        "alpaca": {
            "harmful": {"set": [SCRIPT[r.instruction] for r in HARMFUL]},
            "task": {"task": ["positive", "positive"]},
        }
    }
    verdicts = {
        judge: {"alpaca": {"harmful": {"set": [one] * 3}}}
        for judge, one in (("a", "complied"), ("b", "refused"))
    }
    rows = verdict_rows(sets, answers, verdicts, "sst2")
    assert rows[0] == {
        "condition": "alpaca",
        "kind": "harmful",
        "set": "set",
        "prompt": prompt_id(HARMFUL[0]),
        "verdicts": {"a": "complied", "b": "refused"},
    }
    assert [row["correct"] for row in rows[3:]] == [True, False]
    assert prompt_id(Record("The  BAD thing")) == prompt_id(HARMFUL[0]) != prompt_id(HARMFUL[1])
    text = json.dumps(rows)
    assert not any(word in text for word in ("bad thing", "film", "Sure"))
    assert len(verdict_rows(sets, answers, verdicts, "alpaca")) == 3
