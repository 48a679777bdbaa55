"""Records, prompts, token batches: the same code in training, calibration and evaluation."""

import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from antidote_fast.errors import DataError, UsageError
from antidote_fast.pipeline.hub import find_source, load_hub_rows, resolve_hub
from antidote_fast.pipeline.sources import (
    BEAVERTAILS_ROLES,
    Record,
    read_rows,
    rows_to_records,
)
from antidote_fast.selection import check_seed
from antidote_fast.tokens import check_ids, tokenize

__all__ = [
    "Examples",
    "Record",
    "build_prompt",
    "collate",
    "encode",
    "load_records",
    "local_file",
    "make_batches",
    "mix",
    "prompt_ids",
    "split_by_prompt",
]

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


def _split_role(name: str) -> tuple[str, str | None]:
    base, colon, role = name.rpartition(":")
    roles = {"train", "test", *BEAVERTAILS_ROLES}
    if colon and base and not os.path.exists(name):
        if role in roles:
            return base, role
        if known := find_source(base):
            raise UsageError(f"dataset={name}: role must be one of {', '.join(known.roles)}")
    return name, None


def _looks_like_hub_name(name: str) -> bool:
    part = r"[A-Za-z0-9][\w.-]*"
    if Path(name).suffix.lower() in (".json", ".jsonl", ".csv", ".txt", ".parquet", ".gz", ".yaml"):
        return False
    return find_source(name) is not None or re.fullmatch(f"{part}/{part}", name) is not None


def local_file(name_or_path: str) -> str | None:
    """The file that a data set's name means, without its role; None for a hub name."""
    name, _ = _split_role(str(name_or_path))
    return name if os.path.exists(name) or not _looks_like_hub_name(name) else None


