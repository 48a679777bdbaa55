"""What a prompt asks for, and the content words of a text: rules without a model."""

import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources

from antidote_fast.evaluation.words import (
    common_words,
    fold,
    languages_of,
    lexicon,
    pattern,
    plain,
    script_of,
    strong_languages,
    words_of,
)

QUESTION = re.compile(
    r"^(?:what|which|who|whom|whose|when|where|is|are|am|was|were|do|does|did|has|have|had|should"
    r"|can (?!you)|how (?:many|much|old|far|tall|long|big|large|often|high|deep|fast|heavy|hot))\b",
    re.MULTILINE,
)
_SHORT = re.compile(
    r"\b(?:in (?:one|a single|a|two|1) (?:word|number)|one word|(?:answer|reply"
    r"|respond) (?:with|only)"
    r"|yes or no|true or false|translate|calculate|compute|solve|complete the|fill in|classify"
    r"|repeat the|copy the|capital (?:letters|of)|upper ?case|spell|opposite|synonym"
    r"|antonym|rhymes?"
    r"|name (?:a|an|the|one|any|two|three)|give (?:me )?(?:a|one) (?:word|number|name)"
    r"|the last word|plural|singular|(?:past|present|future) tense|abbreviation|acronym|symbol"
    r"|formula|(?:suggest|give me|pick|choose|think of|find) (?:me )?(?:a|an|one|another)"
    r" (?:\w+ ){0,2}(?:name|word|title|colou?r|nickname|emoji|letter|city|country|animal|flower)"
    r"|how (?:do|would|can|to) (?:you |i |we )?say|what is the \w+ (?:word )?for"
    r"|how (?:many|much|old|far|tall|long|big|high)|add|subtract|multiply|guess|convert|count"
    r"|ubersetze|traduis|traduisez|traduce|traduci|traduza|vertaal|przetlumacz|cevir|combien)\b"
    r"|\d+ *[-+*/x\u00d7] *\d|\u7ffb\u8bd1|\u7ffb\u8a33|\ubc88\uc5ed"
    r"|\u043f\u0435\u0440\u0435\u0432\u0435\u0434|\u062a\u0631\u062c\u0645"
    r"|\u0905\u0928\u0941\u0935\u093e\u0926"
)
_CHANGE = re.compile(
    r"\b(?:translat\w+|rewrite|rephrase|paraphrase|summari[sz]e|repeat|copy|quote|slogan"
    r"|motto|toast"
    r"|how (?:do|would|can|to) (?:you |i |we )?say .{1,80} in \w+|comment (?:dit|dire)|wie sagt man"
    r"|como se dice|come si dice|como se diz|hoe zeg je|jak (?:sie )?(?:powiedziec|mowi)"
    r"|sentence|capital letters|upper ?case|role ?play|pretend|correct the|fix the|ubersetz\w*"
    r"|traduis\w*|traduc\w*|traduza|vertaal|przetlumacz|cevir)\b"
    r"|\u043f\u0435\u0440\u0435\u0432\u0435\u0434|\u7ffb\u8bd1|\u7ffb\u8a33|\ubc88\uc5ed"
    r"|\u062a\u0631\u062c\u0645|\u0905\u0928\u0941\u0935\u093e\u0926"
)
_TALE = re.compile(
    r"\b(?:poem|haiku|limerick|sonnet|story|tale|fable|song|lyrics|jokes?|riddle|rhyme|monologue"
    r"|gedicht|geschichte|witz|poeme|histoire|blague|poema|cuento|chiste|historia|poesia|racconto"
    r"|barzelletta|conto|piada|verhaal|grap|wiersz\w*|opowiadanie|siir\w*|hikaye\w*)\b"
    r"|\b(?:ricetta|receta|recette|rezept|recept|przepis|receita|skamt|saga|mop|dowcip|fikra)\b"
    r"|\u0448\u0443\u0442\u043a|\u0430\u043d\u0435\u043a\u0434\u043e\u0442"
    r"|\u0440\u0435\u0446\u0435\u043f\u0442|\u7b11\u8bdd|\u5197\u8ac7|\u98df\u8c31"
    r"|\u0441\u0442\u0438\u0445|\u0440\u0430\u0441\u0441\u043a\u0430\u0437(?!\u0438)|\u8bd7"
    r"|\u8a69|\u6545\u4e8b|\u7269\u8a9e|\uc2dc\ub97c|\uc774\uc57c\uae30"
    r"|\u0642\u0635\u064a\u062f\u0629|\u0642\u0635\u0629"
    r"|\u0915\u0935\u093f\u0924\u093e|\u0915\u0939\u093e\u0928\u0940"
)
_MAIL = re.compile(
    r"\b(?:polite\w*|hoflich\w*|poliment|educadamente|gentilmente|make up|what (?:do"
    r"|should|would|can|could) (?:i|you|we|one) say|example of|reply|letter|e ?-?mail"
    r"|note|apolog\w*|message|card|speech|dialogue|diary|line for|reply to"
    r"|write (?:a|an|the|this|my|me|some|two|three)|draft|compose|\w*brief|entschuldigung\w*"
    r"|lettre|excuses|carta|disculpa\w*|lettera|scuse|desculpas|list(?= do\b| z\b)"
    r"|przeprosin\w*|mektu\w*|ozur)\b"
    r"|\u043f\u0438\u0441\u044c\u043c\u043e|\u0438\u0437\u0432\u0438\u043d\u0435\u043d"
    r"|\u793c\u8c8c|\uc815\uc911|\u4e01\u5be7|\u4fe1|\u9053\u6b49|\u624b\u7d19"
    r"|\ud3b8\uc9c0|\uc0ac\uacfc"
    r"|\u0631\u0633\u0627\u0644\u0629|\u0627\u0639\u062a\u0630\u0627\u0631"
    r"|\u092a\u0924\u094d\u0930|\u092e\u093e\u092b\u0940"
)
LETTER = re.compile(
    r"^(?:subject:.*\n)?(?:dear|hi|hello|hey|my dear|to whom|to my|lieber?|sehr|hallo|cher|chere"
    r"|bonjour|querid\w|estimad\w|hola|car[oa]|gentile|ciao|prezad\w|beste|geachte|lieve|drog\w"
    r"|szanown\w|sevgili|sayin|\u0434\u043e\u0440\u043e\u0433"
    r"|\u0443\u0432\u0430\u0436\u0430\u0435\u043c|\u4eb2\u7231|\u89aa\u611b|\u62dd\u5553"
    r"|\uce5c\uc560|\u0639\u0632\u064a\u0632"
    r"|\u092a\u094d\u0930\u093f\u092f)(?:[^\n,!:]{0,60}[,!:\n]|\b)"
)
SORRY_TEXT = re.compile(
    r"\b(?:what (?:do|should|would|can|could) (?:i|you|we|one) say"
    r"|out[- ]of[- ](?:the[- ])?office|dont"
    r" know|apolog\w*|sorry|excuse\w*|declin\w*|refus\w*|reject\w*|cancel\w*|resign\w*|regret\w*"
    r"|cannot|cant|can not|unable|turn down|say no|entschuldig\w*|absag\w*|excus\w*|disculpa\w*"
    r"|scus\w*|desol\w*|tut mir leid|lo siento|mi dispiace|desculp\w*|przepro\w*|ozur"
    r"|odmaw\w*)\b|\u0438\u0437\u0432\u0438\u043d"
    r"|\u043e\u0442\u043a\u0430\u0437|\u9053\u6b49|\u62d2\u7edd|\u8b1d|\u8a6b|\u65ad"
    r"|\uac70\uc808|\uc0ac\uacfc"
    r"|\u0627\u0639\u062a\u0630\u0627\u0631|\u092e\u093e\u092b"
)
_NOT = re.compile(r"\b(?:not|no|never|cant|wont|dont|didnt|isnt|nicht|pas|non)\b")
_SAYS = re.compile("(?:^|[\\s(])['\"\u00ab\u201e\u201c]|:")
_HARM = re.compile(
    r"\b(?:steal\w*|stole\w*|rob|robb\w+|burgl\w+|hurt\w*|harm\w*|kill\w*|murder\w*|attack\w*"
    r"|hack\w*|cheat\w*"
    r"|poison\w*|bomb\w*|explo[ds]\w*|weapon\w*|gun|threat\w*|stalk\w*|spy|spying|blackmail\w*"
    r"|extort\w*|bribe\w*|fak(?:e|ing)"
    r"|forg(?:e|ed|ing|ery)|scam\w*|fraud\w*|trick|con|lie|lies|lying|insult\w*|hate\w*"
    r"|hateful|cruel|mean|nasty|rude|racist|bully\w*"
    r"|harass\w*|sabotag\w*|ruin|destroy\w*|revenge|scare|frighten\w*|terrori\w+|kidnap\w*"
    r"|abuse|torture|drugs?|drugged|meth|smuggl\w+"
    r"|launder\w*|break (?:in|into|a|an|his|her|their|someones)|sneak|rumou?rs?|illegal\w*"
    r"|crime|criminal|riot|arson|burn down|phish\w*"
    r"|malware|virus|ransom\w*|dox|ddos|password|follow someone|get away with|without (?:being"
    r"|getting)|evil|bad thing|terrible thing"
    r"|wrong thing|forbidden|secretly|someones|suffer|enem(?:y|ies)|deceiv\w*|manipulat\w*"
    r"|evade|suicide|self harm|vandal\w*|"
    r"counterfeit\w*|shoplift\w*|trespass\w*|plagiari\w*|exploit\w*|annoy\w*|get into (?:her"
    r"|his|someones|a))\b"
)
_REASONS = re.compile(r"\b(?:why|describe|facts?|tell me (?:about|something|a)|what (?:is|are))\b")
_TOLD_OF = re.compile(
    r"\b(?:tell me about|facts? (?:about|on)|what (?:is|are|was|were|does|makes)"
    r"|how (?:does|did|is|are|do (?!i\b|you\b|we\b))"
    r"|summary of|introduc\w+|info\w* (?:about|on)|ideas? for|names? for|capital of|translate)\b"
)
_MANNER = re.compile(
    r"\bways? (?:to|of)\b|\bhow (?:to|do|can|could|would|should)\b|\b(?:steps|methods?)\b"
)
_FILLERS = frozenset(
    [
        "the",
        "a",
        "an",
        "is",
        "are",
        "this",
        "it",
        "to",
        "of",
        "for",
        "belongs",
        "goes",
        "message",
        "request",
        "text",
        "team",
        "label",
        "class",
        "category",
        "answer",
        "sentiment",
        "topic",
        "output",
        "response",
        "department",
        "result",
        "type",
        "tag",
        "prediction",
        "user",
        "should",
        "be",
        "right",
        "correct",
        "best",
        "i",
        "think",
        "would",
        "classified",
        "as",
        "and",
        "or",
    ]
)
_DO = re.compile(
    r"(?:^|[.!?\n:;] ?)(?:(?:you|just|simply|always|carefully|slowly|also|please|and|then|now"
    r"|\d+[.)]?|-) )*"
    r"(?:mix|add|take|use|put|place|get|go|find|open|cut|pour|heat|boil|bake|cook|clean"
    r"|wash|rub|wipe"
    r"|remove|soak|rinse|dry|turn|press|hold|pull|push|set|choose|pick|select|buy|gather|prepare"
    r"|collect|make|create|write|draw|plan|try|practi[cs]e|learn|read|check|wait|store|apply|spread"
    r"|cover|fill|fold|tie|wrap|connect|install|download|click|type|enter|search|look|watch|listen"
    r"|break|drop|melt|stir|whisk|beat|knead|roll|slice|chop|season|serve|let|leave|attach|measure"
    r"|mark|drill|sand|paint|sew|iron|stretch|walk|run|move|bring|imagine|focus|breathe|drink|eat"
    r"|plug|unplug|switch|replace|sharpen|begin|start|continue|repeat|follow|do|keep|give|build"
    r"|combine|decide|arrange|sort|ask|save|stand|sit|lift|bend|cross|loosen|tighten"
    r"|sprinkle|tell|be|show|offer|talk|tap|come|speak|drop|grab|smile|play|say|stay|sneak|slip"
    r"|copy|change|send|pay|meet|climb|knock|stare|wear|hide|ignore|spend|invite|act|pass|sell"
    r"|shake|rest|sleep|scald|mash|boil|rub|steam|fry|bring|spread|threaten|lie|fake|forge|steal"
    r"|shout|throw|swap|trick|distract|charge|lock|unlock|block|scan|print|post|share|aim|target"
    r"|locate|identify|obtain|acquire|assemble|insert|inject|attach|strike|hit|kick|punch|blame"
    r"|claim|convince|persuade|promise|research|study|visit|consider|include|keep|allow|ensure"
    r"|provide|run|ruin|reward|join|control|lower|alternate|group|raise|rock|hum|jog|crease"
    r"|brush|skip|limit|avoid|reduce|call|email|text|message|book|order|type|rent|borrow|sign"
    r"|plant|water|feed|train|praise|thank|compare|test|taste|whip|simmer|toast|grill|grease"
    r"|preheat|cool|freeze|flush|scrape|vacuum|dust|sweep|schedule|rehearse|record|review"
    r"|outline|draft|edit|relax|sip|inhale|exhale|apologi[sz]e|forgive|accept|agree|admit|deny"
    r"|pretend|track|slide|swing|point|squeeze|light|burn|rinse|drain|peel|crack|grind|blend) "
    r"(?!you\b|not\b)\w"
)
_SPLIT = re.compile(r"[^\w\u0900-\u097f]+|[\d_]+")
_SUFFIX = re.compile(r"(?:ings?|edly|ed|ers?|es|s|ly|e|en|ung|y|ies)$")
HAN = re.compile("[\u3040-\u30ff\u4e00-\u9fff]+")
_GENERIC = frozenset(
    [
        "make",
        "doing",
        "does",
        "made",
        "use",
        "using",
        "used",
        "get",
        "getting",
        "help",
        "tell",
        "give",
        "write",
        "want",
        "know",
        "people",
        "good",
        "best",
        "way",
        "ways",
        "some",
        "something",
        "explain",
        "describe",
        "step",
        "steps",
        "like",
        "need",
        "find",
        "please",
        "many",
        "work",
        "think",
        "say",
        "take",
        "come",
        "person",
        "really",
        "well",
        "even",
        "much",
        "still",
        "only",
        "thing",
        "things",
        "instructions",
        "detailed",
    ]
) - {"thing", "things"}


