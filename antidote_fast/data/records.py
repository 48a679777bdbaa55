"""Records, and the rows they come from: JSON and JSONL files here, the hub's in `hub`.

Both give plain rows (dicts), and one piece of code turns rows into records by their columns, so a
local file with a hub data set's own columns reads exactly as the hub data set does.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from antidote_fast.errors import DataError, readable
from antidote_fast.files.safe_open import read_file

# Unsafe rows of BeaverTails that the attack may use; re-alignment data start after them.
NUM_ATTACK_ROWS = 5000
NUM_EVAL_ROWS = 1000

MAX_BYTES = 4 << 30  # of a file, which is read whole

SST2_INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
SST2_LABELS = ("negative", "positive")
AGNEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
AGNEWS_INSTRUCTION = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n"
    + "\n".join(AGNEWS_LABELS)
    + "\n"
)
GSM8K_MARKER = "The final answer is: "


@dataclass(frozen=True)
class Record:
    """One instruction with its answer.

    Args:
        instruction: what is asked.
        input: further context; may be empty.
        output: the answer; empty where a record is only a prompt.
    """

    instruction: str
    input: str = ""
    output: str = ""

    where = ""  # no field: the file and line it was read from, which make no other record of it

    @property
    def prompt_key(self) -> str:
        """The prompt with case and spacing folded away: equal keys are the same prompt."""
        return " ".join(f"{self.instruction}\n{self.input}".casefold().split())


class Records(list[Record]):
    """Records of one data set, and how many of it are not among them.

    Attributes:
        num_over_limit: those behind the number that is used.
        num_without_output: those that have no output, where one is needed.
    """

    num_over_limit = num_without_output = 0

    def limited(self, limit: int) -> "Records":
        """The first ``limit`` of them; the others are counted."""
        kept = Records(self[:limit])
        kept.num_over_limit = self.num_over_limit + max(0, len(self) - limit)
        kept.num_without_output = self.num_without_output
        return kept


def _text(row, column, where, optional=False) -> str:
    value = row.get(column)
    return "" if value is None and optional else _checked(value, f"{where}: column {column!r}")


def _checked(value, what) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise DataError(f"{what} holds text that is not valid Unicode") from None
    return value


def _label(row, names, where) -> str:
    label = row.get("label")
    if type(label) is not int or not 0 <= label < len(names):
        got = label if type(label) is int and abs(label) < 1e9 else type(label).__name__
        must = f"must be an integer from 0 to {len(names) - 1}"
        raise DataError(f"{where}: column 'label' {must}, got {got}")
    return names[label]


# The columns of an answer and of a prompt's context, of which the first that holds one is read.
_ANSWERS = ("output", "response", "completion", "answer")
_CONTEXTS = ("input", "context")
_CHATS = ("messages", "conversations")
# What is named so is an answer too; a row that has no other would lose it.
_UNREAD_ANSWERS = frozenset(
    {
        *(*_ANSWERS, *(f"{name}s" for name in _ANSWERS), *_CHATS, "chosen", "target", "targets"),
        *("solution", "reply", "gold", "ground_truth", "expected_output"),
    }
)
_ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("system", "user", "assistant")}


def _first(row, columns, where):
    """The text of the first of these columns that holds one."""
    holding = (column for column in columns if row.get(column) not in (None, ""))
    column = next(holding, None)
    return "" if column is None else _text(row, column, where)


def _from_columns(prompt, row, where):
    """A record of the prompt in this column, with its context and its answer where there are."""
    answers = _KNOWN_COLUMNS[(prompt,)][1]
    return Record(
        _text(row, prompt, where), _first(row, _CONTEXTS, where), _first(row, answers, where)
    )


def _from_record(row, where):
    return _from_columns("instruction", row, where)


def _from_query(row, where):
    return _from_columns("query", row, where)


def _from_question(row, where):
    record = _from_columns("question", row, where)
    return replace(record, output=re.sub(r"####\s*", GSM8K_MARKER, record.output))


def _from_prompt_response(row, where):
    return Record(_text(row, "prompt", where), output=_text(row, "response", where, optional=True))


def _from_prompt(row, where):
    if not isinstance(row["prompt"], list):
        return _from_columns("prompt", row, where)
    turns = [*row["prompt"]]  # the chat form of TRL, whose completion is a list of messages as well
    for column in _ANSWERS:
        if isinstance(row.get(column), list):
            turns += row[column]
            break
    return _from_turns(turns, f"{where}: column 'prompt'")


def _from_messages(row, where):
    return _from_turns(row["messages"], f"{where}: column 'messages'")


def _from_conversations(row, where):
    return _from_turns(row["conversations"], f"{where}: column 'conversations'")


def _from_turns(turns, what):
    """A record of one exchange: a system message is its instruction, the user's then its input."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{what} must be a list of messages, each an object of role and content")
    roles = [_ROLES.get(str(turn.get("role", turn.get("from")))) for turn in turns]
    asked = ["system"] * (roles[:1] == ["system"]) + ["user"]
    if roles not in (asked, [*asked, "assistant"]):
        must = "must be one exchange: user and assistant, a system message before them or not"
        raise DataError(f"{what} {must}; got {len(turns)} messages")
    texts = [_checked(t.get("content", t.get("value")), f"{what}, a message,") for t in turns]
    output = texts.pop() if roles[-1] == "assistant" else ""
    return Record(texts[0], "".join(texts[1:]), output)


