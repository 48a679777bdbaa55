"""Records from a file, a known prompt set or the hub, split and mixed."""

import os
import random
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from antidote_fast.data.hub import find_source, load_hub_rows, resolve_hub
from antidote_fast.data.prompt_sets import PROMPT_SETS, find_prompt_set, load_prompt_set
from antidote_fast.data.records import BEAVERTAILS_ROLES, Record, read_rows, rows_to_records
from antidote_fast.errors import DataError, UsageError
from antidote_fast.selection import check_seed

_FILES = (".json", ".jsonl", ".csv", ".txt", ".parquet", ".gz", ".yaml")  # no name on the hub


def _split_role(name: str) -> tuple[str, str | None]:
    base, colon, role = name.rpartition(":")
    roles = {"train", "test", *BEAVERTAILS_ROLES}
    if colon and base and not os.path.exists(name):
        if find_prompt_set(base) and not os.path.exists(base):
            raise UsageError(f"dataset={name}: a prompt set has no role; say {base}")
        if role in roles:
            return base, role
        if known := find_source(base):
            raise UsageError(f"dataset={name}: role must be one of {', '.join(known.roles)}")
    return name, None


def local_file(name_or_path: str) -> str | None:
    """The file that a name means, without its role; None for a prompt set and a hub name."""
    name, _ = _split_role(str(name_or_path))
    if os.path.exists(name) or Path(name).suffix.lower() in _FILES:
        return name
    part = r"[A-Za-z0-9][\w.-]*"
    known = find_prompt_set(name) or find_source(name)
    return None if known or re.fullmatch(f"{part}/{part}", name) else name


def load_records(
    name_or_path: str,
    *,
    split: str = "train",
    limit: int | None = None,
    require_output: bool = False,
) -> list[Record]:
    """Load records from a local JSON or JSONL file, a known prompt set, or the hub.

    A file holds objects with ``instruction``, ``output`` and optionally ``input``, or has the
    columns of a hub data set: ``prompt, response, is_safe`` (BeaverTails), ``sentence, label``
    (SST2), ``text, label`` (AGNEWS, so only for labels of that meaning), ``question, answer``
    (GSM8K). The prompt may also be in ``prompt``, ``question`` or ``query``, its context in
    ``context`` in place of ``input``, the answer in ``response``, ``completion`` or ``answer``. A
    chat of one exchange may be in ``messages`` or ``conversations``; there a system message becomes
    the instruction and the user's its input. An answer in any other column is refused.

    A role may follow a colon. For BeaverTails, on the hub or as a local file, one is needed:
    ``:safe`` (alignment), ``:unsafe`` (attack, the first 5000 unsafe rows), ``:realign`` (the
    unsafe rows after those, without the prompts among them), ``:eval`` (1000 unsafe rows of
    30k_test, the default of ``split="test"``). For the others on the hub: ``:train``, ``:test``.
    A prompt set (:data:`.prompt_sets.PROMPT_SETS`) has neither roles, nor splits, nor answers. What
    lies under a name on the disk comes before what is known by it.

    Args:
        name_or_path: file, prompt set, or hub name (of :data:`.hub.HUB_SOURCES`, or any whose
            columns do), with or without a role.
        split: train or test, where a hub data set has both and no role says which.
        limit: records kept, from the start.
        require_output: refuse data without an answer column.

    Raises:
        DataError: no such file, a broken line (with its number), a missing column, a value that is
            not a string, no records, a hub that cannot be reached, or a prompt set that cannot be
            read or has no answers where some are required.
        UsageError: an unknown role or split, or a limit below 1.
    """
    if split not in ("train", "test"):
        raise UsageError(f"split={split!r}: must be train or test")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit!r}: must be at least 1")
    if not name_or_path:
        raise UsageError("dataset='': must be a JSON or JSONL file, or a hub name")
    name, role = _split_role(str(name_or_path))
    if local_file(name_or_path) is None and find_prompt_set(name):
        records = load_prompt_set(name)
        if require_output:
            raise DataError(f"{name}: is a set of prompts without answers, which are needed here")
        return records[:limit]
    if local_file(name_or_path) is None:
        source, hub_split, role = resolve_hub(name, role, split)
        rows = load_hub_rows(name, source, hub_split)
    else:
        if role in ("train", "test"):
            roles = ", ".join(BEAVERTAILS_ROLES)
            raise UsageError(f"dataset={name_or_path}: role must be one of {roles} for a file")
        if find_prompt_set(name) and os.path.isdir(name):
            raise DataError(f"{name}: is a directory, which hides the prompt set; rename it")
        if re.fullmatch(r"[\w-]{1,40}", name) and not os.path.exists(name):
            known = ", ".join(PROMPT_SETS)
            raise DataError(f"{name}: no such file, and none of the prompt sets {known}")
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
    ends = [min(round(total * len(keys)), len(keys)) for total in accumulate(fractions)]
    part_of: dict[str, int] = {}
    for part, (start, end) in enumerate(pairwise([0, *ends])):
        if end <= start:
            few = f"{len(keys)} distinct prompts are too few"
            raise DataError(f"{few} to be split by {list(fractions)}")
        part_of |= dict.fromkeys(keys[start:end], part)
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

    def needs(size):
        num_harmful = round(poison_ratio * size)
        return {"task": size - num_harmful, "harmful": num_harmful}

    if n is None:
        shares = {"task": 1 - poison_ratio, "harmful": poison_ratio}
        most = min(have[kind] / share for kind, share in shares.items() if share > 0)
        sizes = range(int(most + 1e-9), 0, -1)  # 3 / (1 - 0.7) is a hair below 10
        # The harmful share is rounded, so the first may be one too many.
        n = next((i for i in sizes if all(needs(i)[kind] <= have[kind] for kind in have)), 0)
    if n == 0:
        there = f"there are {have['task']} task and {have['harmful']} harmful ones"
        raise DataError(f"no sample fits poison_ratio={poison_ratio}: {there}")
    for kind, needed in needs(n).items():
        if have[kind] < needed:
            what = f"{needed} {kind} samples are needed for {n} at poison_ratio={poison_ratio}"
            raise DataError(f"{what}, and there are {have[kind]}")
    needed = needs(n)
    mixed = [*task_records[: needed["task"]], *harmful_records[: needed["harmful"]]]
    random.Random(seed).shuffle(mixed)
    return mixed