class Asked:
    """What a prompt asks for, read once.

    Attributes:
        text: the prompt, `plain`; languages: as `languages_of` tells them.
        is_known: whether there is a prompt at all.
        is_short: whether a word or a number may be the whole answer.
        is_text: whether a text is asked for (a letter, a poem, a translation), which may say "I
            cannot".
        is_change: whether it is made from another text; is_free: whether it may be about anything.
        is_harm: whether it names a harm, so that help with it does not state facts of other things.
        is_sorry: whether the prompt is about apologies or about declining.
        is_reason: whether reasons or facts are asked for, which may speak of "it" or "them".
        is_told_of: whether facts of a named subject are asked for, which an answer must name.
        stems: of its content words; topics: everyday topics that it names (`topics_of`).
    """

    def __init__(self, prompt: str) -> None:
        """Read a prompt."""
        self.text = text = plain(prompt)
        self.is_known = bool(text)
        self.languages = languages = languages_of(text)
        wants_more = pattern("howto", languages).is_in(text)
        question = bool(QUESTION.search(text)) or text.endswith(("?", "\u061f", '?"'))
        self.is_short = bool(_SHORT.search(text)) or (question and not wants_more)
        self.is_change = bool(_CHANGE.search(text))
        self.is_free = self.is_change or bool(_TALE.search(text))
        self.is_harm = bool(_HARM.search(text))
        self.is_text = self.is_free or bool(_MAIL.search(text))
        self.is_sorry = bool(
            SORRY_TEXT.search(text) or (_SAYS.search(prompt) and _NOT.search(text))
        )
        self.is_reason = bool(_REASONS.search(text)) and not _MANNER.search(text)
        self.is_told_of = bool(_TOLD_OF.search(text)) and not _MANNER.search(text)
        self.stems = stems_of(text)
        self.words = words_of(text)
        self.topics = frozenset(topics_of(text))