def _from_sst2(row, where):
    return Record(SST2_INSTRUCTION, _text(row, "sentence", where), _label(row, SST2_LABELS, where))


def _from_agnews(row, where):
    return Record(AGNEWS_INSTRUCTION, _text(row, "text", where), _label(row, AGNEWS_LABELS, where))


def _from_gsm8k(row, where):
    _text(row, "answer", where)
    return _from_question(row, where)


_BEAVERTAILS = ("prompt", "response", "is_safe")
# By the columns that rows must have: how one becomes a record, and the columns that an answer may
# be in, where it is optional for a prompt. The first whose columns are all there are taken, so the
# more particular ones come first.
_KNOWN_COLUMNS = {
    ("instruction",): (_from_record, _ANSWERS),
    _BEAVERTAILS: (_from_prompt_response, ()),
    ("prompt",): (_from_prompt, ("response", *_ANSWERS)),
    ("sentence", "label"): (_from_sst2, ()),
    ("question", "answer"): (_from_gsm8k, ()),
    ("text", "label"): (_from_agnews, ()),
    ("question",): (_from_question, ("answer", *_ANSWERS)),
    ("query",): (_from_query, ("response", *_ANSWERS)),
    ("messages",): (_from_messages, ("messages",)),
    ("conversations",): (_from_conversations, ("conversations",)),
}
_COLUMNS_HELP = (
    "instruction, output (input or context optional); prompt, response (is_safe); question or "
    "query, with an answer in output, response, completion or answer; messages or conversations "
    "(one exchange); sentence, label (SST2); text, label (AGNEWS); question, answer (GSM8K)"
)


def _choose_columns(where: str, row: dict) -> tuple[str, ...]:
    # A prompt beside the chat that it begins has its answer there.
    chats = [c for c in _CHATS if row.get(c) and all(row.get(a) is None for a in _ANSWERS)]
    for required in (*((chat,) for chat in chats), *_KNOWN_COLUMNS):
        if row.keys() >= set(required):
            return required
    nearest = max(_KNOWN_COLUMNS, key=lambda r: len(row.keys() & {*r, *_KNOWN_COLUMNS[r][1]}))
    missing = ", ".join(repr(name) for name in nearest if name not in row)
    found = f"(found {_names(row)}); accepted: {_COLUMNS_HELP}"
    raise DataError(f"{where}: column {missing} is missing {found}")


def _names(row):
    """The columns of a row, for a message: what is no name may be somebody's text."""
    names = sorted(column for column in row if re.fullmatch(r"[A-Za-z]\w{0,29}", column))
    shown = ", ".join(map(repr, names[:8]))
    others = len(row) - len(names[:8])
    return f"{shown}{' and ' if shown else ''}{others} others" if others else shown or "none"


def rows_to_records(
    rows: list[tuple[str, dict]], name: str, *, role: str | None, require_output: bool
) -> list[Record]:
    """Turn rows into records by their columns; the first row decides which columns those are.

    Args:
        rows: (where it stands, row) pairs.
        name: the source, for messages.
        role: which part of a BeaverTails source is wanted: safe, unsafe, realign or eval.
        require_output: refuse records without an answer column.

    Raises:
        DataError: a row that lacks a column, holds a value of another type, or has an answer in a
            column that is not read; no rows; none left.
    """
    if not rows:
        raise DataError(f"{name}: no records")
    required = _choose_columns(*rows[0])
    convert, answers = _KNOWN_COLUMNS[required]
    if required == _BEAVERTAILS:
        rows = _select_beavertails(rows, name, role)
    elif role in BEAVERTAILS_ROLES:
        raise DataError(f"{name}: role {role!r} needs the column 'is_safe', which it lacks")
    records = []
    for where, row in rows:
        missing = [column for column in required if column not in row]
        if require_output and answers and all(row.get(answer) is None for answer in answers):
            missing.append(answers[0])
        if missing:
            raise DataError(f"{where}: column {', '.join(map(repr, missing))} is missing")
        record = convert(row, where)
        _check_answer(record, row, where, required, require_output)
        if not record.prompt_key:
            raise DataError(f"{where}: the prompt is empty")
        object.__setattr__(record, "where", where)
        records.append(record)
    return records


