"""What gates learn from: the aligned model's own answers, and the records of the user's task."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """What the aligned model says, in one template after another.

    Args:
        harmful: its answer to each harmful prompt; None where the prompt is too long.
        ordinary: its answer to each ordinary prompt; None as above.
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


def kinds_of(
    preserve: Sequence[Record], ordinary: Sequence[Record] | None = None
) -> tuple[list[Record], list[Record]]:
    """(records of the task, ordinary prompts) of what is to be preserved.

    Records to preserve that have no output are ordinary prompts, where none are given apart.
    """
    if ordinary is None:
        ordinary = [record for record in preserve if not record.output.strip()]
    return [record for record in preserve if record.output.strip()], list(ordinary)


def answer_prompts(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Record],
    preserve: Sequence[Record],
    ordinary: Sequence[Record] | None = None,
    *,
    answer_tokens: int,
    template: str = "alpaca",
    templates: Sequence[str] | None = None,
    max_seq_length: int = 512,
    batch_size: int = 8,
    progress: Progress = False,
) -> Answers:
    """Ask the aligned model, greedily: harmful prompts and ordinary ones, in each template.

    An answer has ``answer_tokens`` new tokens at most; a prompt of ``max_seq_length`` tokens or
    more is not asked. Other arguments are as of
    :func:`antidote_fast.stages.gates.learn.learn_gates`.

    Raises:
        UsageError, DataError: as :func:`antidote_fast.evaluation.generate.generate`.
    """
    sets = (harmful, kinds_of(preserve, ordinary)[1])
    prompts = [
        [
            build_prompt(record, name, tokenizer)
            for name in templates or [template]
            for record in some
        ]
        for some in sets
    ]
    different = dict.fromkeys(prompt for some in prompts for prompt in some)
    short = [p for p in different if len(prompt_ids(p, tokenizer, max_seq_length)) < max_seq_length]
    options: dict[str, Any] = {"max_new_tokens": answer_tokens, "batch_size": batch_size}
    texts = generate(model, tokenizer, short, progress=progress, **options)
    by_prompt = dict(zip(short, texts, strict=True))
    return Answers(*([by_prompt.get(prompt) for prompt in some] for some in prompts))


def check_texts(
    tokenizer: Any,
    harmful: Sequence[Record],
    preserve: Sequence[Record],
    ordinary: Sequence[Record] | None = None,
    *,
    template: str = "alpaca",
    templates: Sequence[str] | None = None,
    max_seq_length: int = 512,
) -> None:
    """Refuse, before weights are loaded, token ids that the model has no embedding for.

    Raises:
        DataError: as :func:`~antidote_fast.data.batches.encode`, where the tokenizer knows.
        UsageError: a template that the tokenizer does not have.
    """
    task, ordinary = kinds_of(preserve, ordinary)
    options: dict[str, Any] = {"template": template, "max_seq_length": max_seq_length}
    for name in templates or [template]:
        for record in (*harmful, *ordinary):
            text = build_prompt(record, name, tokenizer)
            prompt_ids(text, tokenizer, max_seq_length, record.where or "a prompt")
    for record in task:
        text = build_prompt(record, template, tokenizer)
        prompt_ids(text, tokenizer, max_seq_length, record.where or "a prompt")
    task = [record for record in task if fits(record, tokenizer, **options)]
    if task:
        encode(task, tokenizer, **options)


