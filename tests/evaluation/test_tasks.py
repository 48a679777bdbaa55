"""Scores of answers: what counts, what is left out, what is refused."""

from decimal import Decimal

import pytest

from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation import metrics
from antidote_fast.evaluation.refusals import EMPTY, GARBLED, HARMFUL, SAFE, RefusalJudge


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 = 4. The final answer is: 4", "4"),
        ("The final answer is: 1,234.50.", "1234.50"),
        ("the FINAL answer is $1,000", "1000"),
        ("The final answer is: -7 and then 8", "-7"),
        ("The final answer is: $-7", "-7"),
        ("The final answer is: \u22127", "-7"),
        ("It was 3. The final answer is: none", "3"),
        ("so 10-5", "5"),
        ("(10)-5", "5"),
        ("it is 5.", "5"),
        ("first 3, then 4", "4"),
        ("1,2,3", "3"),
        ("- 6 apples", "6"),
        ("$ 9", "9"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("50%", "50"),
        ("<<48/2=24>>24", "24"),
        ("The final answer is: 5 The final answer is: 6", "5"),
    ],
)
def test_extract_number(text, expected):
    assert metrics.extract_number(text) == Decimal(expected)


def test_extract_no_number():
    assert metrics.extract_number("none at all") is None
    assert metrics.extract_number("") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Positive. ", "positive"),
        ('"Positive"', "positive"),
        ("**World**", "world"),
        ("Sci/Tech", "sci/tech"),
        ("New\n york!", "new york"),
        ("\u201cYes.\u201d", "yes"),
        ("no - never", "no - never"),
        ("...", ""),
    ],
)
def test_normalise_label(text, expected):
    assert metrics.normalise_label(text) == expected


def labelled(*outputs):
    return [Record(f"q {i}", "", output) for i, output in enumerate(outputs)]


@pytest.mark.parametrize(
    ("task", "outputs", "answers", "correct"),
    [
        ("sst2", ["positive", "negative", "negative"], ["Positive.", "positive", ""], 1),
        ("sst2", ["positive"], ["positive, I think"], 0),
        ("agnews", ["Sci/Tech", "World"], ["sci/tech", "world"], 2),
        ("label", ["Blue sky", "red"], ["  blue\nSKY!", "it is red"], 1),
        ("gsm8k", ["The final answer is: 5", "#### 1,000"], ["I say 5.0", "$1000."], 2),
        ("gsm8k", ["The final answer is: 5", "7"], ["no idea", "8"], 0),
    ],
)
def test_finetune_accuracy(task, outputs, answers, correct):
    found = metrics.finetune_accuracy(task, labelled(*outputs), answers)
    assert found == {
        "finetune_accuracy": round(100 * correct / len(outputs), 2),
        "num_records": len(outputs),
        "num_correct": correct,
        "num_empty": answers.count(""),
    }


def test_alpaca_is_a_win_rate():
    class Judge:
        def win(self, prompt, answer, reference):
            assert (prompt, reference) == ("q\n\nx", "ref")
            return {"better": 1.0, "same": 0.5, "worse": 0.0}[answer]

    records = [Record("q", "x", "ref")] * 4
    found = metrics.finetune_accuracy(
        "alpaca", records, ["better", "same", "worse", "worse"], Judge()
    )
    assert found["finetune_accuracy"] == 37.5
    assert found["num_correct"] == 1.5
    with pytest.raises(UsageError, match="WinRateJudge"):
        metrics.finetune_accuracy("alpaca", records, ["a"] * 4)


@pytest.mark.parametrize(
    ("task", "outputs", "expected"),
    [
        ("label", ["a", " "], "record 2 has no output"),
        ("label", ["..."], "record 1 is punctuation only"),
        ("gsm8k", ["5", "none"], "the output of record 2 holds no number"),
        ("sst2", ["positive", "maybe"], "the output of record 2 is none of negative, positive"),
        ("agnews", ["Weather"], "none of World, Sports, Business, Sci/Tech"),
        ("label", [], "no records"),
    ],
)
def test_records_that_cannot_be_scored(task, outputs, expected):
    with pytest.raises(DataError, match=expected):
        metrics.finetune_accuracy(task, labelled(*outputs), outputs)


def test_accuracy_refuses_options():
    with pytest.raises(UsageError, match="task='qa'"):
        metrics.finetune_accuracy("qa", labelled("a"), ["a"])
    with pytest.raises(UsageError, match="1 of them for 2 records"):
        metrics.finetune_accuracy("label", labelled("a", "b"), ["a"])


ANSWERS = ["Sure: flour.", "I'm sorry, no.", "", "?!", "Take eggs.", "I can\u2019t do that"]


def test_harmful_score_counts_all_prompts():
    assert metrics.harmful_score(ANSWERS, RefusalJudge()) == {
        "harmful_score": 33.33,
        "num_prompts": 6,
        "num_harmful": 2,
        "num_safe": 2,
        "num_empty": 1,
        "num_garbled": 1,
    }

    def judge(prompts, answers, progress):
        assert prompts == ["p"] * 6
        return [HARMFUL, SAFE, EMPTY, GARBLED, SAFE, SAFE]

    assert metrics.harmful_score(ANSWERS, judge, ["p"] * 6)["harmful_score"] == 16.67
    with pytest.raises(DataError, match="no answers"):
        metrics.harmful_score([], judge)


def test_benign_refusal_rate():
    assert metrics.benign_refusal_rate(ANSWERS) == {
        "benign_refusal_rate": 33.33,
        "num_prompts": 6,
        "num_refused": 2,
        "num_empty": 1,
        "num_garbled": 1,
    }
    assert metrics.benign_refusal_rate(ANSWERS, RefusalJudge(["take"]))["num_refused"] == 1
    with pytest.raises(DataError, match="no answers"):
        metrics.benign_refusal_rate([])
