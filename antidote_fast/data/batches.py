"""Records, prompts, token batches: the same code in training, calibration and evaluation."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.models.kinds import Tokenizer
from antidote_fast.models.tokens import check_ids, fitted, tokenize, vocab_size

IGNORE_INDEX = -100

# The templates of Stanford Alpaca, whose "### Response:" is followed by a line break here in
# training and in evaluation alike (the official code has it in evaluation only).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def filled(form: str, **values: str) -> str:
    """A form with each ``{name}`` of ``values`` replaced by its text, which may hold braces."""
    return re.sub(r"\{(\w+)\}", lambda name: values.get(name[1], name[0]), form)


def build_prompt(
    record: Record,
    template: str = "alpaca",
    tokenizer: Tokenizer | None = None,
    *,
    system: str = "",
    prefill: str = "",
) -> str:
    """The prompt of a record: the very text used in training and in evaluation.

    Args:
        record: its output is not used.
        template: "alpaca", or "chat" for the tokenizer's chat template.
        tokenizer: needed for "chat".
        system: a system prompt. "alpaca" has it first, followed by a blank line. "chat" has it as
            the system message; where the template refuses one, or leaves it out, it begins the
            user's message, followed by a blank line.
        prefill: a beginning of the answer that the model goes on from. It ends the prompt as it
            is, as if the model had written it: in a template whose generation prompt opens the
            reasoning it is reasoning.

    Raises:
        UsageError: an unknown template, or "chat" with a tokenizer that has no chat template.
    """
    if template == "alpaca":
        form = ALPACA_WITH_INPUT if record.input.strip() else ALPACA_WITHOUT_INPUT
        prompt = filled(form, instruction=record.instruction, input=record.input)
        return (f"{system}\n\n{prompt}" if system else prompt) + prefill
    if template != "chat":
        raise UsageError(f"template={template!r}: must be alpaca or chat")
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("template='chat': the tokenizer has no chat template; use alpaca")
    content = record.instruction
    if record.input.strip():
        content += f"\n\n{record.input}"
    # Not `continue_final_message`, which needs a template that leaves an assistant's message as it
    # is: those of reasoning models take parts of it out, and begin it otherwise than a new answer.
    return _chat(content, system, tokenizer) + prefill


def _chat(content: str, system: str, tokenizer: Any) -> str:
    """A chat template's prompt of one message; see `build_prompt` for the system prompt."""
    from jinja2 import TemplateError

    def rendered(*messages: tuple[str, str]) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    alone = rendered(("user", content))
    if not system:
        return alone
    try:
        prompt = rendered(("system", system), ("user", content))
    except TemplateError:  # what `raise_exception` of a template raises
        prompt = ""
    if prompt.count(system.strip()) > alone.count(system.strip()):
        return prompt
    return rendered(("user", f"{system}\n\n{content}"))


