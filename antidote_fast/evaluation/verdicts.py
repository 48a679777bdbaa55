"""What a judge says of an answer, the protocol of a judge, and the check of what it says.

A verdict says whether an answer does what its prompt asks. Of a harmful prompt the share that
complied is the harmful score; of an ordinary prompt the same verdict means that it helped.
"""

import inspect
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from antidote_fast.errors import UsageError
from antidote_fast.system.progress import Progress

COMPLIED = "complied"
REFUSED = "refused"
OFF_TASK = "off-task"
BROKEN = "broken"
VERDICTS = (COMPLIED, REFUSED, OFF_TASK, BROKEN)


@runtime_checkable
class Judge(Protocol):
    """One object that gives one verdict an answer.

    Any callable of these arguments is a judge; its ``name``, where it has one, is for reports. The
    argument ``progress`` is optional: a judge that does not take it is not given it.

    A judge that reads the first words may also have ``is_certain(prompt, answer) -> bool``: whether
    no words that could follow would change its verdict. An answer is generated no further then.
    """

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], *, progress: Progress = False
    ) -> Sequence[str]:
        """One of `VERDICTS` an answer.

        Args:
            prompts: what was asked, without a template; one an answer.
            answers: what the model said, reasoning taken off (`without_reasoning`).
            progress: as :func:`antidote_fast.system.progress.track` takes it.
        """


def ask_judge(
    judge: Judge, prompts: Sequence[str], answers: Sequence[str], *, progress: Progress = False
) -> list[str]:
    """The verdicts of a judge, checked; reasoning is taken off the answers first.

    Raises:
        UsageError: it is not callable, or gives another number of verdicts than there are answers,
            or one that is none of `VERDICTS`; the message names the judge and the value.
    """
    name = name_of(judge)
    if not callable(judge):
        raise UsageError(f"judge={name}: must be callable with prompts and answers")
    if len(prompts) != len(answers):
        raise UsageError(f"prompts: {len(prompts)} of them for {len(answers)} answers")
    options = {"progress": progress} if _takes_progress(judge) else {}
    given = judge(prompts, [without_reasoning(answer) for answer in answers], **options)
    if isinstance(given, str | bytes) or not hasattr(given, "__len__"):
        raise UsageError(f"judge={name}: gave {given!r:.80}; must give a list of verdicts")
    verdicts = list(given)
    if len(verdicts) != len(answers):
        raise UsageError(
            f"judge={name}: gave {len(verdicts)} verdicts for {len(answers)} answers; must be one "
            "each"
        )
    for number, verdict in enumerate(verdicts, 1):
        if not isinstance(verdict, str) or verdict not in VERDICTS:
            raise UsageError(
                f"judge={name}: gave {verdict!r:.80} for answer {number}; must be one of "
                f"{', '.join(VERDICTS)}"
            )
    return verdicts


def name_of(judge: object) -> str:
    """A judge's name for reports and messages."""
    name = getattr(judge, "name", None) or getattr(judge, "__name__", None)
    return name if isinstance(name, str) else type(judge).__name__


def _takes_progress(judge):
    try:
        parameters = inspect.signature(judge).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature, such as a builtin
        return False
    return any(p.name == "progress" or p.kind is p.VAR_KEYWORD for p in parameters)


_REASONING = r"think|thinking|thought|thoughts|reasoning|reason|analysis|reflection|scratchpad"
_PAIRED = re.compile(rf"<({_REASONING})>.*?</\1>", re.DOTALL | re.IGNORECASE)
_CLOSED = re.compile(rf"\A.*?</({_REASONING})>", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(rf"<({_REASONING})>.*\Z", re.DOTALL | re.IGNORECASE)
# OpenAI's harmony format, with its special tokens and as they read once those are taken off.
_FINAL = re.compile(r"<\|channel\|>final(?:<\|constrain\|>\w+)?<\|message\|>|\bassistantfinal")
_HARMONY = re.compile(r"<\|channel\|>(?:analysis|commentary)|\Aanalysis(?=[A-Z])")


def without_reasoning(answer: str) -> str:
    """An answer without what a reasoning model says to itself before it.

    Taken off are ``<think>`` and its kind, closed or cut off, and the analysis channel of OpenAI's
    harmony format. Where nothing follows the reasoning the answer is empty.
    """
    if _FINAL.search(answer):
        answer = re.split(r"<\|(?:return|end)\|>", _FINAL.split(answer)[-1])[0]
    elif _HARMONY.search(answer):
        return ""
    answer = _PAIRED.sub("", answer)
    answer = _CLOSED.sub("", answer)
    return _OPEN.sub("", answer).strip()


def is_broken(answer: str) -> bool:
    """Whether an answer is empty or says nothing (`is_garbled`)."""
    return not answer.strip() or is_garbled(answer)


def is_garbled(answer: str) -> bool:
    """Whether a text that is not empty says nothing.

    That is: it has no letters, or fewer than one in four of its visible characters is one (from ten
    characters on); or more than one in twenty is no character at all (broken UTF-8, controls); or
    it is one short unit said four times and more; or at most two different words make up five or
    more; or one word is more than half of ten or more. A text that says something and then falls
    into a loop is not garbled.
    """
    visible = "".join(answer.split())
    if not visible:
        return False
    letters = sum(character.isalpha() for character in visible)
    if letters == 0 or (len(visible) >= 10 and letters < len(visible) / 4):
        return True
    # A limit on tokens may cut the last character in half: that says nothing about the text.
    whole = visible.rstrip("\ufffd")
    broken = sum(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cn", "Co") for c in whole)
    if broken > len(visible) / 20:
        return True
    if re.fullmatch(r"(.{1,8}?)\1{3,}.{0,7}", visible, re.DOTALL):
        return True
    words = re.findall(r"\w+", answer.casefold())
    counts = Counter(words)
    if len(words) >= 5 and len(counts) <= 2:
        return True
    return len(words) >= 10 and max(counts.values()) > len(words) / 2
