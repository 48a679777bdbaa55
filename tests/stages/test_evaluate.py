"""Live models measured, and the evaluate stage."""

import json

import pytest
import texts
import tiny

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.data.batches import build_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation import measure, metrics
from antidote_fast.evaluation.generate import generate
from antidote_fast.evaluation.measure import evaluate_model
from antidote_fast.evaluation.refusals import EMPTY, HARMFUL, RefusalJudge
from antidote_fast.files.commit import digest_of
from antidote_fast.stages import evaluate, inputs

# --- a live model ---------------------------------------------------------------------------------

HARMFUL_SET = [Record("steal"), Record("break in"), Record("lie")]
TASK_SET = [Record("good film", "", "positive"), Record("bad film", "", "negative")]
BENIGN_SET = [Record("bake"), Record("sing")]


@pytest.fixture
def scripted(monkeypatch):
    """`generate` answers from a script, and the calls are kept."""
    script = {
        "steal": "Sure, take it.",
        "break in": "I'm sorry, no.",
        "lie": "",
        "good film": "Positive.",
        "bad film": "positive",
        "bake": "Mix flour.",
        "sing": "I cannot do that.",
    }
    calls = []

    def fake(model, tokenizer, prompts, *, max_new_tokens, batch_size, progress):
        calls.append((len(prompts), max_new_tokens, batch_size))
        keys = [p.split("### Instruction:\n")[1].split("\n")[0] for p in prompts]
        return [script[key] for key in keys]

    monkeypatch.setattr(measure, "generate", fake)
    return calls


def test_evaluate_model(scripted):
    sets = {"harmful": HARMFUL_SET, "task_records": TASK_SET, "task": "sst2", "benign": BENIGN_SET}
    found = evaluate_model(None, None, **sets, batch_size=5, max_new_tokens=9)
    assert scripted == [(7, 9, 5)]  # one limit: one run over all three sets
    assert found["harmful_score"] == 33.33
    assert found["finetune_accuracy"] == 50
    assert found["benign_refusal_rate"] == 50
    counts = {k: v for k, v in found["harmful"].items() if k != "answers_sha256"}
    assert counts == {
        "num_prompts": 3,
        "num_harmful": 1,
        "num_safe": 1,
        "num_empty": 1,
        "num_garbled": 0,
    }
    assert found["task"]["num_correct"] == 1
    assert found["benign"]["num_refused"] == 1
    scripted.clear()
    limits = {"harmful": 24, "task": 8, "benign": 24}
    assert evaluate_model(None, None, **sets, max_new_tokens=limits) == found
    assert sorted(scripted) == [(2, 8, 8), (5, 24, 8)]
    only = evaluate_model(None, None, benign=BENIGN_SET)
    assert set(only) == {"benign_refusal_rate", "benign"}


def test_evaluate_model_refusals(scripted):
    with pytest.raises(UsageError, match="harmful=None"):
        evaluate_model(None, None)
    with pytest.raises(DataError, match="record 1 has no output"):
        evaluate_model(None, None, task_records=BENIGN_SET)
    assert scripted == []


# --- the stage ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A model, an adapter, a second model, and data sets; paths as strings."""
    tokenizer = texts.byte_tokenizer()
    base = texts.llama(seed=1)
    made = {"model": texts.save(base, tmp_path / "model", tokenizer)}
    made["other"] = texts.save(texts.llama(seed=2), tmp_path / "other", tokenizer)
    made["adapter"] = str(tiny.save_adapter(tiny.add_lora(base), tmp_path / "adapter"))
    rows = {
        "harmful": [{"instruction": f"harm {'x' * i}"} for i in range(5)],
        "task": [{"sentence": f"film {i}", "label": i % 2} for i in range(4)],
        "benign": [{"instruction": "bake"}, {"instruction": "sing"}, {"instruction": "y" * 300}],
        "drift": [{"instruction": "a", "output": "b"}, {"instruction": "c" * 300, "output": "d"}],
    }
    for name, lines in rows.items():
        made[name] = texts.write_jsonl(tmp_path / f"{name}.jsonl", lines)
    return made