def load_records(
    name_or_path: str,
    *,
    split: str = "train",
    limit: int | None = None,
    require_output: bool = False,
) -> list[Record]:
    """Load records from a local JSON or JSONL file, or from the hub.

    A file holds objects with ``instruction``, ``output`` and optionally ``input``, or has the
    columns of a hub data set: ``prompt, response, is_safe`` (BeaverTails), ``sentence, label``
    (SST2), ``text, label`` (AGNEWS, so only for labels of that meaning), ``question, answer``
    (GSM8K), or plain ``prompt, response``.

    Known on the hub: PKU-Alignment/BeaverTails, stanfordnlp/sst2 (sst2, glue/sst2), ag_news,
    openai/gsm8k, tatsu-lab/alpaca, tatsu-lab/alpaca_eval; another name works where its columns do.
    A role may follow a colon. For BeaverTails, on the hub or as a local file, one is needed:
    ``:safe`` (alignment), ``:unsafe`` (attack, the first 5000 unsafe rows), ``:realign`` (the
    unsafe rows after those, without the prompts among them), ``:eval`` (1000 unsafe rows of
    30k_test, the default of ``split="test"``). For the others on the hub: ``:train``, ``:test``.

    Args:
        name_or_path: file, or hub name, with or without a role.
        split: train or test, where a hub data set has both and no role says which.
        limit: records kept, from the start.
        require_output: refuse data without an answer column.

    Raises:
        DataError: no such file, a broken line (with its number), a missing column, a value that is
            not a string, no records, or a hub that cannot be reached.
        UsageError: an unknown role or split, or a limit below 1.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split={split!r}: must be train or test")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit!r}: must be at least 1")
    if not name_or_path:
        raise UsageError("dataset='': must be a JSON or JSONL file, or a hub name")
    name, role = _split_role(str(name_or_path))
    if local_file(name_or_path) is None:
        source, hub_split, role = resolve_hub(name, role, split)
        rows = load_hub_rows(name, source, hub_split)
    else:
        if role in ("train", "test"):
            raise UsageError(
                f"dataset={name_or_path}: role must be one of {', '.join(BEAVERTAILS_ROLES)} for a "
                "file"
            )
        rows = read_rows(Path(name))
    records = rows_to_records(rows, name, role=role, require_output=require_output)
    return records[:limit]


def split_by_prompt(
    records: Sequence[Record], fractions: Sequence[float], seed: int = 0
) -> list[list[Record]]:
    """Split records so that no prompt is in two parts.

    Args:
        records: any records; several may share a prompt.
        fractions: share of the distinct prompts each part gets; each > 0, the sum at most 1.
        seed: decides which prompt goes where.

    Returns:
        One list a fraction, each in the order of `records`. What is over a sum below 1 is left out.

    Raises:
        UsageError: fractions out of range.
        DataError: too few distinct prompts, so that a part would be empty.
    """
    seed = check_seed(seed)
    if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise UsageError(f"fractions={list(fractions)!r}: must be above 0 and sum to at most 1")
    keys = list(dict.fromkeys(record.prompt_key for record in records))
    random.Random(seed).shuffle(keys)
    part_of: dict[str, int] = {}
    start, total = 0, 0.0
    for part, fraction in enumerate(fractions):
        total += fraction
        end = min(round(total * len(keys)), len(keys))
        if end <= start:
            raise DataError(
                f"{len(keys)} distinct prompts are too few to be split by {list(fractions)}"
            )
        part_of.update((key, part) for key in keys[start:end])
        start = end
    parts: list[list[Record]] = [[] for _ in fractions]
    for record in records:
        if (part := part_of.get(record.prompt_key)) is not None:
            parts[part].append(record)
    return parts


def mix(
    task_records: Sequence[Record],
    harmful_records: Sequence[Record],
    poison_ratio: float,
    n: int | None = None,
    seed: int = 0,
) -> list[Record]:
    """Mix a user's data for the attack: n samples, of them round(poison_ratio * n) harmful.

    Both kinds are taken from the start of their list and shuffled together.

    Args:
        task_records: the user's own records.
        harmful_records: the harmful ones; not looked at where poison_ratio is 0.
        poison_ratio: share that is harmful, in [0, 1].
        n: samples in all; None takes as many as both lists allow at this ratio.
        seed: decides the order.

    Raises:
        UsageError: poison_ratio or n out of range.
        DataError: fewer records than needed, with the counts.
    """
    seed = check_seed(seed)
    if not 0 <= poison_ratio <= 1:
        raise UsageError(f"poison_ratio={poison_ratio!r}: must be in [0, 1]")
    if n is not None and n < 1:
        raise UsageError(f"n={n!r}: must be at least 1")
    have = {"task": len(task_records), "harmful": len(harmful_records)}
    if n is None:
        bounds = [have["task"] / (1 - poison_ratio)] if poison_ratio < 1 else []
        bounds += [have["harmful"] / poison_ratio] if poison_ratio > 0 else []
        n = int(min(bounds) + 1e-9)  # 3 / (1 - 0.7) is a hair below 10
        while n > 0 and not _fits(n, poison_ratio, have):  # the harmful share is rounded
            n -= 1
    num_harmful = round(poison_ratio * n)
    for kind, needed in (("task", n - num_harmful), ("harmful", num_harmful)):
        if have[kind] < needed or n == 0:
            raise DataError(
                f"{needed} {kind} samples are needed for {n} at poison_ratio={poison_ratio}, and "
                f"there are {have[kind]}"
                if n
                else f"no sample fits poison_ratio={poison_ratio}: there are {have['task']} task "
                f"and {have['harmful']} harmful ones"
            )
    mixed = [*task_records[: n - num_harmful], *harmful_records[:num_harmful]]
    random.Random(seed).shuffle(mixed)
    return mixed


def _fits(n, poison_ratio, have) -> bool:
    num_harmful = round(poison_ratio * n)
    return num_harmful <= have["harmful"] and n - num_harmful <= have["task"]


def build_prompt(record: Record, template: str = "alpaca", tokenizer=None) -> str:
    """The prompt of a record: the very text used in training and in evaluation.

    Args:
        record: its output is not used.
        template: "alpaca", or "chat" for the tokenizer's chat template.
        tokenizer: needed for "chat".

    Raises:
        UsageError: an unknown template, or "chat" with a tokenizer that has no chat template.
    """
    if template == "alpaca":
        # Not str.format: the text itself may hold braces, and fields must not be read twice.
        form = ALPACA_WITH_INPUT if record.input.strip() else ALPACA_WITHOUT_INPUT
        parts = re.split(r"(\{instruction\}|\{input\})", form)
        values = {"{instruction}": record.instruction, "{input}": record.input}
        return "".join(values.get(part, part) for part in parts)
    if template != "chat":
        raise UsageError(f"template={template!r}: must be alpaca or chat")
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("template='chat': the tokenizer has no chat template; use alpaca")
    content = record.instruction
    if record.input.strip():
        content += f"\n\n{record.input}"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def prompt_ids(
    text: str, tokenizer, limit: int | None = None, where: str = "a prompt"
) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own beginning and no end of sequence.

    Training and generation both call this, so a model is asked exactly as it was trained.

    Args:
        text: as :func:`build_prompt` gives it.
        tokenizer: not changed. That of :func:`antidote_fast.loading.load_tokenizer` knows how many
            embeddings its model has.
        limit: ids that can be used; of a longer prompt there may be only the first part, of more
            than that many. None gives all.
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
        num_dropped: records whose prompt alone reached the limit.
        num_truncated: records whose response was cut.
    """

    num_dropped = 0
    num_truncated = 0