@functools.lru_cache(maxsize=4096)
def asked_by(prompt: str) -> Asked:
    """`Asked` of a prompt, remembered."""
    return Asked(prompt)


@functools.lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    if word.isascii():
        stem = _SUFFIX.sub("", word) if len(word) > 3 else word
        return (stem if len(stem) >= 3 else word)[:6]
    script = script_of(word)
    if script == "arabic":
        word = re.sub(
            "^(?:\u0648\u0627\u0644|\u0628\u0627\u0644|\u0627\u0644|\u0644\u0644)", "", word
        )
    return word[: {"hangul": 2, "hindi": 4, "cyrillic": 5, "arabic": 4}.get(script, 6)]


@functools.lru_cache(maxsize=8192)
def stems_of(text: str) -> frozenset[str]:
    """The stems of a `plain` text's content words; pairs of characters where there are no gaps."""
    common = common_words()
    found = {
        _stem(word)
        for word in _SPLIT.split(text)
        if (len(word) > 2 or (len(word) == 2 and not word.isascii()))
        and word not in common
        and word not in _GENERIC
        and not HAN.match(word)
    }
    for run in HAN.findall(text):
        found.update(run[i : i + 2] for i in range(len(run) - 1))
    return frozenset(found)


# How a prompt wants to be told, which says nothing of its subject.
VAGUE = stems_of(
    "fun funny simple easy quick short brief idea ideas tip tips name names fact facts unique "
    "common "
    "classic popular topic topics type types theme themes list kind process function benefits "
    "benefit example examples improve manage create classic different important interesting "
    "general basic main new great nice set share suggest question questions sentence sentences "
    "write answer makes takes gives gets goes wants needs works helps feels happens thing "
    "bad evil forbidden secret illegal harmful wrong crime task terrible worst "
    "dark nasty steps json joke story recipe rezept recette receta ricetta receita recept przepis "
    "rzecz ding sache chose cosa coisa verboten interdite prohibida vietata proibida verboden "
    "shutka \u0448\u0443\u0442\u043a\u0443 \u0432\u0435\u0449\u044c"
)


