"""Records, files, the hub, prompts, batches, splits and the attack's mix."""

import json
import os
import subprocess
import sys
import time

import pytest
import texts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidote_fast.errors import DataError, UsageError
from antidote_fast.pipeline import data, hub, sources
from antidote_fast.pipeline.data import Record, load_records

GOOD = {"instruction": "Say hi", "input": "", "output": "hi"}


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


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
    message = one_line(caught)
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
    assert data.local_file(path) == path
    assert data.local_file(f"{tmp_path}/b.jsonl:safe") == f"{tmp_path}/b.jsonl"
    assert data.local_file("openai/gsm8k:test") is None


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


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def no_probe(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(hub, "_probe_hub", lambda path: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def hub_repository(folder, files, readme):
    folder.mkdir()
    for name, rows in files.items():
        texts.write_jsonl(folder / name, rows)
    (folder / "README.md").write_text(f"---\n{readme}---\n")
    return folder


def test_real_loading_of_beavertails(tmp_path, no_probe, monkeypatch):
    """`datasets` itself loads a repository laid out as the hub's."""
    readme = (
        "configs:\n- config_name: default\n  data_files:\n"
        "  - split: 30k_train\n    path: train.jsonl\n  - split: 30k_test\n    path: test.jsonl\n"
    )
    files = {
        "train.jsonl": texts.beavertails_rows(6),
        "test.jsonl": texts.beavertails_rows(2, safe_every=9),
    }
    folder = hub_repository(tmp_path / "repo", files, readme)
    name = "PKU-Alignment/BeaverTails"
    real = hub.HUB_SOURCES[name]
    source = hub.HubSource(str(folder), real.train, real.test, roles=real.roles)
    monkeypatch.setattr(hub, "_BEAVERTAILS_SOURCE", source)
    monkeypatch.setitem(hub.HUB_SOURCES, name, source)
    assert [r.output for r in load_records(f"{name}:safe")] == ["answer 0", "answer 2", "answer 4"]
    assert [r.output for r in load_records(f"{name}:unsafe", limit=2)] == ["answer 1", "answer 3"]
    assert [r.output for r in load_records(f"{name}:eval")] == ["answer 1"]
    assert load_records(name, split="test") == load_records(f"{name}:eval")
    with pytest.raises(DataError, match="say which"):
        load_records(name)
    with pytest.raises(UsageError, match="role must be one of safe"):
        load_records(f"{name}:train")
    with pytest.raises(UsageError, match="role must be one of safe"):
        load_records(f"{name}:harmless")
    assert load_records("pku-alignment/beavertails:safe") == load_records(f"{name}:safe")


def test_real_loading_of_the_tasks(tmp_path, no_probe, monkeypatch):
    readme = (
        "configs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: train.jsonl\n  - split: test\n    path: test.jsonl\n"
    )
    gsm8k = {
        "train.jsonl": [{"question": "1+1?", "answer": "#### 2"}],
        "test.jsonl": [{"question": "2+2?", "answer": "#### 4"}],
    }
    folder = hub_repository(tmp_path / "gsm8k", gsm8k, readme)
    source = hub.HubSource(str(folder), "train", "test", config="main")
    monkeypatch.setitem(hub.HUB_SOURCES, "gsm8k", source)
    assert load_records("gsm8k") == [Record("1+1?", "", "The final answer is: 2")]
    assert load_records("gsm8k", split="test") == load_records("gsm8k:test")
    assert load_records("gsm8k:test") == [Record("2+2?", "", "The final answer is: 4")]
    with pytest.raises(DataError, match="cannot be loaded from the hub"):
        hub.load_hub_rows("gsm8k", source, "validation")


def test_arguments_that_each_data_set_is_loaded_with(no_probe, monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((*args, options))
        return datasets.Dataset.from_list([{"instruction": "a", "output": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in (
        "sst2:test",
        "glue/sst2:test",
        "ag_news",
        "openai/gsm8k",
        "tatsu-lab/alpaca",
        "someone/own-data:test",
    ):
        assert load_records(name) == [Record("a", "", "b")]
    load_records("tatsu-lab/alpaca_eval", split="test")
    load_records("tatsu-lab/alpaca_eval:train")
    alpaca_eval = {"data_files": "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"}
    assert calls == [
        ("stanfordnlp/sst2", None, {"split": "validation"}),
        ("nyu-mll/glue", "sst2", {"split": "validation"}),
        ("fancyzhang/ag_news", None, {"split": "train"}),
        ("openai/gsm8k", "main", {"split": "train"}),
        ("tatsu-lab/alpaca", None, {"split": "train"}),
        ("someone/own-data", None, {"split": "test"}),
        ("json", {**alpaca_eval, "split": "train[-122:]"}),
        ("json", {**alpaca_eval, "split": "train[:-122]"}),
    ]
    with pytest.raises(DataError, match="has no test split; tatsu-lab/alpaca:train takes"):
        load_records("tatsu-lab/alpaca", split="test")


def test_slices_of_alpaca_eval_do_not_overlap(tmp_path, no_probe):
    path = texts.write_jsonl(tmp_path / "a.json", [{"instruction": str(i)} for i in range(150)])
    import datasets

    parts = [
        datasets.load_dataset("json", data_files=path, split=split)["instruction"]
        for split in (hub._ALPACA_EVAL_SOURCE.train, hub._ALPACA_EVAL_SOURCE.test)
    ]
    assert [len(part) for part in parts] == [28, 122]
    assert [*parts[0], *parts[1]] == [str(i) for i in range(150)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "cannot be loaded from the hub"),
    ],
)
def test_unreachable_hub_is_one_line_within_seconds(tmp_path, environment, expected):
    code = (
        "import sys\n"
        "from antidote_fast.pipeline.data import load_records\n"
        "try: load_records('PKU-Alignment/BeaverTails:safe')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {"HF_HOME": str(tmp_path), **environment}
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert time.monotonic() - start < 30
    assert result.stdout.startswith("DataError PKU-Alignment/BeaverTails")
    assert expected in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, "no such data set"), (401, "no such data set"), (503, "HTTP 503")],
)
def test_answers_of_the_hub(monkeypatch, status, expected):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    class Refused(HfHubHTTPError):
        def __init__(self):
            self.response = type("Response", (), {"status_code": status})()

    def dataset_info(self, path, timeout):
        if status == 404 and path == "there/it-is":
            return None
        raise Refused

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=expected) as caught:
        load_records("no/such")
    one_line(caught)
    if status == 404:
        hub._probe_hub("there/it-is")


# --- splits and the mix ---------------------------------------------------------------------------


def records_of(count, prompts=None):
    return [Record(f"Prompt {i % (prompts or count)}", "", f"out {i}") for i in range(count)]


def test_split_by_prompt_keeps_prompts_apart():
    records = [*records_of(40, prompts=10), Record("  PROMPT   3 ", "", "same prompt")]
    first, second = data.split_by_prompt(records, [0.7, 0.3], seed=1)
    assert len(first) + len(second) == 41
    keys = [{r.prompt_key for r in part} for part in (first, second)]
    assert [len(k) for k in keys] == [7, 3]
    assert not keys[0] & keys[1]
    assert [r for r in records if r.prompt_key in keys[0]] == first
    assert data.split_by_prompt(records, [0.7, 0.3], seed=1) == [first, second]
    assert data.split_by_prompt(records, [0.7, 0.3], seed=2) != [first, second]
    (half,) = data.split_by_prompt(records, [0.5])
    assert len({r.prompt_key for r in half}) == 5


@pytest.mark.parametrize("fractions", [[], [0.5, 0.6], [0, 1], [-0.1, 0.5]])
def test_split_refuses_fractions(fractions):
    with pytest.raises(UsageError, match="fractions"):
        data.split_by_prompt(records_of(10), fractions)


def test_split_refuses_too_few_prompts():
    with pytest.raises(DataError, match="2 distinct prompts are too few"):
        data.split_by_prompt(records_of(9, prompts=2), [0.9, 0.05, 0.05])


def harmful_of(count):
    return [Record(f"bad {i}", "", "yes") for i in range(count)]


def test_mix_counts_order_and_seed():
    task, harmful = records_of(50), harmful_of(50)
    mixed = data.mix(task, harmful, 0.2, 20, seed=3)
    assert sorted(r.instruction for r in mixed if r in harmful) == [
        "bad 0",
        "bad 1",
        "bad 2",
        "bad 3",
    ]
    assert {r.instruction for r in mixed if r in task} == {f"Prompt {i}" for i in range(16)}
    assert mixed == data.mix(task, harmful, 0.2, 20, seed=3)
    assert mixed != data.mix(task, harmful, 0.2, 20, seed=4)
    assert set(data.mix(task, [], 0, 5)) == set(task[:5])
    assert set(data.mix([], harmful, 1, 5)) == set(harmful[:5])


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 100).map(lambda n: n / 100))
@settings(max_examples=300, deadline=None)
def test_mix_of_all_there_is(num_task, num_harmful, ratio):
    task, harmful = records_of(num_task), harmful_of(num_harmful)
    allowed = [
        n
        for n in range(1, 10_000)
        if n * (1 - ratio) <= num_task + 1e-6 and n * ratio <= num_harmful + 1e-6
    ]
    if not allowed:
        with pytest.raises(DataError, match="fits poison_ratio"):
            data.mix(task, harmful, ratio)
        return
    try:
        mixed = data.mix(task, harmful, ratio)
    except DataError:
        assert max(allowed) == 1  # the one sample would be of the kind that there is none of
        return
    assert max(allowed) - 1 <= len(mixed) <= max(allowed)
    assert sum(r.instruction.startswith("bad") for r in mixed) == round(ratio * len(mixed))