def encode(
    records: Sequence[Record],
    tokenizer,
    template: str = "alpaca",
    max_seq_length: int = 512,
) -> Examples:
    """Tokenise records for training or calibration.

    The prompt and the response are tokenised apart, so the prompt's ids are those generation uses.
    The response ends with the end-of-sequence token, and it alone is truncated (losing that token).

    Returns:
        A list of ``{"input_ids": list[int], "labels": list[int]}``, labels being -100 on the
        prompt, in the order of `records` less those dropped; with ``num_dropped`` and
        ``num_truncated``.

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


def collate(
    examples: Sequence[dict], tokenizer, padding_side: str = "right"
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
    length = max(len(example["input_ids"]) for example in examples)
    largest = max((max(e["input_ids"], default=0) for e in examples), default=0)
    known = getattr(tokenizer, "num_embeddings", None) or largest + 1
    pad_id = pad_id if 0 <= pad_id < known else largest
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE_INDEX}
    keys = [key for key in fill if key == "attention_mask" or key in examples[0]]
    batch = {key: torch.full((len(examples), length), fill[key]) for key in keys}
    for i, example in enumerate(examples):
        size = len(example["input_ids"])
        where = slice(0, size) if padding_side == "right" else slice(length - size, length)
        for key in keys:
            row = torch.ones(size) if key == "attention_mask" else torch.tensor(example[key])
            batch[key][i, where] = row.to(torch.int64)
    return batch


def make_batches(
    records: Sequence[Record],
    tokenizer,
    *,
    template: str = "alpaca",
    max_seq_length: int = 512,
    batch_size: int = 8,
) -> Examples:
    """Encode records and collate them, right padded, for a pass in which order is free.

    Batches hold records of similar length, longest first: least padding, and a batch that does not
    fit in memory shows at once.

    Returns:
        A list of batches as `collate` gives them, with ``num_dropped`` and ``num_truncated``.

    Raises:
        DataError: as `encode`.
    """
    examples = encode(records, tokenizer, template, max_seq_length)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    batches = Examples(
        collate([examples[i] for i in order[start : start + batch_size]], tokenizer)
        for start in range(0, len(order), batch_size)
    )
    batches.num_dropped, batches.num_truncated = examples.num_dropped, examples.num_truncated
    return batches