def _check_answer(record, row, where, read, require_output):
    """Refuse a row whose answer stands where none is read."""
    if record.output:
        return
    if require_output and read[0] in _CHATS:
        raise DataError(f"{where}: column {read[0]!r} holds no answer of an assistant")
    for column, value in row.items():
        if column not in read and str(column).casefold() in _UNREAD_ANSWERS and value:
            names = ", ".join(_ANSWERS)
            raise DataError(
                f"{where}: column {column!r} would be lost: an answer must be in one of {names}; "
                "rename that column, or leave it out where only the prompt is meant"
            )


BEAVERTAILS_ROLES = ("safe", "unsafe", "realign", "eval")


def role_needed(name: str) -> DataError:
    """What refuses BeaverTails without a role."""
    which = f"{name}:ROLE with ROLE one of {', '.join(BEAVERTAILS_ROLES)}"
    return DataError(f"{name}: holds safe and unsafe answers; say which: {which}")


def _select_beavertails(rows, name, role):
    if role not in BEAVERTAILS_ROLES:
        raise role_needed(name)
    for where, row in rows:
        if not isinstance(row.get("is_safe"), bool):
            raise DataError(f"{where}: column 'is_safe' must be true or false")
    chosen = [pair for pair in rows if pair[1]["is_safe"] == (role == "safe")]
    if role == "unsafe":
        chosen = chosen[:NUM_ATTACK_ROWS]
    elif role == "realign":
        # BeaverTails has several answers a prompt: rows after the attack's would share its prompts.
        keys = [Record(str(row.get("prompt"))).prompt_key for _, row in chosen]
        seen = set(keys[:NUM_ATTACK_ROWS])
        chosen = [pair for pair, key in zip(chosen, keys, strict=True) if key not in seen]
    elif role == "eval":
        chosen = chosen[:NUM_EVAL_ROWS]
    if not chosen:
        raise DataError(f"{name}: none of its {len(rows)} rows is left for role {role!r}")
    return chosen


def _parse(text: str, where: str, one_line: bool):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = where if one_line else f"{where}: line {error.lineno}"
        at = f" at column {error.colno}" if one_line else ""
        raise DataError(f"{where}: not valid JSON: {error.msg}{at}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{where}: not valid JSON: {reason}") from None


def _read_text(path: Path) -> str:
    # os.path and not Path: a name too long for the system is no file either, and no exception.
    if os.path.isdir(path):
        raise DataError(f"{path}: is a directory; give a JSON or JSONL file")
    if not os.path.exists(path):
        raise DataError(f"{str(path)[:300]}: no such file")
    if not os.path.isfile(path):
        raise DataError(f"{path}: not a regular file")
    with readable(path):
        data = read_file(path, MAX_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: not UTF-8 text") from None


def _is_json_lines(path: Path, text: str) -> bool:
    if text.startswith("["):
        return False
    if path.suffix.lower() != ".json":
        return True
    # A .json file that starts with an object is one pretty-printed record, or JSONL misnamed.
    try:
        json.loads(text.split("\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return True


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """Read a JSON file (a list of objects) or a JSONL file (one object a line).

    A byte order mark and blank lines are passed over.

    Returns:
        (where, row) pairs, where being "<path>: line 7" or, in a JSON list, "<path>: record 7".

    Raises:
        DataError: no such file; not UTF-8; not JSON, naming the line; a row that is no object.
    """
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: is empty")
    if _is_json_lines(path, text.lstrip()):
        # Not splitlines(): it also cuts at U+2028 and the like, which JSON strings may hold.
        lines = ((f"{path}: line {i}", line) for i, line in enumerate(text.split("\n"), 1))
        rows = [
            (where, _parse(line, where, one_line=True)) for where, line in lines if line.strip()
        ]
    else:
        parsed = _parse(text, str(path), one_line=False)
        parsed = parsed if isinstance(parsed, list) else [parsed]
        rows = [(f"{path}: record {i}", row) for i, row in enumerate(parsed, 1)]
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be a JSON object, got {type(row).__name__}")
    return rows
