"""Prompts that are nearly the same, and splits that keep them together.

Sets of prompts copy from each other and vary their own: a prompt that a model was repaired on, with
one word changed, is no held-out prompt. Two prompts are near where of the character 5-grams that
either has at least 55 % are in both (Jaccard similarity), letters folded and punctuation left out.
That is the lowest bound, in steps of 5, at which a chain of near prompts stays short on the known
sets (nine prompts; at 50 % it is fifty, alike in nothing but their form).
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from antidote_fast.data.load import split_by_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.system.progress import Progress, track

NEAR_PERCENT = 55
_LENGTH = 5

_Gram = tuple[str, str]


def near_groups(records: Sequence[Record], *, progress: Progress = False) -> list[int]:
    """The number of each record's group; near prompts are in one group, and what is near to those.

    Where records have an input, they are near if their instruction is the same and their inputs are
    near: the records of a task share an instruction, and are no copies of each other.

    Args:
        records: 2,000 prompts take a second, 20,000 half a minute.
        progress: as :mod:`antidote_fast.system.progress` says.

    Returns:
        One number a record, counted from 0 in the order in which groups first appear.
    """
    first = list(range(len(records)))  # a record of the same group that comes earlier, or itself

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for i, j in _near_pairs([_grams(record) for record in records], progress):
        i, j = root(i), root(j)
        first[max(i, j)] = min(i, j)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(records))]


def without_near(
    records: Sequence[Record], others: Sequence[Record], *, progress: Progress = False
) -> tuple[list[Record], int]:
    """The records that are near to none of ``others``, in their order, and how many were dropped.

    Records that are near to each other stay.
    """
    grams = [_grams(record) for record in (*others, *records)]
    pairs = _near_pairs(grams, progress)
    dropped = {j - len(others) for i, j in pairs if i < len(others) <= j}
    return [record for i, record in enumerate(records) if i not in dropped], len(dropped)


def split_sets(
    sets: Mapping[str, Sequence[Record]],
    fractions: Mapping[str, float],
    seed: int = 0,
    *,
    progress: Progress = False,
) -> dict[str, dict[str, list[Record]]]:
    """Split several sets at once; of prompts that are near, one is in one part and no other in any.

    The first of a group is kept, in the order of the sets, and each set is split by itself. So a
    set that is added at the end leaves the parts of those before it as they were.

    Args:
        sets: {name: records}.
        fractions: {part: its share of each set}; each > 0, the sum at most 1.
        seed: decides which prompt goes where.
        progress: as :mod:`antidote_fast.system.progress` says.

    Returns:
        {part: {set: records}}, in the order of ``fractions``, of ``sets`` and of their records.
        What is over a sum below 1 is left out.

    Raises:
        UsageError: fractions out of range.
        DataError: too few prompts left in a set, so that a part of it would be empty.
    """
    everything = [record for records in sets.values() for record in records]
    groups = iter(near_groups(everything, progress=progress))
    taken: set[int] = set()
    parts: dict[str, dict[str, list[Record]]] = {part: {} for part in fractions}
    for name, records in sets.items():
        kept = []
        for record, group in zip(records, groups, strict=False):
            if group not in taken:
                taken.add(group)
                kept.append(record)
        try:
            split = split_by_prompt(kept, list(fractions.values()), seed)
        except DataError as error:
            raise DataError(f"{name}: of {len(records)} records {error}") from None
        for part, share in zip(fractions, split, strict=True):
            parts[part][name] = share
    return parts


def _folded(text: str) -> str:
    """Its words alone, in one spelling; the text as it is where there are none."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", text) or text.split())


def _grams(record: Record) -> set[_Gram]:
    shared = _folded(record.instruction) if record.input.strip() else ""
    text = f" {_folded(record.input if shared else record.instruction)} "
    return {(shared, text[i : i + _LENGTH]) for i in range(max(1, len(text) - _LENGTH + 1))}


def _near_pairs(texts: Sequence[set[_Gram]], progress: Progress) -> Iterator[tuple[int, int]]:
    """Each (i, j) with i < j whose sets of grams are near.

    Near sets share one of their rarest members: of n, all but the ceil(0.55 n) - 1 most frequent
    ones are looked up, and few sets have those (prefix filtering, Bayardo et al. 2007).
    """
    frequency = Counter(gram for grams in texts for gram in grams)
    ordered = sorted(frequency, key=lambda gram: (frequency[gram], gram))
    rank = {gram: i for i, gram in enumerate(ordered)}
    sets = [{rank[gram] for gram in grams} for grams in texts]
    holders: dict[int, list[int]] = defaultdict(list)
    for j, ranks in enumerate(track(sets, "compare prompts", progress)):
        # In whole numbers: 0.55 * 100 is a hair above 55.
        needed = -(-NEAR_PERCENT * len(ranks) // 100)
        met: set[int] = set()
        for each in sorted(ranks)[: len(ranks) - needed + 1]:
            met.update(holders[each])
            holders[each].append(j)
        for i in sorted(met):
            shared = len(ranks & sets[i])
            if 100 * shared >= NEAR_PERCENT * (len(ranks) + len(sets[i]) - shared):
                yield i, j