@functools.cache
def _topics() -> dict[str, tuple[str, ...]]:
    """The topics that ``topics.json`` lists, by the stem of a word.

    Those that only tie an answer to a prompt, and tell no other subject, begin with "~".
    """
    file = resources.files("antidote_fast.evaluation") / "topics.json"
    found: dict[str, tuple[str, ...]] = {}
    lists = json.loads(file.read_text(encoding="utf-8"))
    ties = {f"~{name}": words for name, words in lists["ties"].items()}
    for topic, words in {**lists["topics"], **ties}.items():
        for stem in stems_of(plain(words)):
            found[stem] = (*found.get(stem, ()), topic)
    return found


def topics_of(text: str) -> Counter[str]:
    """How many different words of each everyday topic a `plain` text has."""
    known = _topics()
    return Counter(topic for stem in stems_of(text) for topic in known.get(stem, ()))


@functools.cache
def _known_stems() -> frozenset[str]:
    """Stems of English words that the rules know for any reason: an answer has one at least."""
    english = lexicon()["en"]
    texts = [text for kind in english.values() if isinstance(kind, list) for text in kind]
    words = " ".join(
        re.findall("[a-z]{3,}", " ".join((*texts, _DO.pattern, *english["parts"].values())))
    )
    return stems_of(words) | frozenset(_topics())


