"""Records from local files: every form that is read, and every one that is refused."""

import json
import os

import pytest
import texts

from antidote_fast.data import records as sources
from antidote_fast.data.load import load_records, local_file
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError

GOOD = {"instruction": "Say hi", "input": "", "output": "hi"}


# --- local files ----------------------------------------------------------------------------------


def test_jsonl_with_bom_blank_lines_and_line_separators(tmp_path):
    rows = [GOOD, {"instruction": "Say \u2028 this", "output": "a\x85b"}]
    text = "\ufeff\n" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n \n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode())
    assert load_records(str(path)) == [
        Record("Say hi", "", "hi"),
        Record("Say \u2028 this", "", "a\x85b"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps([GOOD, GOOD], indent=2)),
        ("lines.json", json.dumps(GOOD) + "\n" + json.dumps(GOOD)),
        ("list.jsonl", "  " + json.dumps([GOOD, GOOD])),
        ("noext", json.dumps(GOOD) + "\n" + json.dumps(GOOD)),
    ],
)
def test_json_forms(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert load_records(str(path)) == [Record("Say hi", "", "hi")] * 2


def test_one_pretty_printed_record(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(GOOD, indent=2))
    assert load_records(str(path)) == [Record("Say hi", "", "hi")]


def test_huge_line(tmp_path):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [GOOD | {"output": "x" * 5_000_000}])
    assert len(load_records(path)[0].output) == 5_000_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[]", "no records"),
        (json.dumps(GOOD).encode() + b'\n\n{"instruction": ', "line 3: not valid JSON"),
        (json.dumps(GOOD).encode() + b"\n[1]", "line 2: must be a JSON object, got list"),
        (b"hello", "line 1: not valid JSON"),
        (json.dumps(GOOD).encode() + b"\n\xff\xfe", "line 2: not UTF-8"),
        (b"\x1f\x8b\x08gz", "line 1: not UTF-8"),
        (b'{"instruction": "a", "output": 3}', "line 1: column 'output' must be a string, got int"),
        (b'{"instruction": ["a"]}', "line 1: column 'instruction' must be a string, got list"),
        (b'{"instruction": "a", "input": 1}', "column 'input' must be a string"),
        (b'{"output": "a"}', "line 1: column 'instruction' is missing"),
        (json.dumps(GOOD).encode() + b'\n{"output": "a"}', "line 2: column 'instruction' is miss"),
        (b'{"sentence": "a"}', "line 1: column 'label' is missing"),
        (b'{"sentence": "a", "label": 2}', "'label' must be an integer from 0 to 1, got 2"),
        (b'{"sentence": "a", "label": true}', "'label' must be an integer from 0 to 1, got bool"),
        (b'{"text": "a", "label": -1}', "'label' must be an integer from 0 to 3"),
        (b'{"foo": "a"}', "accepted: instruction, output"),
        (b"{}", "found none"),
        (b'{"instruction": " ", "output": "a"}', "line 1: the prompt is empty"),
        (b'{"instruction": "\\ud800", "output": "a"}', "not valid Unicode"),
        (b'{"prompt": "a", "response": "b", "is_safe": 1}', "ROLE one of safe, unsafe"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"instruction": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
    ],
)
def test_bad_files(tmp_path, content, expected):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_records(str(path))
    message = texts.one_line(caught)
    assert expected in message
    assert str(path) in message
    assert len(message) < 600
    assert caught.value.exit_code == 3


def test_bad_json_list_names_the_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[\n {"instruction": "a", "output": "b"},\n {"instruction"}\n]')
    with pytest.raises(DataError, match="line 3: not valid JSON"):
        load_records(str(path))
    path.write_text('[{"instruction": "a"}, 3]')
    with pytest.raises(DataError, match="record 2: must be a JSON object, got int"):
        load_records(str(path))


