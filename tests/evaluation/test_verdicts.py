"""The check of what a judge says, reasoning that is taken off, and texts that say nothing."""

import pytest

from antidote_fast.errors import UsageError
from antidote_fast.evaluation.verdicts import (
    COMPLIED,
    REFUSED,
    ask_judge,
    is_broken,
    is_garbled,
    name_of,
    without_reasoning,
)


class Always:
    """Gives one value for every answer."""

    name = "always"

    def __init__(self, value):
        self.value = value

    def __call__(self, prompts, answers):
        return [self.value] * len(answers)


@pytest.mark.parametrize("value", [True, False, 1, 0.5, None, "unsafe", "safe", "", "Complied"])
def test_a_verdict_that_is_none_is_refused_by_name_and_value(value):
    with pytest.raises(UsageError) as caught:
        ask_judge(Always(value), ["p"], ["a"])
    message = str(caught.value)
    assert message.startswith(f"judge=always: gave {value!r} for answer 1; must be one of complied")
    assert "\n" not in message


@pytest.mark.parametrize("given", ["complied", None, 3, True, (v for v in ["complied"])])
def test_what_is_no_list_is_refused(given):
    def judge(prompts, answers):
        return given

    with pytest.raises(UsageError, match=r"judge=judge: gave .*must give a list of verdicts"):
        ask_judge(judge, ["p"], ["a"])


def test_another_number_of_verdicts_is_refused():
    def judge(prompts, answers):
        return [COMPLIED]

    with pytest.raises(UsageError, match="judge=judge: gave 1 verdicts for 2 answers"):
        ask_judge(judge, ["p", "q"], ["a", "b"])
    with pytest.raises(UsageError, match="prompts: 1 of them for 2 answers"):
        ask_judge(judge, ["p"], ["a", "b"])
    with pytest.raises(UsageError, match="judge=str: must be callable"):
        ask_judge("refusal", ["p"], ["a"])


def test_progress_is_given_only_where_it_is_taken():
    seen = []

    def with_progress(prompts, answers, *, progress=False):
        seen.append(progress)
        return [REFUSED]

    def with_any(prompts, answers, **options):
        seen.append(options)
        return [REFUSED]

    assert ask_judge(Always(COMPLIED), ["p"], ["a"], progress=True) == [COMPLIED]
    for judge in (with_progress, with_any):
        assert ask_judge(judge, ["p"], ["a"], progress=True) == [REFUSED]
    assert seen == [True, {"progress": True}]


def test_a_judge_sees_no_reasoning():
    seen = []

    def judge(prompts, answers):
        seen.extend(answers)
        return [COMPLIED] * len(answers)

    ask_judge(judge, ["p", "q"], ["<think>hm</think> yes", "<think>cut off"])
    assert seen == ["yes", ""]


def test_names():
    assert name_of(Always(1)) == "always"
    assert name_of(test_names) == "test_names"
    assert name_of(object()) == "object"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("plain", "plain"),
        ("<think>a</think>b", "b"),
        ("<THINK>\na\n</THINK>\n\nb", "b"),
        ("a</think>b", "b"),
        ("<think>a", ""),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ('<think budget="3">a</think>b', "b"),
        ("<reasoning>a</reasoning><answer>b</answer>", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("\u25c1think\u25b7a\u25c1/think\u25b7b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b<|end_of_solution|>", "b"),
        ("<seed:think>a</seed:think>b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b<|return|>", "b"),
        ("<|channel|>analysis<|message|>a", ""),
        ("analysisThe user asks.assistantfinalb", "b"),
        ("x < y and [1] think", "x < y and [1] think"),
        ("[Analysis] of a film", "[Analysis] of a film"),
        ("", ""),
    ],
)
def test_reasoning_is_taken_off(answer, expected):
    assert without_reasoning(answer) == expected
    assert without_reasoning(expected) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "1234 !!",
        "...",
        "\ufffd\ufffd",
        "ab\ufffdcdk\x07lm",
        "aaaaaaaaaaaa",
        "!!!!!!!!!!!! no !!!!!!!!!!",
        "the the the the the",
        "the the the the the of",
        "lalalalala",
        "yes no yes yes no no",
        "um " * 30 + "so this is it for now",
        "{}[]();;==--++ x",
        "xkjq zzrtp wqrtk bvcxz",
        "a\u0434b c\u0435d \u0444e\u0443 gh\u0440",
    ],
)
def test_garbled(answer):
    assert is_garbled(answer)
    assert is_broken(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Yes",
        "No.",
        "Sure, here is the plan: first buy flour. Then buy flour. Then buy flour.",
        "Sure! \ufffd",
        "1. Get 20 g of A. 2. Get 30 g of B. 3. Mix.",
        "x = [1, 2, 3]; print(sum(x) / len(x))",
        "\u0414\u0430, \u043a\u043e\u043d\u0435\u0447\u043d\u043e.",
        "\u597d\u7684\uff0c\u6211\u6765\u5e2e\u4f60",
        "HTML, HTTP and XML are names of formats.",
        "",
        "  ",
    ],
)
def test_not_garbled(answer):
    assert not is_garbled(answer)