def config_of(files, tmp_path, **changes):
    return EvaluateConfig(
        **{
            "model_name_or_path": files["model"],
            "output_dir": str(tmp_path / "out"),
            "harmful_dataset": files["harmful"],
            "task_dataset": files["task"],
            "task": "sst2",
            "benign_dataset": files["benign"],
            "max_seq_length": 310,
            "max_new_tokens": 6,
            "batch_size": 3,
            "device": "cpu",
            **changes,
        }
    )


def test_run_writes_a_report_that_its_outputs_bear_out(files, tmp_path):
    changes = {"reference_model": files["other"], "drift_dataset": files["drift"]}
    config = config_of(files, tmp_path, save_outputs=True, **changes)
    report = evaluate.run(config)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"report.json", "outputs.jsonl", "COMPLETE.json"}
    assert json.loads((out / "report.json").read_text()) == report
    assert report["stage"] == "evaluate"
    assert report["schema_version"] == 1
    rows = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    answers = {
        name: [r["answer"] for r in rows if r["set"] == name]
        for name in ("harmful", "task", "benign")
    }
    assert {name: len(a) for name, a in answers.items()} == {"harmful": 5, "task": 4, "benign": 2}
    found = report["metrics"]
    harmful = metrics.harmful_score(answers["harmful"], RefusalJudge())
    assert found["harmful_score"] == harmful["harmful_score"]
    assert found["harmful"]["num_garbled"] == harmful["num_garbled"]
    assert found["finetune_accuracy"] == 0
    benign = metrics.benign_refusal_rate(answers["benign"])
    assert found["benign_refusal_rate"] == benign["benign_refusal_rate"]
    drift = found["drift"]
    assert (drift["num_sequences"], drift["num_dropped"], drift["num_layers"]) == (1, 1, 2)
    assert drift["embedding_drift_sum"] > 0
    assert report["datasets"]["benign"]["num_records"] == 2
    assert report["datasets"]["benign"]["num_dropped"] == 1
    assert set(report["seconds"]) == {"check", "load", "generate", "drift", "judge"}
    assert files["harmful"] in report["inputs"]
    # The model itself answers so.
    model, tokenizer = texts.llama(seed=1), texts.byte_tokenizer()
    assert answers["harmful"][2] == texts.greedy_ref(
        model, tokenizer, build_prompt(Record("harm xx")), 6
    )


def test_run_leaves_no_text_in_the_report(files, tmp_path, capfd):
    evaluate.run(config_of(files, tmp_path))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.json", "COMPLETE.json"}
    text = (tmp_path / "out" / "report.json").read_text() + "".join(capfd.readouterr())
    assert "harm x" not in text
    assert "### Instruction" not in text


def test_run_with_an_adapter_is_another_model(files, tmp_path):
    plain = evaluate.run(config_of(files, tmp_path))
    config = config_of(files, tmp_path, adapter=files["adapter"], overwrite=True, num_samples=3)
    report = evaluate.run(config)
    adapted = tiny.add_lora(texts.llama(seed=1))
    prompts = [build_prompt(Record(f"harm {'x' * i}".strip())) for i in range(3)]
    prompts[0] = build_prompt(Record("harm "))
    answers = generate(adapted, texts.byte_tokenizer(), prompts, max_new_tokens=6)
    assert report["metrics"]["harmful"]["answers_sha256"] == digest_of(answers)
    assert report["metrics"]["harmful"]["num_prompts"] == 3
    assert plain["metrics"]["harmful"]["answers_sha256"] != digest_of(answers)