def test_missing_output_is_named_only_where_it_is_needed(tmp_path):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a"}, {"instruction": "b"}])
    assert [r.output for r in load_records(path)] == ["", ""]
    with pytest.raises(DataError, match="line 1: column 'output' is missing"):
        load_records(path, require_output=True)
    path = texts.write_jsonl(tmp_path / "b.jsonl", [GOOD, {"instruction": "b", "output": None}])
    with pytest.raises(DataError, match="line 2: column 'output' is missing"):
        load_records(path, require_output=True)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(DataError, match="is a directory"):
        load_records(str(tmp_path))
    with pytest.raises(DataError, match="no such file"):
        load_records(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        load_records("none")
    with pytest.raises(DataError, match="no such file"):
        load_records("x" * 10_000)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        load_records(str(tmp_path / "pipe"))


def test_options_out_of_range(tmp_path):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [GOOD])
    for options in ({"split": "dev"}, {"limit": 0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            load_records(path, **options)
    with pytest.raises(UsageError, match="dataset=''"):
        load_records("")
    with pytest.raises(UsageError, match="role must be one of safe"):
        load_records(f"{path}:test")
    with pytest.raises(DataError, match="role 'safe' needs the column 'is_safe'"):
        load_records(f"{path}:safe")


def test_a_file_whose_name_ends_like_a_role(tmp_path):
    path = texts.write_jsonl(tmp_path / "a:safe", [GOOD])
    assert load_records(path) == [Record("Say hi", "", "hi")]
    assert local_file(path) == path
    assert local_file(f"{tmp_path}/b.jsonl:safe") == f"{tmp_path}/b.jsonl"
    assert local_file("openai/gsm8k:test") is None


# --- the hub's columns in local files -------------------------------------------------------------


def test_columns_of_the_tasks(tmp_path):
    sst2 = [{"idx": 0, "sentence": "fine film", "label": 1}, {"sentence": "dull", "label": 0}]
    records = load_records(texts.write_jsonl(tmp_path / "a.jsonl", sst2))
    assert [(r.input, r.output) for r in records] == [
        ("fine film", "positive"),
        ("dull", "negative"),
    ]
    assert records[0].instruction == (
        "Analyze the sentiment of the input, and respond only positive or negative"
    )
    agnews = [{"text": f"t{i}", "label": i} for i in range(4)]
    records = load_records(texts.write_jsonl(tmp_path / "b.jsonl", agnews))
    assert [r.output for r in records] == ["World", "Sports", "Business", "Sci/Tech"]
    assert all(label in records[0].instruction for label in ("World", "Sci/Tech"))
    gsm8k = [{"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}]
    assert load_records(texts.write_jsonl(tmp_path / "c.jsonl", gsm8k)) == [
        Record("1+1?", "", "It is <<1+1=2>>2.\nThe final answer is: 2")
    ]
    alpaca = [GOOD | {"text": "whole text"}, GOOD | {"input": None}]
    assert (
        load_records(texts.write_jsonl(tmp_path / "d.jsonl", alpaca))
        == [Record("Say hi", "", "hi")] * 2
    )
    plain = [{"prompt": "p", "response": "r"}]
    assert load_records(texts.write_jsonl(tmp_path / "e.jsonl", plain)) == [Record("p", "", "r")]


USER, ANSWER = {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "r"}, Record("p", "", "r")),
        ({"prompt": "p", "response": "r", "output": "other"}, Record("p", "", "r")),
        ({"prompt": "p", "response": None, "output": "r"}, Record("p", "", "r")),
        ({"prompt": [USER], "completion": [ANSWER]}, Record("p", "", "r")),
        ({"prompt": [SYSTEM, USER]}, Record("s", "p", "")),
        ({"instruction": "p", "context": "c", "response": "r"}, Record("p", "c", "r")),
        (
            {"instruction": "p", "context": "", "response": "r", "category": "x"},
            Record("p", "", "r"),
        ),
        ({"instruction": "p", "input": "c", "response": "r"}, Record("p", "c", "r")),
        ({"instruction": "p", "input": "", "output": "r", "answer": "x"}, Record("p", "", "r")),
        ({"instruction": "p", "completion": "r"}, Record("p", "", "r")),
        ({"question": "p", "response": "r"}, Record("p", "", "r")),
        ({"question": "p", "answer": "r", "context": "c"}, Record("p", "c", "r")),
        ({"question": "p"}, Record("p")),
        ({"query": "p", "response": "r"}, Record("p", "", "r")),
        ({"query": "p", "answer": "r"}, Record("p", "", "r")),
        ({"messages": [USER, ANSWER]}, Record("p", "", "r")),
        ({"messages": [SYSTEM, USER, ANSWER]}, Record("s", "p", "r")),
        ({"messages": [USER]}, Record("p")),
        ({"prompt": "p", "messages": [USER, ANSWER]}, Record("p", "", "r")),
        ({"prompt": "p", "response": "q", "messages": [USER, ANSWER]}, Record("p", "", "q")),
        (
            {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]},
            Record("p", "", "r"),
        ),
        ({"prompt": "p", "target": "", "chosen": None}, Record("p")),
    ],
)
def test_other_spellings(tmp_path, row, expected):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [row, row])
    assert load_records(path) == [expected] * 2
    if expected.output:
        assert load_records(path, require_output=True) == [expected] * 2
    else:
        with pytest.raises(DataError, match=r"line 1: column '(response|answer|messages)'"):
            load_records(path, require_output=True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "target": "r"}, "line 2: column 'target' would be lost"),
        ({"prompt": "p", "chosen": "r", "rejected": "q"}, "column 'chosen' would be lost"),
        ({"prompt": "p", "Response": "r"}, "column 'Response' would be lost"),
        ({"prompt": "p", "messages": [USER, ANSWER]}, "column 'messages' would be lost"),
        ({"prompt": "p", "completion": 3}, "column 'completion' must be a string, got int"),
        ({"prompt": [USER], "completion": "r"}, "column 'completion' would be lost"),
        ({"prompt": [USER, "r"]}, "column 'prompt' must be a list of messages"),
    ],
)
def test_an_answer_that_would_be_lost(tmp_path, row, expected):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p"}, row])
    with pytest.raises(DataError) as caught:
        load_records(path)
    assert expected in texts.one_line(caught)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([USER, ANSWER, USER, ANSWER], "must be one exchange: .*; got 4 messages"),
        ([ANSWER], "got 1 messages"),
        ([USER, {"role": "tool", "content": "x"}], "got 2 messages"),
        ([], "got 0 messages"),
        ("text", "must be a list of messages, each an object of role and content"),
        ([USER, {"role": "assistant", "content": [3]}], "must be a string, got list"),
        ([USER, {"role": "assistant"}], "must be a string, got NoneType"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([{"role": "user", "content": " "}], "the prompt is empty"),
    ],
)
def test_chats_that_are_refused(tmp_path, turns, expected):
    path = texts.write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match=f"line 1: .*{expected}") as caught:
        load_records(path)
    assert "\n" not in str(caught.value)