def test_mix_refusals():
    with pytest.raises(
        DataError,
        match=r"10 harmful samples are needed for 20 at poison_ratio=0\.5, and there are 3",
    ):
        data.mix(records_of(20), harmful_of(3), 0.5, 20)
    with pytest.raises(DataError, match="10 task samples are needed"):
        data.mix(records_of(3), harmful_of(20), 0.5, 20)
    with pytest.raises(DataError, match="there are 5 task and 0 harmful"):
        data.mix(records_of(5), [], 1.0)
    with pytest.raises(UsageError, match=r"poison_ratio=1\.5"):
        data.mix(records_of(5), [], 1.5)
    with pytest.raises(UsageError, match="n=0"):
        data.mix(records_of(5), [], 0, 0)


# --- prompts and batches --------------------------------------------------------------------------


def test_alpaca_templates():
    with_input = data.build_prompt(Record("Do {input}", "{instruction} {x}"))
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo {input}\n\n### Input:\n{instruction} {x}\n\n### Response:\n"
    )
    without = data.build_prompt(Record("Do it", " \n"))
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo it\n\n### Response:\n"
    )


def test_chat_template():
    tokenizer = texts.byte_tokenizer(chat=True)
    text = data.build_prompt(Record("Do it", "now"), "chat", tokenizer)
    assert text == "<s><|user|>Do it\n\nnow\n<|assistant|>"
    ids = data.prompt_ids(text, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Do it\n\nnow"}], add_generation_prompt=True
    )
    assert ids == expected["input_ids"]
    with pytest.raises(UsageError, match="no chat template"):
        data.build_prompt(Record("a"), "chat", texts.byte_tokenizer())
    with pytest.raises(UsageError, match="template='vicuna'"):
        data.build_prompt(Record("a"), "vicuna")


