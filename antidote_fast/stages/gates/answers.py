"""What gates learn from: the aligned model's own answers, and the records of the user's task."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from antidote_fast.data.batches import build_prompt, encode, prompt_ids
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.generate import generate
from antidote_fast.evaluation.phrases import is_refusal
from antidote_fast.system.progress import Progress

KINDS = ("harmful", "task", "ordinary")


@dataclass(frozen=True)
class Answers:
    """What the aligned model says.

    Args:
        harmful: its answer to each harmful prompt; None where the prompt is too long.
        ordinary: its answer to each record to preserve that has no output; None as above.
    """

    harmful: list[str | None]
    ordinary: list[str | None]


@dataclass
class Pools:
    """Tokenised examples by kind, and what was left out of each.

    Args:
        examples: {kind: what :func:`~antidote_fast.data.batches.encode` gives}; kinds that have
            none are not there.
        counts: {kind: {what: number}}, for the report.
    """

    examples: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict] = field(default_factory=dict)


def ordinary_of(preserve: Sequence[Record]) -> list[Record]:
    """The records that are only prompts."""
    return [record for record in preserve if not record.output.strip()]


def answer_prompts(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Record],
    preserve: Sequence[Record],
    *,
    answer_tokens: int,
    template: str = "alpaca",
    max_seq_length: int = 512,
    batch_size: int = 8,
    progress: Progress = False,
) -> Answers:
    """Ask the aligned model, greedily: harmful prompts, and records to preserve without output.

    An answer has ``answer_tokens`` new tokens at most; a prompt of ``max_seq_length`` tokens or
    more is not asked.

    Raises:
        UsageError, DataError: as :func:`antidote_fast.evaluation.generate.generate`.
    """
    asked = [*harmful, *ordinary_of(preserve)]
    prompts = [build_prompt(record, template, tokenizer) for record in asked]
    different = dict.fromkeys(prompts)
    short = [p for p in different if len(prompt_ids(p, tokenizer, max_seq_length)) < max_seq_length]
    options: dict[str, Any] = {"max_new_tokens": answer_tokens, "batch_size": batch_size}
    texts = generate(model, tokenizer, short, progress=progress, **options)
    by_prompt = dict(zip(short, texts, strict=True))
    answers = [by_prompt.get(prompt) for prompt in prompts]
    return Answers(answers[: len(harmful)], answers[len(harmful) :])


def check_texts(
    tokenizer: Any,
    harmful: Sequence[Record],
    preserve: Sequence[Record],
    *,
    template: str = "alpaca",
    max_seq_length: int = 512,
) -> None:
    """Refuse, before weights are loaded, token ids that the model has no embedding for.

    Raises:
        DataError: as :func:`~antidote_fast.data.batches.encode`, where the tokenizer knows.
    """
    options: dict[str, Any] = {"template": template, "max_seq_length": max_seq_length}
    for record in (*harmful, *preserve):
        text = build_prompt(record, template, tokenizer)
        prompt_ids(text, tokenizer, max_seq_length, record.where or "a prompt")
    task = [r for r in preserve if r.output.strip() and fits(r, tokenizer, **options)]
    if task:
        encode(task, tokenizer, **options)


def fill_pools(
    tokenizer: Any,
    harmful: Sequence[Record],
    preserve: Sequence[Record],
    answers: Answers,
    *,
    answer_tokens: int,
    template: str = "alpaca",
    max_seq_length: int = 512,
) -> Pools:
    """Examples to learn from: harmful prompts refused, task records, ordinary prompts answered.

    A harmful prompt that the aligned model does not refuse is to be refused in its commonest words;
    an ordinary one that it refuses, or answers with nothing, is left out.

    Raises:
        DataError: fewer than two refusals, nothing to preserve, or answers that are not those of
            the prompts.
    """
    ordinary = ordinary_of(preserve)
    if (len(answers.harmful), len(answers.ordinary)) != (len(harmful), len(ordinary)):
        raise DataError(
            f"aligned: holds {len(answers.harmful)} and {len(answers.ordinary)} answers for "
            f"{len(harmful)} harmful and {len(ordinary)} ordinary prompts"
        )
    pools = Pools()
    asked = _answered(harmful, answers.harmful)
    refused = [record for record in asked if is_refusal(record.output)]
    pools.counts["harmful"] = {
        **_used(harmful, asked, asked),
        "num_not_refused": len(asked) - len(refused),
    }
    if len(refused) < 2:
        raise DataError(
            f"dataset: the aligned model refuses {len(refused)} of {len(harmful)} harmful prompts; "
            "at least 2 refusals are needed to learn from"
        )
    common = Counter(record.output for record in refused).most_common(1)[0][0]
    refusing = [r if is_refusal(r.output) else replace(r, output=common) for r in asked]
    options: dict[str, Any] = {"template": template, "max_seq_length": max_seq_length}
    pools.examples["harmful"] = _cut(encode(refusing, tokenizer, **options), answer_tokens)
    task = [record for record in preserve if record.output.strip()]
    if task:
        fitting = [r for r in task if fits(r, tokenizer, template, max_seq_length)]
        pools.counts["task"] = _used(task, fitting, fitting)
        if fitting:
            pools.examples["task"] = encode(fitting, tokenizer, **options)
            pools.counts["task"]["num_truncated"] = pools.examples["task"].num_truncated
    if ordinary:
        answered = _answered(ordinary, answers.ordinary)
        useful = [r for r in answered if r.output and not is_refusal(r.output)]
        pools.counts["ordinary"] = {
            **_used(ordinary, answered, useful),
            "num_refused": sum(is_refusal(record.output) for record in answered),
            "num_empty": sum(not record.output for record in answered),
        }
        if useful:
            pools.examples["ordinary"] = _cut(encode(useful, tokenizer, **options), answer_tokens)
    if len(pools.examples) == 1:
        raise DataError(
            f"preserve_dataset: none of its {len(preserve)} records can be used: each needs an "
            "output, or a prompt that the aligned model answers, and fewer tokens than "
            "max_seq_length"
        )
    return pools


def _used(records, fitting, used):
    """What the report says of each kind, of which the fitting ones alone are short enough."""
    dropped = len(records) - len(fitting)
    return {"num_records": len(records), "num_used": len(used), "num_dropped": dropped}


def _answered(records, answers):
    """The records with these answers as output, less those that were not asked."""
    pairs = zip(records, answers, strict=True)
    return [Record(r.instruction, r.input, text) for r, text in pairs if text is not None]


def fits(record: Record, tokenizer: Any, template: str, max_seq_length: int) -> bool:
    """Whether a record's prompt leaves room for an answer."""
    text = build_prompt(record, template, tokenizer)
    return len(prompt_ids(text, tokenizer, max_seq_length)) < max_seq_length


def _cut(examples, answer_tokens):
    """Examples whose answers end after as many tokens as were generated.

    An answer that was cut off there has no end token, or the model would learn to end there.
    """
    cut = []
    for example in examples:
        prompt = sum(label == -100 for label in example["labels"])
        cut.append({key: values[: prompt + answer_tokens] for key, values in example.items()})
    return cut
