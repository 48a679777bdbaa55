"""Regular expressions out of other people's files: matched in a process that can be stopped.

Python's ``re`` backtracks, so a pattern of 20 characters can run for years, and meanwhile neither
another thread nor a signal gets a turn. An adapter's config holds patterns that PEFT matches with
every module of the base. They are matched here first, by the same ``re`` with the same names, in a
child that the kernel ends once it has had :data:`SECONDS` of processor time.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable

from antidote_fast.errors import DataError

SECONDS = 2.0  # for all names of one field; people's own patterns take a few milliseconds
MAX_LENGTH = 1024
_BYTES = 1 << 30
_FEW = 1 << 16  # matches of plain names that are done here: some 50 ms
_PLAIN = re.compile(r"[\w.-]+")  # names; the only thing in them that means more is the dot
# As PEFT puts a field's pattern into one of its own.
_FORMS = {
    "whole": ("fullmatch", ("{}",)),
    "end": ("match", (r"(.*\.)?({})$",)),
    "layers": ("match", (r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r".*\.{}\.(\d+)\.")),
}
_CHILD = """
import json, re, sys
job = json.load(sys.stdin)
try:
    import resource, signal
    resource.setrlimit(resource.RLIMIT_AS, (job["bytes"], job["bytes"]))
    signal.setitimer(signal.ITIMER_PROF, job["seconds"])
except (ImportError, AttributeError, OSError, ValueError):
    pass
results = []
for form in job["forms"]:
    first = [None] * len(job["names"])
    for number, pattern in enumerate(job["patterns"]):
        print(number, flush=True)
        try:
            match = getattr(re.compile(form.replace("{}", pattern)), job["how"])
        except (re.error, OverflowError, RecursionError, ValueError):
            sys.exit(3)
        for place, name in enumerate(job["names"]):
            if first[place] is None and match(name):
                first[place] = number
    results.append(first)
print(json.dumps(results[0]))
"""


def check_pattern(pattern: str, field: str, where: str) -> None:
    """Refuse what is no text, too long or not printable, naming the field; none is compiled."""
    if not isinstance(pattern, str) or not pattern:
        raise DataError(f"{where}: {field}: {shown(pattern)} is not a pattern")
    if len(pattern) > MAX_LENGTH or not pattern.isprintable():
        why = f"is longer than {MAX_LENGTH} characters or not printable"
        raise DataError(f"{where}: {field}: {shown(pattern)} {why}")


def is_plain(pattern: str) -> bool:
    """Whether a pattern is a name: letters, digits, ``_``, ``-`` and dots."""
    return _PLAIN.fullmatch(pattern) is not None


def first_matches(
    patterns: Iterable[str], names: Iterable[str], form: str, field: str, where: str
) -> dict[str, str]:
    """Which pattern each name is matched by, the first one where there are several.

    Args:
        patterns, names: regular expressions out of a file, and names of modules.
        form: how PEFT matches the field: ``"whole"`` (``re.fullmatch``), ``"end"`` (a name's last
            parts, as rank_pattern) or ``"layers"`` (what stands before a layer's number).
        field, where: what a message calls the field, and the file.

    Returns:
        {name: pattern}, without names that no pattern matches.

    Raises:
        DataError: a pattern that ``re`` does not take, or whose matching takes over
            :data:`SECONDS` of processor time or 1 GiB.
    """
    patterns, names = tuple(patterns), tuple(names)
    for pattern in patterns:
        check_pattern(pattern, field, where)
    if not patterns or not names:
        return {}
    if len(patterns) * len(names) <= _FEW and all(map(is_plain, patterns)):
        how, (regex, *_) = _FORMS[form]
        matches = [getattr(re.compile(regex.replace("{}", p)), how) for p in patterns]
        first = [next((i for i, m in enumerate(matches) if m(name)), None) for name in names]
    else:
        first, guilty = _match_apart(patterns, names, form, SECONDS)
        if guilty is not None:
            number, why = guilty
            raise DataError(f"{where}: {field}: {shown(patterns[number])} {why}")
    pairs = zip(names, first, strict=True)
    return {name: patterns[number] for name, number in pairs if number is not None}


@functools.lru_cache(maxsize=32)
def _match_apart(patterns, names, form, seconds):
    """(indices of patterns or None, None), or (None, (index of a bad pattern, why))."""
    how, forms = _FORMS[form]
    job = {"patterns": patterns, "names": names, "how": how, "forms": forms}
    job |= {"seconds": seconds, "bytes": _BYTES}
    try:
        # Its own clock ends it; this one is for systems without, or a process that is starved.
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps(job),
            timeout=10 + 10 * seconds,
            start_new_session=True,  # Ctrl-C is for us
            capture_output=True,
            text=True,
        )
        status, lines = child.returncode, child.stdout.splitlines()
    except OSError as error:
        raise DataError(f"a process for an adapter's patterns: {error.strerror}") from None
    except subprocess.TimeoutExpired as late:
        status, lines = None, (late.stdout or b"").splitlines()
    if status == 0:
        return json.loads(lines[-1]), None
    why = f"takes over {seconds:g} s, or {_BYTES >> 30} GiB, to match with {len(names)} modules"
    return None, (int(lines[-1]) if lines else 0, "is not a pattern" if status == 3 else why)


def shown(value: object) -> str:
    """What a refusal shows of a value out of a file: 80 characters of ASCII."""
    return ascii(value)[:80]