def test_beavertails_roles(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "NUM_ATTACK_ROWS", 6)
    monkeypatch.setattr(sources, "NUM_EVAL_ROWS", 3)
    # 40 rows over 15 prompts; every other one safe: 20 unsafe, of rows 1, 3, 5, ...
    path = texts.write_jsonl(tmp_path / "a.jsonl", texts.beavertails_rows(40, prompts=15))
    safe = load_records(f"{path}:safe")
    assert [r.output for r in safe] == [f"answer {i}" for i in range(0, 40, 2)]
    attack = load_records(f"{path}:unsafe")
    assert [r.output for r in attack] == [f"answer {i}" for i in (1, 3, 5, 7, 9, 11)]
    realign = load_records(f"{path}:realign")
    assert not {r.prompt_key for r in attack} & {r.prompt_key for r in realign}
    used = {i % 15 for i in (1, 3, 5, 7, 9, 11)}
    expected = [i for i in range(13, 40, 2) if i % 15 not in used]
    assert [r.output for r in realign] == [f"answer {i}" for i in expected]
    assert [r.output for r in load_records(f"{path}:eval")] == ["answer 1", "answer 3", "answer 5"]
    assert load_records(f"{path}:unsafe", limit=2) == attack[:2]


def test_beavertails_refusals(tmp_path):
    path = texts.write_jsonl(tmp_path / "a.jsonl", texts.beavertails_rows(4))
    with pytest.raises(DataError, match=r"say which: .*:ROLE with ROLE one of safe"):
        load_records(path)
    with pytest.raises(DataError, match="none of its 4 rows is left for role 'realign'"):
        load_records(f"{path}:realign")
    rows = texts.beavertails_rows(4)
    rows[2]["is_safe"] = "yes"
    path = texts.write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(DataError, match="line 3: column 'is_safe' must be true or false"):
        load_records(f"{path}:safe")