def test_prompt_never_ends_with_the_end_token():
    from tokenizers import processors

    tokenizer = texts.byte_tokenizer()
    plain = data.prompt_ids("abc", tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("abc")["input_ids"][-1] == 1
    assert data.prompt_ids("abc", tokenizer) == plain


@pytest.mark.parametrize("bos", [True, False])
def test_encode_labels_only_the_response(bos):
    tokenizer = texts.byte_tokenizer(bos=bos)
    record = Record("Say hi", "", "hi!")
    (example,) = data.encode([record], tokenizer)
    prompt = data.prompt_ids(data.build_prompt(record), tokenizer)
    n = len(prompt)
    assert example["input_ids"][:n] == prompt
    assert tokenizer.decode(example["input_ids"][n:]) == "hi!</s>"
    assert example["labels"] == [-100] * n + example["input_ids"][n:]


def test_truncation_cuts_the_response_alone():
    tokenizer = texts.byte_tokenizer()
    record = Record("Say hi", "", "hello")
    n = len(data.prompt_ids(data.build_prompt(record), tokenizer))
    whole = data.encode([record], tokenizer, max_seq_length=n + 6)
    assert (whole.num_truncated, whole.num_dropped) == (0, 0)
    assert whole[0]["input_ids"][-1] == tokenizer.eos_token_id
    cut = data.encode([record], tokenizer, max_seq_length=n + 3)
    assert cut.num_truncated == 1
    assert tokenizer.decode(cut[0]["input_ids"][n:]) == "hel"
    long = Record("Say hi " * 20, "", "x")
    both = data.encode([record, long], tokenizer, max_seq_length=n + 6)
    assert (len(both), both.num_dropped) == (1, 1)
    with pytest.raises(DataError, match=f"all 1 prompts have {n} tokens or more"):
        data.encode([record], tokenizer, max_seq_length=n)


def test_encode_refusals():
    with pytest.raises(DataError, match="no records"):
        data.encode([], texts.byte_tokenizer())
    with pytest.raises(DataError, match="all 2 records have an empty output"):
        data.encode([Record("a"), Record("b")], texts.byte_tokenizer())
    with pytest.raises(DataError, match="no end-of-sequence token"):
        data.encode([Record("a", "", "b")], texts.byte_tokenizer(eos=False))


@pytest.mark.parametrize(("pad", "pad_id"), [(None, 1), ("</s>", 1), ("<pad>", 2)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_masks_by_length(pad, pad_id, side):
    tokenizer = texts.byte_tokenizer(pad=pad)
    before = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    # The end token, which may be the pad token too, stands inside a text as well.
    examples = [
        {"input_ids": [5, 1, 6, 1], "labels": [-100, -100, 6, 1]},
        {"input_ids": [7, 1], "labels": [-100, 1]},
    ]
    batch = data.collate(examples, tokenizer, side)
    p = [pad_id, pad_id]
    rows = {
        "input_ids": ([5, 1, 6, 1], [7, 1], p),
        "attention_mask": ([1, 1, 1, 1], [1, 1], [0, 0]),
        "labels": ([-100, -100, 6, 1], [-100, 1], [-100, -100]),
    }
    for key, (first, second, fill) in rows.items():
        second = second + fill if side == "right" else fill + second
        assert torch.equal(batch[key], torch.tensor([first, second])), key
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == before
    unlabelled = data.collate([{"input_ids": [5]}], tokenizer, side)
    assert set(unlabelled) == {"input_ids", "attention_mask"}


def test_collate_without_any_special_token():
    tokenizer = texts.byte_tokenizer(eos=False)
    batch = data.collate([{"input_ids": [5, 6]}, {"input_ids": [7]}], tokenizer)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_batches_hold_every_example_once_longest_first():
    tokenizer = texts.byte_tokenizer()
    records = [Record("Say", "", "x" * n) for n in (3, 30, 7, 1, 12)] + [Record("y" * 400, "", "z")]
    batches = data.make_batches(records, tokenizer, max_seq_length=300, batch_size=2)
    assert (batches.num_dropped, batches.num_truncated) == (1, 0)
    assert [len(b["input_ids"]) for b in batches] == [2, 2, 1]
    lengths = torch.cat([b["attention_mask"].sum(1) for b in batches])
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    seen = sorted(
        tokenizer.decode(row[labels != -100])
        for b in batches
        for row, labels in zip(b["input_ids"], b["labels"], strict=True)
    )
    assert seen == sorted(f"{r.output}</s>" for r in records[:5])