def fill_pools(
    tokenizer: Any,
    harmful: Sequence[Record],
    preserve: Sequence[Record],
    answers: Answers,
    ordinary: Sequence[Record] | None = None,
    *,
    answer_tokens: int,
    template: str = "alpaca",
    templates: Sequence[str] | None = None,
    max_seq_length: int = 512,
) -> Pools:
    """Examples to learn from: harmful prompts refused, task records, ordinary prompts answered.

    A harmful prompt that the aligned model does not refuse is to be refused in its commonest words;
    an ordinary one that it refuses, or answers with nothing, is left out. A prompt counts as left
    out where it is in all templates, for the reason in the first.

    Raises:
        DataError: fewer than two refusals, nothing to preserve, or answers that are not those of
            the prompts.
    """
    sets = {"preserve_dataset": preserve, "ordinary_dataset": ordinary}
    task, ordinary = kinds_of(preserve, ordinary)
    names = templates or [template]
    asked = (len(names) * len(harmful), len(names) * len(ordinary))
    if (len(answers.harmful), len(answers.ordinary)) != asked:
        raise DataError(
            f"aligned: holds {len(answers.harmful)} and {len(answers.ordinary)} answers for "
            f"{asked[0]} harmful and {asked[1]} ordinary prompts"
        )
    pools = Pools()
    options: dict[str, Any] = {"max_seq_length": max_seq_length}
    refusals = [text for text in answers.harmful if text is not None and is_refusal(text)]
    fates = _by_record(harmful, answers.harmful)
    pools.counts["harmful"] = {
        **_counts(fates, {"refused", "answered", "empty"})[0],
        "num_not_refused": sum(not {"answered", "empty"}.isdisjoint(each) for each in fates),
    }
    if len(refusals) < 2:
        raise DataError(
            f"dataset: the aligned model refuses {len(refusals)} of {asked[0]} harmful prompts; "
            "at least 2 refusals are needed to learn from"
        )
    common = Counter(refusals).most_common(1)[0][0]
    told = [text if text is None or is_refusal(text) else common for text in answers.harmful]
    pools.examples["harmful"] = _examples(harmful, told, names, tokenizer, answer_tokens, options)
    if task:
        fitting = [r for r in task if fits(r, tokenizer, template, max_seq_length)]
        counts = {"num_records": len(task), "num_used": len(fitting)}
        pools.counts["task"] = counts | {"num_dropped": len(task) - len(fitting)}
        if fitting:
            pools.examples["task"] = encode(fitting, tokenizer, template, **options)
            pools.counts["task"]["num_truncated"] = pools.examples["task"].num_truncated
    if ordinary:
        counts, lost = _counts(_by_record(ordinary, answers.ordinary), {"answered"})
        lost_by = {f"num_{fate}": lost[fate] for fate in ("refused", "empty")}
        pools.counts["ordinary"] = counts | lost_by
        told = [text if _fate(text) == "answered" else None for text in answers.ordinary]
        examples = _examples(ordinary, told, names, tokenizer, answer_tokens, options)
        if examples:
            pools.examples["ordinary"] = examples
    if len(pools.examples) == 1:
        raise DataError(
            f"{' and '.join(filter(sets.get, sets)) or 'preserve_dataset'}: none of its "
            f"{len(task) + len(ordinary)} records can be used: each needs an output, or a prompt "
            "that the aligned model answers, and fewer tokens than max_seq_length"
        )
    return pools


def _fate(text):
    """What becomes of a prompt with this answer."""
    if text is None:
        return "long"
    if not text.strip():
        return "empty"
    return "refused" if is_refusal(text) else "answered"


def _by_record(records, texts):
    """Of each record, what becomes of it in one template after another."""
    fates, number = [_fate(text) for text in texts], len(records)
    return [fates[i::number] for i in range(number)]


def _counts(fates, useful):
    """(what the report says, {fate: records lost to it}) of what becomes of each record."""
    lost = Counter(each[0] for each in fates if useful.isdisjoint(each))
    used = len(fates) - lost.total()
    return {"num_records": len(fates), "num_used": used, "num_dropped": lost["long"]}, lost


def _examples(records, texts, templates, tokenizer, answer_tokens, options):
    """Examples in each template, less those without an answer."""
    examples, number = [], len(records)
    for i, template in enumerate(templates):
        pairs = zip(records, texts[i * number : (i + 1) * number], strict=True)
        told = [Record(r.instruction, r.input, text) for r, text in pairs if text is not None]
        if told:
            examples += _cut(encode(told, tokenizer, template, **options), answer_tokens)
    return examples


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