def prompt_ids(
    text: str, tokenizer: Tokenizer, limit: int | None = None, where: str = "a prompt"
) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own beginning and no end of sequence.

    Training and generation both call this, so a model is asked exactly as it was trained.

    Args:
        text: as :func:`build_prompt` gives it.
        tokenizer: that of :func:`antidote_fast.models.loading.load_tokenizer` knows how many
            embeddings its model has.
        limit: as :func:`antidote_fast.models.tokens.tokenize` takes it.
        where: what a refusal calls the prompt.

    Raises:
        DataError: a token id that the model has no embedding for.
    """
    bos = tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    ids = tokenize(text, tokenizer, limit, add_special_tokens=special)
    if limit is None or len(ids) <= limit:  # of a longer one nothing is used
        check_ids(ids, getattr(tokenizer, "num_embeddings", None), where)
    eos = tokenizer.eos_token_id
    # Some tokenizers are set to append the end token; a prompt has not ended.
    if ids and eos is not None and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


class Examples(list):
    """A list that also says what was left out of it.

    Attributes:
        num_records: records that it is of, those dropped among them.
        num_dropped: records whose prompt alone reached the limit.
        num_truncated: records whose response was cut.
        num_over_limit: records of their data set behind those; None where nobody counted.
    """

    num_records = num_dropped = num_truncated = 0
    num_over_limit: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        """What a report says of the records."""
        names = ("num_records", "num_dropped", "num_truncated")
        counts = {name: getattr(self, name) for name in names}
        over = {} if self.num_over_limit is None else {"num_over_limit": self.num_over_limit}
        return counts | over


def encode(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: str = "alpaca",
    max_seq_length: int = 512,
) -> Examples:
    """Tokenise records for training or calibration.

    The prompt and the response are tokenised apart, so the prompt's ids are those generation uses.
    The response ends with the end-of-sequence token, and it alone is truncated (losing that token).

    Returns:
        ``{"input_ids": list[int], "labels": list[int]}`` each, labels being -100 on the prompt, in
        the order of `records` less those dropped.

    Raises:
        DataError: no records, all prompts too long, all outputs empty, no end-of-sequence token, or
            a token id that the model has no embedding for, where the tokenizer knows.
    """
    if not records:
        raise DataError("no records to encode")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no response could end")
    if not any(record.output for record in records):
        raise DataError(f"all {len(records)} records have an empty output; a response is needed")
    examples = Examples()
    examples.num_records = len(records)
    examples.num_over_limit = getattr(records, "num_over_limit", None)
    for number, record in enumerate(records, 1):
        where = record.where or f"record {number}"
        text = build_prompt(record, template, tokenizer)
        prompt = prompt_ids(text, tokenizer, max_seq_length, where)
        room = max_seq_length - len(prompt)
        if room < 1:
            examples.num_dropped += 1
            continue
        response = tokenize(record.output, tokenizer, room, add_special_tokens=False)
        response.append(tokenizer.eos_token_id)
        examples.num_truncated += len(response) > room
        response = response[:room]
        check_ids(response, getattr(tokenizer, "num_embeddings", None), where)
        examples.append(
            {"input_ids": prompt + response, "labels": [IGNORE_INDEX] * len(prompt) + response}
        )
    if not examples:
        raise DataError(
            f"all {len(records)} prompts have {max_seq_length} tokens or more: raise max_seq_length"
        )
    return examples


def encode_in(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    templates: Sequence[str],
    max_seq_length: int = 512,
) -> Examples:
    """The examples of `encode` in each of these templates, one template after the other.

    Raises:
        DataError: as `encode`.
    """
    examples = Examples()
    for template in templates:
        some = encode(records, tokenizer, template, max_seq_length)
        examples.extend(some)
        for name, count in some.counts.items():
            setattr(examples, name, getattr(examples, name) + count)
    return examples


def collate(
    examples: Sequence[dict], tokenizer: Tokenizer, padding_side: str = "right"
) -> dict[str, torch.Tensor]:
    """Pad examples into one batch; the tokenizer is read, never changed.

    Args:
        examples: dicts with ``input_ids`` and, optionally, ``labels``.
        tokenizer: gives the pad token: its own, else the end token, else 0. Where the model has no
            embedding for that one, the largest id of the batch stands in: the mask hides which.
        padding_side: right in training, left in generation.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the examples have them, ``labels``: each int64
        (batch, longest). The mask comes from the lengths, so it is right also where the pad token
        is the end token; labels are -100 on pads.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    largest = max(max(e["input_ids"], default=0) for e in examples)
    known = getattr(tokenizer, "num_embeddings", None) or largest + 1
    pad_id = pad_id if 0 <= pad_id < known else largest
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE_INDEX}
    batch = {}
    for key in fill if "labels" in examples[0] else ("input_ids", "attention_mask"):
        ones = key == "attention_mask"
        rows = [[1] * len(e["input_ids"]) if ones else e[key] for e in examples]
        rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
        batch[key] = pad_sequence(
            rows, batch_first=True, padding_value=fill[key], padding_side=padding_side
        )
    return batch


def make_batches(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    template: str = "alpaca",
    max_seq_length: int = 512,
    batch_size: int = 8,
) -> Examples:
    """Encode records and collate them, right padded, for a pass in which order is free.

    Batches hold records of similar length, longest first: least padding, and a batch that does not
    fit in memory shows at once.

    Returns:
        Batches as :func:`collate` gives them.

    Raises:
        DataError: as :func:`encode`.
    """
    examples = encode(records, tokenizer, template, max_seq_length)
    ordered = sorted(examples, key=lambda example: -len(example["input_ids"]))
    starts = range(0, len(ordered), batch_size)
    batches = Examples(collate(ordered[i : i + batch_size], tokenizer) for i in starts)
    vars(batches).update(examples.counts)
    return batches


def batches_of(
    config: Any, records: Sequence[Record], tokenizer: Tokenizer, model_config: dict[str, Any]
) -> Examples:
    """Batches for a forward of a model of this config.

    Refused where it has too few positions, or no embedding for a token.
    """
    names = ("template", "max_seq_length", "batch_size")
    batches = make_batches(records, tokenizer, **{name: getattr(config, name) for name in names})
    known = vocab_size(model_config)
    batches[:] = [fitted(batch, known, f"batch {i}") for i, batch in enumerate(batches, 1)]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    positions = model_config.get("max_position_embeddings", model_config.get("n_positions"))
    if isinstance(positions, int) and longest > positions:
        most = f"at most {positions}, the positions that the model has, for these data"
        raise UsageError(f"max_seq_length={config.max_seq_length}: must be {most}")
    return batches
