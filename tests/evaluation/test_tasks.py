"""Answers to the user's task: which are right, and what is refused."""

from fractions import Fraction

import pytest

from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation import tasks
from antidote_fast.evaluation.rates import wilson


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
        ("10 - 5 = 5", "5"),
        ("The final answer is: 10 - 5 = 5", "5"),
        ("The final answer is: 10 - 5 = **5**", "5"),
        ("The final answer is: 10 - 20 = -10.", "-10"),
        ("10 apples - 5 apples = 5 apples", "5"),
        ("$10 - $5 = $5", "5"),
        ("5 = 10 - 5", "5"),
        ("10 -5", "5"),
        ("10 \u2212 5 = 5", "5"),
        ("2 * -5 = -10", "-10"),
        ("5 x 3 = 15", "15"),
        ("5 \\times 3 = 15", "15"),
        ("2 + 2 = 4. So with 3 more he has 7.", "7"),
        ("x = -5", "-5"),
        ("4, -5", "-5"),
        ("1/2", "1/2"),
        ("1 / 2.", "1/2"),
        ("-1/2", "-1/2"),
        ("3 1/2", "7/2"),
        ("-3 1/2 cups", "-7/2"),
        ("7 / 2 = 3 1/2", "7/2"),
        ("48/2", "24"),
        ("on 1/2/2024", "2024"),
        ("5/0", "0"),
        ("5$", "5"),
        ("\u20ac5", "5"),
        ("5 USD", "5"),
        ("1,234.50 dollars.", "1234.5"),
        ("1,000,000", "1000000"),
        ("**5**", "5"),
        ("**-5**", "-5"),
        ("\\boxed{5}", "5"),
        ("so $\\boxed{-5}$, which is less than 3", "-5"),
        ("\\boxed{3\\frac{1}{2}}", "7/2"),
        ("The final answer is: \\boxed{7}", "7"),
    ],
)
def test_extract_number(text, expected):
    assert tasks.extract_number(text) == Fraction(expected)


def test_extract_no_number():
    assert tasks.extract_number("none at all") is None
    assert tasks.extract_number("") is None


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
    assert tasks.normalise_label(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Billing", "billing"),
        ("Team: Billing", "billing"),
        ("Billing team", "billing"),
        ("The answer is Billing.", "billing"),
        ("Sure! It is **Billing**.\nShipping would be wrong.", "billing"),
        ("Category: _Sci/Tech_", "sci/tech"),
        ("billing, I think", "billing"),
        ("billing-dispute desk", None),
        ("Billing dispute team", "billing dispute"),
        ("Billing or Shipping", None),
        ("Billing/Shipping", None),
        ("not Billing", None),
        ("It isn't a Billing matter", None),
        ("Billing is not right.", None),
        ("Is it Billing? I do not know", None),
        ("worldwide", None),
        ("the world's best", None),
        ("non-shipping", None),
        ("It is 1.5", None),
        ("one two three four five six seven eight nine ten eleven billing", "billing"),
        ("one two three four five six seven eight nine ten eleven twelve billing", None),
        ("one two\nthree four five\nsix seven eight\na b c d e billing", None),
        ("", None),
        ("...", None),
    ],
)
def test_stated_label(answer, expected):
    labels = ["Billing", "Shipping", "World", "Sci/Tech", "Billing dispute", "1", "2"]
    assert tasks.stated_label(answer, labels) == expected


def test_a_label_that_holds_another_or_a_negation():
    assert tasks.stated_label("It is not spam.", ["spam", "not spam"]) == "not spam"
    assert tasks.stated_label("It is spam.", ["spam", "not spam"]) == "spam"
    assert tasks.stated_label("No, it is not.", ["yes", "no"]) == "no"


def labelled(*outputs):
    return [Record(f"q {i}", "", output) for i, output in enumerate(outputs)]


@pytest.mark.parametrize(
    ("task", "outputs", "answers", "correct"),
    [
        ("sst2", ["positive", "negative", "negative"], ["Positive.", "positive", ""], 1),
        ("sst2", ["positive"] * 3, ["positive, I think", "positive or negative", "not it"], 1),
        ("sst2", ["positive"] * 2, ["negative sentiment", "positive sentiment"], 1),
        ("agnews", ["Sci/Tech", "World"], ["sci/tech", "world"], 2),
        ("label", ["Blue sky", "red"], ["  blue\nSKY!", "it is red"], 2),
        ("label", ["Billing", "Shipping"], ["Shipping, not Billing", "Team: Shipping"], 1),
        ("gsm8k", ["The final answer is: 5", "#### 1,000"], ["I say 5.0", "$1000."], 2),
        ("gsm8k", ["The final answer is: 5", "7"], ["no idea", "8"], 0),
        ("gsm8k", ["0.5", "5", "0.1"], ["1/2", "10 - 5 = 5", "0.1000000000000000055"], 2),
    ],
)
def test_finetune_accuracy(task, outputs, answers, correct):
    found = tasks.finetune_accuracy(task, labelled(*outputs), answers)
    assert found == {
        "finetune_accuracy": round(100 * correct / len(outputs), 2),
        "interval": wilson(correct, len(outputs)),
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
    found = tasks.finetune_accuracy(
        "alpaca", records, ["better", "same", "worse", "worse"], Judge()
    )
    assert found["finetune_accuracy"] == 37.5
    assert found["num_correct"] == 1.5
    assert found["interval"] == wilson(1.5, 4)
    with pytest.raises(UsageError, match="WinRateJudge"):
        tasks.finetune_accuracy("alpaca", records, ["a"] * 4)


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
        tasks.finetune_accuracy(task, labelled(*outputs), outputs)


def test_accuracy_refuses_options():
    with pytest.raises(UsageError, match="task='qa'"):
        tasks.finetune_accuracy("qa", labelled("a"), ["a"])
    with pytest.raises(UsageError, match="1 of them for 2 records"):
        tasks.finetune_accuracy("label", labelled("a", "b"), ["a"])
