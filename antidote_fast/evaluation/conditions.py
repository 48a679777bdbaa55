"""The conditions under which a model is asked: template, system prompt, prefill."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from antidote_fast.data.batches import build_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import UsageError
from antidote_fast.models.kinds import Tokenizer

PREFILL = "Sure, here is"
"""What a prefilled answer begins with."""

Sets = Mapping[str, Mapping[str, Sequence[Record]]]
"""Records by kind (harmful, task, benign) and by the name of their set."""
Answers = dict[str, dict[str, dict[str, list[str]]]]
"""Answers, or verdicts on them, by condition, kind and set, in the order of the records."""


def question(record: Record) -> str:
    """What a record asks, without a template: what a judge reads."""
    return f"{record.instruction}\n{record.input}".strip()


def prompt_id(record: Record) -> str:
    """A short hash of a prompt, the same wherever the prompt stands."""
    return hashlib.sha256(record.prompt_key.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Condition:
    """How a prompt is put.

    Args:
        template: as :func:`antidote_fast.data.batches.build_prompt` takes it.
        system_prompt: as that takes it; may be empty.
        prefill: what the answer begins with, which the model goes on from; may be empty.
    """

    template: str = "alpaca"
    system_prompt: str = ""
    prefill: str = ""

    @property
    def name(self) -> str:
        """Such as ``alpaca``, ``chat+system`` or ``alpaca+prefill``."""
        parts = (self.system_prompt and "system", self.prefill and "prefill")
        return "+".join([self.template, *filter(None, parts)])

    @property
    def is_plain(self) -> bool:
        """Whether nothing is added to the template."""
        return not self.system_prompt and not self.prefill

    def prompt(self, record: Record, tokenizer: Tokenizer | None) -> str:
        """The text that the model reads.

        Raises:
            UsageError: as :func:`antidote_fast.data.batches.build_prompt`.
        """
        added = {"system": self.system_prompt, "prefill": self.prefill}
        return build_prompt(record, self.template, tokenizer, **added)

    def whole(self, answer: str) -> str:
        """An answer with its prefill in front."""
        return f"{self.prefill} {answer}".strip() if self.prefill else answer


def make_conditions(
    templates: Sequence[str], system_prompt: str = "", prefill: str = ""
) -> list[Condition]:
    """Each template alone, then each with the system prompt, then each with the prefill.

    The first one is that of the headline.

    Raises:
        UsageError: no template, or one named twice.
    """
    if isinstance(templates, str) or not templates or len({*templates}) < len(templates):
        raise UsageError(f"templates={templates!r}: must be a list of templates, each named once")
    added = [("", "")]
    added += [(system_prompt, "")] if system_prompt else []
    added += [("", prefill)] if prefill else []
    return [Condition(template, *each) for each in added for template in templates]


def kinds_asked(condition: Condition, sets: Sets) -> dict[str, Mapping[str, Sequence[Record]]]:
    """The sets that are asked in a condition: all, but the task where something is added.

    The user's task is measured as it was trained.
    """
    return {kind: named for kind, named in sets.items() if kind != "task" or condition.is_plain}
