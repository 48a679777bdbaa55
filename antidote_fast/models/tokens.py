"""Texts to token ids: those a model has embeddings for, and of a long text only what is used."""

from collections.abc import Mapping, Sequence
from typing import Any

from antidote_fast.errors import DataError
from antidote_fast.models.kinds import Model, Tokenizer

# Characters that are read at first for each token wanted: text has 4 to 5, code 3, digits 1 to 3.
_CHARACTERS = 32
# Tokens beyond those wanted: what a cut may have changed lies within the last few.
_MARGIN = 128
_MAX_UNBROKEN = 1 << 16
# Read of a text whatever it gives: a word of millions of letters may be one unknown token.
_MAX_READ = 1 << 20


def tokenize(
    text: str, tokenizer: Tokenizer, limit: int | None = None, **options: Any
) -> list[int]:
    """Token ids of a text; of a long one its first part's, ``limit`` and many more.

    The first ``limit`` ids are those of the whole text, and there are more than ``limit`` only
    where the whole text has more; None reads all of it. A long text is cut in front of white space,
    which no tokenizer's rules reach across but by the margin that is left; one without any for tens
    of thousands of characters is cut there, where a tokenizer that groups digits from the right may
    group others. Of one that has fewer tokens than that in its first million characters (more for a
    large ``limit``), such as blanks or one word, the rest is not read.
    """
    size = len(text)
    if limit is not None:
        size = _CHARACTERS * (max(limit, 0) + _MARGIN)
        text = text[: max(_MAX_READ, 4 * size)]
    while size < len(text):
        head = text[:size]
        before, *after = head.rsplit(None, 1) or [""]
        if not after or len(before) < size // 2:
            before = head if size >= _MAX_UNBROKEN else ""
        if before:
            ids = list(tokenizer(before, **options)["input_ids"])
            if len(ids) >= limit + _MARGIN:
                return ids
        size *= 4
    return list(tokenizer(text, **options)["input_ids"])


def num_embeddings(model: Model) -> int | None:
    """How many token ids a live model has embeddings for; None where it does not tell."""
    try:
        table = model.get_input_embeddings()
        size = getattr(table, "num_embeddings", None)  # whole also where weights are sharded
        return int(table.weight.shape[0] if size is None else size)
    except (AttributeError, IndexError, NotImplementedError, TypeError):
        return None


def vocab_size(config: dict) -> int | None:
    """How many token ids a model of this config has embeddings for; None where it does not tell."""
    inner = config.get("text_config")
    sizes = [c.get("vocab_size") for c in (inner, config) if isinstance(c, dict)]
    return next((size for size in sizes if type(size) is int), None)


def check_ids(ids: Sequence[int], known: int | None, where: str) -> None:
    """Refuse a text's token ids that a model of ``known`` embeddings (None: of any) has none for.

    Raises:
        DataError: saying ``where`` the text is, the first such id and the number of embeddings.
    """
    if known is None or not ids or 0 <= min(ids) <= max(ids) < known:
        return
    first = next(i for i in ids if not 0 <= i < known)
    raise DataError(
        f"{where}: has token id {first}, and the model has {known} embeddings; a token was added "
        "to the tokenizer alone: give the model its own tokenizer, or resize its embeddings"
    )


def check_examples(model: Model, *sets: Sequence[Mapping[str, Any]]) -> None:
    """:func:`check_ids` of examples, dicts with ``input_ids``, for a live model."""
    known = num_embeddings(model)
    for examples in sets:
        for number, example in enumerate(examples, 1):
            check_ids(example["input_ids"], known, f"example {number}")


def fitted(batch: dict, known: int | None, where: str) -> dict:
    """:func:`check_ids` of a batch's tokens; its pads, which the mask hides, are made valid.

    The batch holds ``input_ids`` (B, T) and perhaps ``attention_mask`` (B, T), 0 on pads; returned
    is it, or one like it with other pads.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if known is None or ids.is_meta or not ids.numel():
        return batch
    low, high = map(int, ids.aminmax())
    if 0 <= low <= high < known:
        return batch
    counted = ids if mask is None or mask.shape != ids.shape else ids[mask != 0]
    check_ids(counted.flatten().tolist(), known, where)
    return {**batch, "input_ids": ids.masked_fill(mask == 0, 0)}
