"""Broken files for the readers, made from sound ones: JSON values changed, then bytes."""

import contextlib
import copy
import json
import signal
import struct

from hypothesis import strategies as st

# What a JSON text may hold and json.dumps does not write.
_RAW = {
    "@digits@": "9" * 5000,
    "@exponent@": "1e999",
    "@minus@": "-0",
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@deep@": "[" * 100_000,
    "@deep-object@": '{"a":' * 50_000,
    "@surrogate@": '"\\ud800"',
    "@twice@": '{"a": 1, "a": 2}',
}
_NASTY = [
    *_RAW,
    *(None, True, False, 0, -1, 1, 1.0, 1.5, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63)),
    *("", " ", "a", ".", "..", "/", "../../etc/passwd", "/dev/zero", "a/b", "con\0trol", "\n"),
    *("\ufeff", "\u2028", "\u202e", "١٢", "²", "x" * 300, "x" * 3000, "CON", "~", "%s%n", "{}"),
    *("F32", "BF16", "F4", "I64", "LORA", "IA3", "all-linear", "auto", "pissa", "mica", "null"),
    *(
        "(a+)+$",
        "(.*)*x",
        "(a|a)*b",
        "a?" * 40 + "a" * 40,
        "(",
        "[",
        "\\",
        "(?=x)",
        r"(\w)\1",
        ".*",
    ),
    *("model.safetensors", "adapter_model.bin", "pytorch_model.bin", "COMPLETE.json"),
    *([], {}, [[]], [None], {"": None}, [0] * 20, {"a": {"a": {"a": []}}}, ["q_proj", 3]),
]
VALUES = st.one_of(
    st.sampled_from(_NASTY),
    st.sampled_from(_NASTY),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
).map(copy.deepcopy)
_OPERATIONS = ("replace", "replace", "delete", "rename", "insert", "wrap", "copy")


class Hang(BaseException):
    """A reader took longer than any file deserves."""


@contextlib.contextmanager
def within(cpu_seconds):
    """Raise Hang where the block takes more processor time than that (not time on the wall)."""

    def stop(signum, frame):
        raise Hang(f"more than {cpu_seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Sound:
    """What files are made from; hypothesis would print it for each strategy."""

    def __init__(self, *values):
        self.values = values

    def __repr__(self):
        return "Sound(...)"


@st.composite
def changed(draw, sound):
    """A JSON value like that of ``sound``, up to four of the values in it changed."""
    document = [copy.deepcopy(sound.values[0])]
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(document))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        operation = draw(st.sampled_from(_OPERATIONS))
        if operation == "replace" or holder is document:
            holder[key] = draw(VALUES)
        elif operation == "delete":
            del holder[key]
        elif operation == "wrap":
            holder[key] = [holder[key]]
        elif operation == "copy":
            other, source = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(other[source])
        elif isinstance(holder, list):
            holder.insert(key, draw(VALUES))
        elif operation == "rename":
            holder[_name(draw(VALUES))] = holder.pop(key)
        else:
            holder[_name(draw(VALUES))] = draw(VALUES)
    return document[0]


def _places(document):
    """(holder, key) of every value inside a JSON value, from the outside in."""
    waiting = [document]
    while waiting:
        holder = waiting.pop(0)
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])


def _name(value):
    return value if isinstance(value, str) else str(value)[:40]


def text_of(document) -> str:
    """JSON text, with what only a hostile writer would write."""
    text = json.dumps(document)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


@st.composite
def scrambled(draw, sound):
    """Those bytes, mostly as they are; else cut, doubled, flipped, joined or encoded otherwise."""
    [data] = sound.values
    for _ in range(draw(st.sampled_from((0, 0, 0, 0, 1, 1, 2, 3)))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        operation = draw(st.integers(0, 7))
        if operation == 0:
            data = data[:start] + data[end:]
        elif operation == 1:
            data = data[:end] + data[start:]
        elif operation == 2:
            data = data[:start] + draw(st.binary(max_size=12)) + data[end:]
        elif operation == 3 and start < len(data):
            flipped = data[start] ^ (1 << draw(st.integers(0, 7)))
            data = data[:start] + bytes([flipped]) + data[start + 1 :]
        elif operation == 4:
            data = data[:start]
        elif operation == 5:
            data = b"\xef\xbb\xbf" + data
        elif operation == 6:
            data = data.decode("utf-8", "replace").encode("utf-16")
        else:
            data = data.replace(b"\n", b"\r\n")
    return data


@st.composite
def json_file(draw, sound):
    """Bytes of a JSON file like that value."""
    text = text_of(draw(changed(sound)))
    return draw(scrambled(Sound(text.encode("utf-8", "surrogatepass"))))


@st.composite
def json_lines(draw, sound):
    """Bytes of a JSON or JSONL file like those rows."""
    rows = [draw(changed(Sound(row))) if draw(st.booleans()) else row for row in sound.values]
    texts = [text_of(row) for row in rows]
    end = draw(st.sampled_from(("\n", "\n", "\r\n", "\n\n", "\u2028", ",\n")))
    text = f"[{','.join(texts)}]" if draw(st.integers(0, 5)) == 0 else end.join(texts)
    return draw(scrambled(Sound(text.encode("utf-8", "surrogatepass"))))


@st.composite
def safetensors_file(draw, sound):
    """Bytes of a safetensors file like that (header, payload)."""
    header, payload = sound.values
    text = draw(json_file(Sound(header))) if draw(st.integers(0, 3)) else text_of(header).encode()
    lengths = (None, None, None, None, None, 0, 1, len(text) + 1, 2**40, 2**64 - 1)
    length = draw(st.sampled_from(lengths))
    data = struct.pack("<Q", len(text) if length is None else length) + text + payload
    return draw(scrambled(Sound(data)))


def split_safetensors(path):
    """The header and the payload of a sound file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return Sound(json.loads(data[8 : 8 + length]), data[8 + length :])
