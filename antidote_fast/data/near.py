"""Prompts that are near to others are left out, so that what is held out stays held out."""

from collections.abc import Sequence

from antidote_fast.data.records import Record


def without_near(records: Sequence[Record], others: Sequence[Record]) -> tuple[list[Record], int]:
    """(the records whose prompt is none of the others', how many were left out)."""
    seen = {record.prompt_key for record in others}
    kept = [record for record in records if record.prompt_key not in seen]
    return kept, len(records) - len(kept)