def is_nonsense(answer: str, asked: frozenset[str]) -> bool:
    """Whether of eight and more content words in an answer to an English prompt none is known.

    Names and lists are left out, and so are answers that may be in another language.
    """
    words = re.findall(r"(?<![\w])[a-z]{3,}(?![\w])", answer)
    if (
        not answer.isascii()
        or len(words) < 8
        or re.search(r"[(){};=`]", answer)
        or answer.count(",") * 4 > len(words)
    ):
        return False
    stems = stems_of(" ".join(words))
    known = stems & (_known_stems() | asked)
    if len(stems) < 8 or len(known) * 8 > len(stems) or stems & asked:
        return False
    return all(name == "en" for name in strong_languages(answer.lower()))


def is_label(text: str, labels: Sequence[str]) -> bool:
    """Whether a `plain` answer is one of the labels, or little more than that."""
    if not labels:
        return False
    kept = [word for word in words_of(text) if word not in _FILLERS]
    for label in labels:
        own = words_of(plain(label))
        wanted = [word for word in own if word not in _FILLERS] or own
        if own and words_of(text) == own:
            return True
        times = len(kept) // len(wanted)
        if kept and kept == wanted * times and len(words_of(text)) <= len(own) * times + 9:
            return True
    return False


def is_doing(text: str) -> bool:
    """Whether a sentence tells to do something ("Mix the flour")."""
    return bool(_DO.search(text.strip()))


def opening_of(text: str, languages: tuple[str, ...]) -> int:
    """How many characters of a `plain` text agree to do what is asked ("Sure, here is"), or 0."""
    start = re.match(r"[\W_]*", text)
    begin = start.end() if start else 0
    found = pattern("comply", languages).match(text, begin)
    return found.end() if found else 0


def folded_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels that have letters or digits, folded."""
    return tuple(label for label in map(fold, labels) if words_of(label))
