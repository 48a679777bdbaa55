"""Texts as the phrase judge reads them, and the patterns of ``phrases.json`` by language.

Case, accents, apostrophes, markdown and white space do not matter: texts and patterns are folded
alike. ``phrases.json`` holds, for each language, regular expressions over folded text by kind:

- firm: the speaker refuses to help. soft: words that refuse where nothing is given.
- weak: "not" said of the speaker, which refuses where nothing is given before or after.
- disclaimer: words that refuse only where nothing at all follows.
- lecture: the law, morals, danger, a hotline. instead: something else is offered.
- comply: openings that agree. give: words of instructions. turn: "however" and its kind.
- no: a bare no. except: words that only look like a refusal. howto: a prompt that wants more than
  one word for an answer.

``common`` lists frequent words, by which the language of a text is told; ``<NAME>`` in a pattern
stands for the entry of that name in ``parts``.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from importlib import resources

# Combining accents of Latin and Cyrillic letters, Arabic vowel signs and hamzas, apostrophes.
_DROPPED = re.compile("[\u0300-\u036f\u064b-\u0655\u0640'\u2019\u2018\u02bc\u00b4`\u2032\uff07]")
_LETTERS = str.maketrans({"\u0131": "i", "\u0142": "l", "\u00f8": "o", "\u2212": "-"})
_BULLET = re.compile(r"^[ \t]*(?:[-+*\u2022\u2013\u25cf]|#+|>)[ \t]+", re.MULTILINE)
_MARKS = re.compile(r"[*_#~>|]+")
_WORD = re.compile(r"[^\W_]+")
_SCRIPTS = {
    "cyrillic": re.compile("[\u0400-\u04ff]"),
    "han": re.compile("[\u3040-\u30ff\u4e00-\u9fff]"),
    "hangul": re.compile("[\uac00-\ud7af]"),
    "arabic": re.compile("[\u0600-\u06ff]"),
    "hindi": re.compile("[\u0900-\u097f]"),
}
_UNSPACED = ("zh", "ja", "ko", "ar", "hi")


def fold(text: str) -> str:
    """A text without case, accents and apostrophes; wide forms become plain ones."""
    if text.isascii():
        return _DROPPED.sub("", text.lower())
    text = _DROPPED.sub("", unicodedata.normalize("NFKD", text).casefold())
    return unicodedata.normalize("NFC", text).translate(_LETTERS)


def plain(text: str) -> str:
    """A folded text without markdown; each line that is not empty stays a line.

    A line of a list without numbers begins with "- ".
    """
    text = _MARKS.sub(" ", _BULLET.sub("- ", fold(text)))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def words_of(text: str) -> list[str]:
    """The words of a folded text, in order; a text in Chinese or Japanese has few, long ones."""
    return _WORD.findall(text)


@functools.cache
def lexicon() -> dict[str, dict]:
    """What ``phrases.json`` holds: language, kind, patterns."""
    file = resources.files("antidote_fast.evaluation") / "phrases.json"
    return json.loads(file.read_text(encoding="utf-8"))


@functools.cache
def _common() -> dict[str, frozenset[str]]:
    return {
        language: frozenset(fold(entry["common"]).split())
        for language, entry in lexicon().items()
        if entry["script"] == "latin"
    }


@functools.cache
def common_words() -> frozenset[str]:
    """The frequent words of all languages, folded: they tell nothing of a subject."""
    return frozenset(word for e in lexicon().values() for word in fold(e["common"]).split())


def script_of(text: str) -> str:
    """The script of most of the letters of a text that are not Latin, else latin."""
    if text.isascii():
        return "latin"
    counts = {name: len(found.findall(text)) for name, found in _SCRIPTS.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] * 4 > len(text.replace(" ", "")) else "latin"


@functools.lru_cache(maxsize=1024)
def languages_of(text: str) -> tuple[str, ...]:
    """The languages that a folded text may be in: English always, of the others the likely ones."""
    script = script_of(text)
    if script != "latin":
        same = (name for name, entry in lexicon().items() if entry["script"] == script)
        return ("en", *same)
    words = {*words_of(text[:400])}
    counts = {name: len(words & common) for name, common in _common().items()}
    best = max(counts.values())
    if best == 0 or len(words) < 4:
        return tuple(counts)
    # Few words tell little: a language of which any word is there is a likely one.
    least = 1 if len(words) < 8 else best / 2
    return tuple(n for n, count in counts.items() if n == "en" or count >= least)


def strong_languages(text: str) -> tuple[str, ...]:
    """The Latin languages of which one word in five of a folded text is a frequent one."""
    words = words_of(text[:400])
    return tuple(
        name
        for name, common in _common().items()
        if sum(w in common for w in words) * 5 > len(words)
    )


@functools.lru_cache(maxsize=1024)
def is_english(text: str) -> bool:
    """Whether a folded text is English: one word in four at least is a frequent one of English."""
    words = words_of(text[:400])
    own = _common()["en"] - {"a", "in", "me", "on", "an", "no", "so", "do", "as"}
    return text.isascii() and sum(word in own for word in words) * 5 >= len(words)


class Patterns:
    """The patterns of one kind in some languages, looked for in one language after the other."""

    def __init__(self, found: Sequence[re.Pattern[str]]) -> None:
        """Take compiled patterns, one a language."""
        self._found = found

    def search(self, text: str) -> re.Match[str] | None:
        """The first match in a text, of all languages."""
        found = [match for each in self._found if (match := each.search(text))]
        return min(found, key=lambda match: match.start(), default=None)

    def is_in(self, text: str) -> bool:
        """Whether a text has a match anywhere."""
        return any(each.search(text) for each in self._found)

    def finditer(self, text: str) -> list[re.Match[str]]:
        """All matches in a text, by their place."""
        found = [match for each in self._found for match in each.finditer(text)]
        return sorted(found, key=lambda match: match.start())

    def match(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The longest match at a place."""
        found = [match for each in self._found if (match := each.match(text, start))]
        return max(found, key=lambda match: match.end(), default=None)

    def is_all(self, text: str) -> bool:
        """Whether one match is the whole text."""
        return any(each.fullmatch(text) for each in self._found)

    def without(self, text: str) -> str:
        """A text less what matches."""
        for each in self._found:
            text = each.sub(" ", text)
        return text


@functools.cache
def pattern(kind: str, languages: tuple[str, ...]) -> Patterns:
    """The patterns of a kind in some languages."""
    return Patterns([found for each in languages if (found := _compiled(kind, each))])


@functools.cache
def _compiled(kind: str, language: str) -> re.Pattern[str] | None:
    entry = lexicon()[language]
    texts = entry.get(kind, ())
    # A part may itself hold one that stands before it.
    for name, part in reversed(entry.get("parts", {}).items()):
        texts = [text.replace(f"<{name}>", part) for text in texts]
    if not texts:
        return None
    joined = "|".join(map(fold, texts))
    edges = ("", "") if language in _UNSPACED else (r"(?<!\w)", r"(?!\w)")
    return re.compile(f"{edges[0]}(?:{joined}){edges[1]}", re.MULTILINE)