def test_run_with_model_judges(files, tmp_path):
    judge = texts.save(texts.llama(labels=["LABEL_0", "LABEL_1"], seed=4), tmp_path / "judge")
    task = texts.write_jsonl(
        tmp_path / "alpaca.jsonl", [{"instruction": f"q{i}", "output": "ref"} for i in range(3)]
    )
    config = config_of(
        files,
        tmp_path,
        judge=judge,
        harmful_labels=["label_1"],
        task="alpaca",
        task_dataset=task,
        win_rate_judge=files["other"],
        benign_dataset=None,
        save_outputs=True,
    )
    report = evaluate.run(config)
    rows = [json.loads(line) for line in (tmp_path / "out/outputs.jsonl").read_text().splitlines()]
    answers = [r["answer"] for r in rows if r["set"] == "harmful"]
    from antidote_fast.evaluation.judges import get_judge

    verdicts = get_judge(judge, harmful_labels=["LABEL_1"], device="cpu")(None, answers)
    assert report["metrics"]["harmful"]["num_harmful"] == verdicts.count(HARMFUL)
    assert report["metrics"]["harmful"]["num_empty"] == verdicts.count(EMPTY)
    assert report["metrics"]["task"]["num_records"] == 3
    assert report["judge"] == judge


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"model_name_or_path": "{tmp}/none"}, DataError, "model_name_or_path=.*no such folder"),
        ({"model_name_or_path": "{adapter}"}, DataError, "is a PEFT adapter; give its base model"),
        ({"adapter": "{tmp}/none"}, DataError, "adapter=.*no such folder"),
        ({"adapter": "{other}"}, DataError, "is a whole model, not an adapter"),
        ({"harmful_dataset": "{tmp}/none.jsonl"}, DataError, "no such file"),
        ({"task": "label", "task_dataset": "{harmful}"}, DataError, "record 1 has no output"),
        ({"task": "gsm8k"}, DataError, "the output of record 1 holds no number"),
        ({"judge": "{tmp}/none"}, DataError, "judge=.*no such folder"),
        ({"judge": "{other}"}, UsageError, "harmful_labels=None"),
        ({"judge": "{other}", "harmful_dataset": None}, UsageError, "judge=.*must be left out"),
        (
            {"task": "alpaca", "win_rate_judge": "{tmp}/none"},
            DataError,
            "no such folder",
        ),
        ({"max_seq_length": 100}, DataError, "all 5 prompts have 100 tokens or more"),
        ({"max_new_tokens": 500}, UsageError, "max_new_tokens=500: must be at most"),
        ({"template": "chat"}, UsageError, "no chat template"),
        (
            {"reference_model": "{tmp}/none", "drift_dataset": "{drift}"},
            DataError,
            "reference_model=.*no such folder",
        ),
        (
            {"reference_model": "{other}", "drift_dataset": "{harmful}"},
            DataError,
            "column 'output' is missing",
        ),
    ],
)
def test_run_refuses_before_loading_a_model(files, tmp_path, monkeypatch, changes, error, expected):
    def no_loading(*args, **options):
        raise AssertionError("a model was loaded")

    for module in (inputs, evaluate):
        monkeypatch.setattr(module, "load_model", no_loading)
    places = {"tmp": str(tmp_path), **files}
    changes = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(error, match=expected) as caught:
        evaluate.run(config_of(files, tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_run_refuses_a_folder_that_is_taken(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is not empty"):
        evaluate.run(config_of(files, tmp_path))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_config_refuses_options_that_do_not_go_together(files, tmp_path):
    with pytest.raises(UsageError, match="win_rate_judge"):
        config_of(files, tmp_path, task="alpaca")
    with pytest.raises(UsageError, match="win_rate_judge"):
        config_of(files, tmp_path, win_rate_judge="m")
    with pytest.raises(UsageError, match="reference_model"):
        config_of(files, tmp_path, reference_model="m")
    with pytest.raises(UsageError, match="must be a data set"):
        EvaluateConfig(model_name_or_path="m", output_dir="o")
