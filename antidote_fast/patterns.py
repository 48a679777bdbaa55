"""Regular expressions out of other people's files: bounded before ``re`` or PEFT runs them.

Python's ``re`` backtracks, so a pattern of 20 characters can run for years. An adapter's config
holds patterns (``rank_pattern`` and others) that PEFT matches with every module of the base. Only
those are taken whose time is a polynomial of low degree in a module's name.
"""

import re

MAX_LENGTH = 1024
MAX_OPTIONAL = 8
_TOKEN = re.compile(
    r"(?P<escape>\\[^0-9])"  # no back references
    r"|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<open>\((?:\?:)?(?!\?))"  # plain groups: no look-around, no flags, no names
    r"|(?P<close>\))"
    r"|(?P<repeat>[*+]|\{\d*,?\d*\})(?P<kind>\??)(?![*+?{])"
    r"|(?P<optional>\?)(?P<lazy>\??)(?![*+?{])"
    r"|(?P<other>[^\\\[()*+?{])",
    re.DOTALL,
)


def problem_of(pattern, max_repeats) -> str | None:
    """What is wrong with a pattern from a file; None where it may be run.

    Args:
        pattern: what should be a regular expression.
        max_repeats: how many ``*``, ``+`` and ``{}`` it may have: the degree of the polynomial.
    """
    if not isinstance(pattern, str) or not pattern:
        return "is not a pattern"
    if len(pattern) > MAX_LENGTH or not pattern.isprintable():
        return f"is longer than {MAX_LENGTH} characters or not printable"
    position, before, repeats, optional = 0, None, 0, 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            return "has a part that is not understood"
        kind = next(name for name in _KINDS if token[name] is not None)
        if kind == "repeat" and before == "close":
            return "repeats a group"
        repeats += kind == "repeat"
        optional += kind == "optional"
        position, before = token.end(), kind
    if repeats > max_repeats or optional > MAX_OPTIONAL:
        return f"has more than {max_repeats} repeats or {MAX_OPTIONAL} optional parts"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, ValueError):
        return "is not a pattern"
    return None


_KINDS = ("escape", "set", "open", "close", "repeat", "optional", "other")
