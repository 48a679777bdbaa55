"""Judges of several kinds in one evaluation, and what a judge behind a server has said."""

import json

import chat_server
import pytest
import texts

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.sweep import SweepConfig
from antidote_fast.errors import AntidoteError, UsageError
from antidote_fast.files.provenance import is_done
from antidote_fast.planning.dry_run import plan
from antidote_fast.stages import evaluate

URL = "http://127.0.0.1:9/v1"  # where nobody is


@pytest.fixture
def values(tmp_path):
    """Fields of an evaluation, by name."""
    prompts = [{"instruction": f"how {'x' * i}"} for i in range(5)]
    return {
        "model_name_or_path": texts.save(
            texts.llama(seed=1), tmp_path / "model", texts.byte_tokenizer()
        ),
        "output_dir": str(tmp_path / "out"),
        "harmful_dataset": texts.write_jsonl(tmp_path / "harmful.jsonl", prompts),
        "max_seq_length": 310,
        "max_new_tokens": 6,
        "device": "cpu",
    }


def classifier(folder, labels=("LABEL_0", "LABEL_1")):
    model = texts.llama(labels=list(labels), seed=4)
    return texts.save(model, folder, texts.byte_tokenizer())


def test_each_judge_takes_the_options_of_its_kind(values, tmp_path):
    labelled = classifier(tmp_path / "labelled")
    beaver = classifier(tmp_path / "beaver", [f"c{i}" for i in range(14)])
    names = ["refusal", labelled, f"beaver-dam:{beaver}", "llama-guard", "qwen3guard:own"]
    with chat_server.stub(lambda *_: "Safety: Safe\nRefusal: No", models=("m", "own")) as server:
        given = {"harmful_labels": ["LABEL_1"], "judge_url": server.url, "judge_model": "m"}
        asked = evaluate.open_inputs(EvaluateConfig(**values, judges=names, **given))
    found = {
        name: (options["harmful_labels"], options["url"], options["model"])
        for name, options in asked.judges.items()
    }
    assert found == {
        "refusal": (None, None, None),
        labelled: (["LABEL_1"], None, None),
        f"beaver-dam:{beaver}": (None, None, None),
        "llama-guard": (None, server.url, "m"),
        "qwen3guard:own": (None, server.url, None),
    }


@pytest.mark.parametrize(
    ("judges", "given", "line"),
    [
        (["refusal", "beaver-dam"], {"judge_url": URL}, "judge='refusal': must be one of llama-gu"),
        (["llama-guard", "refusal"], {"harmful_labels": ["x"]}, r"harmful_labels=\['x'\]: must be"),
        (["refusal", "llama-guard"], {"judge_model": "m"}, "judge_model='m': must be left out wit"),
        (
            ["refusal", "llama-guard:a"],
            {"judge_url": URL, "judge_model": "m"},
            "judge_model='m': must be left out with judge='llama-guard:a'",
        ),
        (["refusal"], {"judge_cache": "{tmp}/x"}, "judge_cache=.* left out without judge_url"),
    ],
)
def test_an_option_that_is_for_none_of_them_is_refused(values, tmp_path, judges, given, line):
    places = {
        name: v.format(tmp=tmp_path) if name == "judge_cache" else v for name, v in given.items()
    }
    with pytest.raises(UsageError, match=line):
        evaluate.open_inputs(EvaluateConfig(**values, judges=judges, **places))


def test_options_of_judges_without_harmful_prompts(values):
    values |= {"task_dataset": values["harmful_dataset"], "harmful_dataset": None}
    for name, value in {"harmful_labels": ["x"], "judge_url": URL, "judge_model": "m"}.items():
        with pytest.raises(UsageError, match=f"{name}=.*must be left out without harmful_dataset"):
            evaluate.open_inputs(EvaluateConfig(**values, **{name: value}))


def test_an_evaluation_that_was_interrupted_asks_the_server_what_is_missing(values, tmp_path):
    path = tmp_path / "said.jsonl"
    values |= {"judges": ["refusal", "llama-guard"], "judge_model": "m", "judge_cache": str(path)}
    replies = []

    def answer(_, body):
        replies.append(body)
        return "unsafe" if len(replies) != 3 else "what"

    with chat_server.stub(answer) as server:
        config = EvaluateConfig(**values, judge_url=server.url)
        with pytest.raises(AntidoteError, match="holds none of its words"):
            evaluate.run(config)
        assert not (tmp_path / "out").exists()
        kept = path.read_text().count("key")
        before = len(replies)
        report = evaluate.run(config)
        assert report["judges"]["llama-guard"]["num_complied"] == 5
        # A request of the first run may arrive late; it is among those that are asked again.
        assert len({json.dumps(body) for body in replies[before:]}) == 5 - kept
        assert path.read_text().count("key") == 5
        assert "how x" not in path.read_text()
        # Where it is kept decides nothing.
        other = EvaluateConfig(**values | {"judge_cache": None}, judge_url=server.url)
        assert is_done(tmp_path / "out", other)


def test_a_place_for_readings_that_would_be_lost_is_refused(values, tmp_path):
    values |= {"judges": "llama-guard", "judge_model": "m"}
    with chat_server.stub(lambda *_: "safe") as server:
        for place, line in (
            ("{tmp}/none/x.jsonl", "must be a file, which need not be there, in a folder that is"),
            ("{tmp}", "must be a file, which need not be there, in a folder that is"),
            ("{tmp}/out/x.jsonl", "must be outside of output_dir="),
        ):
            (tmp_path / "out").mkdir(exist_ok=True)
            cache = place.format(tmp=tmp_path)
            config = EvaluateConfig(**values, judge_url=server.url, judge_cache=cache)
            with pytest.raises(UsageError, match=f"judge_cache='{cache}': {line}"):
                evaluate.open_inputs(config)


def test_a_sweep_asks_its_judge_at_a_server_too():
    config = SweepConfig(
        model_name_or_path="m",
        output_dir="o",
        scores=["random"],
        harmful_dataset="a",
        task_dataset="b",
        judge="llama-guard",
        judge_url=URL,
        judge_model="served",
        judge_cache="said.jsonl",
    )
    told = config.evaluation()
    assert (told.judges, told.judge_url, told.judge_model) == (["llama-guard"], URL, "served")
    assert told.judge_cache == "said.jsonl"


def test_a_plan_says_where_a_judge_takes_memory(values, tmp_path):
    note = "the judge, loaded when the model has answered, is not counted"
    with chat_server.stub(lambda *_: "safe") as server:
        there = {"judge_url": server.url, "judge_model": "m"}
        asked = EvaluateConfig(**values, judges=["refusal", "llama-guard"], **there)
        assert note not in plan(asked).notes
        judges = [classifier(tmp_path / "labelled", ["safe", "unsafe"]), "llama-guard"]
        assert note in plan(EvaluateConfig(**values, judges=judges, **there)).notes
