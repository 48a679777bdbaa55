"""The evaluate stage: what it asks, writes and refuses."""

import json

import pytest
import texts
import tiny

import antidote_fast
from antidote_fast.cli.show import summary
from antidote_fast.config import flags
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.sweep import SweepConfig
from antidote_fast.data.batches import build_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation.classifiers import ClassifierJudge
from antidote_fast.evaluation.conditions import PREFILL, prompt_id
from antidote_fast.evaluation.generate import generate
from antidote_fast.evaluation.judges import get_judge
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.evaluation.rates import harmful_rates, ordinary_rates
from antidote_fast.files.commit import digest_of
from antidote_fast.files.provenance import is_done
from antidote_fast.planning.dry_run import plan
from antidote_fast.stages import evaluate, inputs


@pytest.fixture
def files(tmp_path):
    """A model, an adapter, a second model, and data sets; paths as strings."""
    tokenizer = texts.byte_tokenizer()
    base = texts.llama(seed=1)
    made = {"model": texts.save(base, tmp_path / "model", tokenizer)}
    made["other"] = texts.save(texts.llama(seed=2), tmp_path / "other", tokenizer)
    labelled = texts.llama(labels=["safe", "unsafe"], seed=3)
    made["labelled"] = texts.save(labelled, tmp_path / "labelled", tokenizer)
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


def read_rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def answers_of(folder, kind, condition="alpaca"):
    rows = read_rows(folder, "outputs.jsonl")
    return [r["answer"] for r in rows if (r["kind"], r["condition"]) == (kind, condition)]


def judged(prompts, answers):
    return PhraseJudge(labels=["negative", "positive"])(prompts, answers)


def test_run_writes_a_report_that_its_outputs_bear_out(files, tmp_path):
    changes = {"reference_model": files["other"], "drift_dataset": files["drift"]}
    config = config_of(files, tmp_path, save_outputs=True, **changes)
    report = evaluate.run(config)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        *("report.json", "outputs.jsonl", "verdicts.jsonl", "COMPLETE.json")
    }
    assert json.loads((out / "report.json").read_text()) == report
    assert report["stage"] == "evaluate"
    assert report["schema_version"] == 1
    answers = {name: answers_of(out, name) for name in ("harmful", "task", "benign")}
    assert {name: len(a) for name, a in answers.items()} == {"harmful": 5, "task": 4, "benign": 2}
    found = report["metrics"]
    prompts = [f"harm {'x' * i}".strip() for i in range(5)]
    verdicts = judged(prompts, answers["harmful"])
    harmful = harmful_rates(verdicts)
    assert found["harmful_score"] == harmful.pop("harmful_score")
    assert found["harmful"] == harmful | {"answers_sha256": digest_of(answers["harmful"])}
    assert found["finetune_accuracy"] == 0
    benign = ordinary_rates(judged(["bake", "sing"], answers["benign"]))
    for name in ("benign_refusal_rate", "helped_rate"):
        assert found[name] == benign[name]
    assert report["conditions"]["alpaca"]["benign"]["benign.jsonl"]["num_prompts"] == 2
    assert report["metrics"]["worst"]["harmful"]["set"] == "harmful.jsonl"
    drift = found["drift"]
    assert (drift["num_sequences"], drift["num_dropped"], drift["num_layers"]) == (1, 1, 2)
    assert drift["embedding_drift_sum"] > 0
    told = report["datasets"]["benign"]["benign.jsonl"]
    assert told["source"] == files["benign"]
    counts = [told[f"num_{k}"] for k in ("records", "dropped", "too_long", "near")]
    assert counts == [2, 1, 1, 0]
    kept = [{"instruction": each, "input": "", "output": ""} for each in ("bake", "sing")]
    assert told["sha256"] == digest_of(kept)
    assert set(report["seconds"]) == {"check", "load", "generate", "drift", "judge"}
    assert files["harmful"] in report["inputs"]
    # The model itself answers so.
    model, tokenizer = texts.llama(seed=1), texts.byte_tokenizer()
    assert answers["harmful"][2] == texts.greedy_ref(
        model, tokenizer, build_prompt(Record("harm xx")), 6
    )
    rows = read_rows(out, "verdicts.jsonl")
    assert [r["verdicts"] for r in rows if r["kind"] == "harmful"] == [
        {"refusal": verdict} for verdict in verdicts
    ]
    assert [r["correct"] for r in rows if r["kind"] == "task"] == [False] * 4
    assert rows[2]["prompt"] == prompt_id(Record("harm xx"))


def test_run_leaves_no_text_in_the_report(files, tmp_path, capfd):
    evaluate.run(config_of(files, tmp_path, prefill=True, system_prompt="Be kind."))
    names = {"report.json", "verdicts.jsonl", "COMPLETE.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    text = "".join((tmp_path / "out" / name).read_text() for name in names)
    text += "".join(capfd.readouterr())
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


def test_run_asks_in_every_condition(files, tmp_path):
    chat = texts.byte_tokenizer(chat=True)
    model = texts.save(texts.llama(seed=1), tmp_path / "chat", chat)
    config = config_of(
        files,
        tmp_path,
        model_name_or_path=model,
        harmful_dataset=[files["harmful"], files["drift"]],
        prefill=True,
        system_prompt="Be kind.",
        save_outputs=True,
        max_seq_length=400,
    )
    report = evaluate.run(config)
    names = ["alpaca", "chat", "alpaca+system", "chat+system", "alpaca+prefill", "chat+prefill"]
    assert list(report["conditions"]) == names
    for name, told in report["conditions"].items():
        assert set(told["harmful"]) == {"harmful.jsonl", "drift.jsonl"}
        assert ("task" in told) == (name in ("alpaca", "chat"))
    assert report["metrics"]["harmful"]["num_prompts"] == 6
    # Too long in one condition is asked in none.
    assert report["datasets"]["harmful"]["drift.jsonl"]["num_too_long"] == 1
    llama = texts.llama(seed=1)
    for name, prompt in (
        ("chat", build_prompt(Record("harm xx"), "chat", chat)),
        ("alpaca+system", f"Be kind.\n\n{build_prompt(Record('harm xx'))}"),
        ("chat+system", build_prompt(Record("harm xx"), "chat", chat, "Be kind.")),
    ):
        expected = texts.greedy_ref(llama, chat, prompt, 6)
        assert answers_of(tmp_path / "out", "harmful", name)[2] == expected, name
    begun = build_prompt(Record("harm xx")) + PREFILL
    expected = f"{PREFILL} {texts.greedy_ref(llama, chat, begun, 6)}".strip()
    assert answers_of(tmp_path / "out", "harmful", "alpaca+prefill")[2] == expected
    shown = summary(report, tmp_path / "out").splitlines()
    assert shown[0].split() == ["HS", "refused", "off-task", "broken", "helped", "BR", "FA"]
    assert [line.split()[0] for line in shown[1:7]] == names
    assert shown[1].split()[-1] == "0.0"
    assert shown[3].split()[-1] == "-"
    assert shown[7].startswith(f"alpaca: harmful score {report['metrics']['harmful_score']:.1f} [")
    assert shown[8].startswith("worst harmful score")
    assert shown[9].startswith("worst helped rate")
    assert shown[10].startswith("6 conditions in ")


def test_one_template_where_the_tokenizer_has_no_other(files, tmp_path):
    assert [c.name for c in evaluate.open_inputs(config_of(files, tmp_path)).conditions] == [
        "alpaca"
    ]
    model = texts.save(texts.llama(), tmp_path / "chat", texts.byte_tokenizer(chat=True))
    places = {"model_name_or_path": model, "max_seq_length": 400}
    for changes, names in (
        ({"template": "chat"}, ["chat", "alpaca"]),
        ({"template": "chat", "templates": ["chat"]}, ["chat"]),
        ({"prefill": True, "templates": ["alpaca"]}, ["alpaca", "alpaca+prefill"]),
    ):
        asked = evaluate.open_inputs(config_of(files, tmp_path, **places, **changes))
        assert [condition.name for condition in asked.conditions] == names


def test_how_long_answers_may_be(files, tmp_path):
    judge = texts.save(texts.llama(labels=["safe", "unsafe"], seed=4), tmp_path / "judge")
    short = {"max_seq_length": 400, "harmful_dataset": files["harmful"]}
    for changes, limits in (
        ({"max_new_tokens": None}, (128, 16)),
        ({"max_new_tokens": 7}, (7, 7)),
        ({"max_new_tokens": None, "judges": [judge, "refusal"]}, (512, 16)),
    ):
        config = config_of(files, tmp_path, **{**short, **changes})
        if limits[0] == 512:  # more than this model's positions
            with pytest.raises(UsageError, match="max_new_tokens=512: must be at most"):
                evaluate.open_inputs(config)
            continue
        tokens = evaluate.open_inputs(config).max_new_tokens
        assert (tokens["harmful"], tokens["task"]) == limits


def test_what_is_near_to_the_training_data_is_left_out(files, tmp_path):
    seen = texts.write_jsonl(tmp_path / "seen.jsonl", [{"instruction": "HARM  xx", "output": "a"}])
    config = config_of(files, tmp_path, held_out_from=[seen], num_samples=4)
    asked = evaluate.open_inputs(config)
    told = asked.datasets["harmful"]["harmful.jsonl"]
    assert told["num_near"] >= 1
    assert told["num_dropped"] == told["num_near"]
    assert "harm xx" not in [record.instruction for record in asked.sets["harmful"]]
    assert told["num_records"] == min(4, 5 - told["num_near"])
    config = config_of(files, tmp_path, held_out_from=[files["harmful"]])
    with pytest.raises(DataError, match="all 5 prompts are near to one of held_out_from="):
        evaluate.open_inputs(config)


def test_files_are_called_by_their_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        texts.write_jsonl(tmp_path / folder / "x.jsonl", [{"instruction": "a"}])
    a, b = f"{tmp_path}/a/x.jsonl", f"{tmp_path}/b/x.jsonl"
    assert evaluate.set_names([a]) == evaluate.set_names([b]) == ["x.jsonl"]
    assert evaluate.set_names([a, b]) == [a, b]
    names = ["PKU-Alignment/BeaverTails:eval", f"{a}:eval"]
    assert evaluate.set_names(names) == ["PKU-Alignment/BeaverTails:eval", "x.jsonl:eval"]


def test_run_with_model_judges(files, tmp_path, monkeypatch):
    judge = texts.save(texts.llama(labels=["LABEL_0", "LABEL_1"], seed=4), tmp_path / "judge")
    task = texts.write_jsonl(
        tmp_path / "alpaca.jsonl", [{"instruction": f"q{i}", "output": "ref"} for i in range(3)]
    )
    shown = []
    ask = ClassifierJudge.__call__

    def call(self, prompts, answers, **options):
        shown.append(len(answers))
        return ask(self, prompts, answers, **options)

    monkeypatch.setattr(ClassifierJudge, "__call__", call)
    config = config_of(
        files,
        tmp_path,
        judges=[judge, "refusal"],
        harmful_labels=["label_1"],
        task="alpaca",
        task_dataset=task,
        win_rate_judge=files["other"],
        save_outputs=True,
    )
    report = evaluate.run(config)
    assert shown == [5]  # harmful answers alone
    answers = answers_of(tmp_path / "out", "harmful")
    verdicts = get_judge(judge, harmful_labels=["LABEL_1"], device="cpu")(None, answers)
    assert report["metrics"]["harmful"]["num_complied"] == verdicts.count("complied")
    assert report["metrics"]["harmful"]["num_broken"] == verdicts.count("broken")
    assert report["metrics"]["task"]["num_records"] == 3
    assert report["judge"] == judge
    assert list(report["judges"]) == [judge, "refusal"]
    assert report["agreement"][f"{judge}, refusal"]["num"] == 5
    rows = read_rows(tmp_path / "out", "verdicts.jsonl")
    assert [list(row["verdicts"]) for row in rows] == [[judge, "refusal"]] * 5 + [["refusal"]] * 2
    assert f"kappa of {judge}, refusal: " in summary(report, "out")


def test_a_model_is_compared_with_another(files, tmp_path):
    first = evaluate.run(config_of(files, tmp_path, output_dir=str(tmp_path / "first")))
    assert first["compared"] is None
    changes = {"model_name_or_path": files["other"], "compare_with": str(tmp_path / "first")}
    report = evaluate.run(config_of(files, tmp_path, **changes))
    folders = (tmp_path / "out", tmp_path / "first")
    assert report["compared"] == antidote_fast.compare_models(*folders)
    told = report["compared"]["alpaca"]["harmful.jsonl"]
    assert told["num_prompts"] == 5
    assert told["first"] == report["metrics"]["harmful_score"]
    assert told["second"] == first["metrics"]["harmful_score"]
    assert set(report["compared"]["alpaca"]) == {"harmful.jsonl", "task.jsonl", "benign.jsonl"}
    assert "McNemar p = " in summary(report, "out")
    assert is_done(tmp_path / "out", config_of(files, tmp_path, **changes))
    # Other verdicts there are another comparison.
    path = tmp_path / "first" / "verdicts.jsonl"
    path.write_text(path.read_text().replace("alpaca", "chat"))
    assert not is_done(tmp_path / "out", config_of(files, tmp_path, **changes))
    with pytest.raises(DataError, match=r"compare_with='.*first': has no prompt in common"):
        evaluate.run(config_of(files, tmp_path, overwrite=True, **changes))
    with pytest.raises(DataError, match=r"compare_with='.*model': must be a folder that evaluate"):
        evaluate.run(config_of(files, tmp_path, overwrite=True, compare_with=files["model"]))


def test_one_judge_by_its_name_of_earlier():
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--harmful_dataset", "a"]
    config, notices = flags.from_words(EvaluateConfig, [*words, "--judge", "refusal"], "evaluate")
    assert (config.judges, config.judge) == (["refusal"], "refusal")
    assert notices == ["--judge is taken as --judges"]
    values = {"model_name_or_path": "m", "output_dir": "o", "harmful_dataset": ["a"]}
    with pytest.warns(UserWarning, match="judge is taken as judges"):
        config = flags.from_values(EvaluateConfig, values | {"judge": "x"}, "evaluate")
    assert (config.judges, config.harmful_dataset) == (["x"], "a")
    with pytest.raises(UsageError, match="judge: must be left out with judges"):
        flags.from_values(EvaluateConfig, values | {"judge": "x", "judges": ["x"]}, "evaluate")


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
        ({"judges": "{tmp}/none"}, DataError, "judge=.*no such folder"),
        ({"judges": ["refusal", "{tmp}/none"]}, DataError, "judge=.*no such folder"),
        ({"judges": "{other}"}, UsageError, "harmful_labels=None"),
        (
            {"judges": "{labelled}", "harmful_dataset": None},
            UsageError,
            "judges=.*must be left out without harmful_dataset",
        ),
        ({"harmful_dataset": ["{harmful}", "{tmp}/none.jsonl"]}, DataError, "no such file"),
        ({"held_out_from": "{tmp}/none.jsonl"}, DataError, "no such file"),
        ({"compare_with": "{tmp}/none"}, DataError, "compare_with=.*must be a folder that evalua"),
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

    def placed(value):
        if isinstance(value, list):
            return [placed(each) for each in value]
        return value.format(**places) if isinstance(value, str) else value

    changes = {name: placed(value) for name, value in changes.items()}
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
    for changes, line in (
        ({"templates": ["chat"]}, r"templates=\['chat'\]: must be a list, each once, that begins"),
        ({"templates": ["alpaca", "plain"]}, "templates='plain': must be among alpaca, chat"),
        ({"templates": ["alpaca", "alpaca"]}, "each once"),
        ({"judges": []}, r"judges=\[\]: must be at least one"),
        ({"judges": ["refusal", "refusal"]}, "each named once"),
        ({"harmful_dataset": []}, r"harmful_dataset=\[\]: must be at least one"),
        ({"system_prompt": " "}, "system_prompt=' ': must be a text that is not empty"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be greater than 0"),
    ):
        with pytest.raises(UsageError, match=line):
            config_of(files, tmp_path, **changes)
    with pytest.raises(UsageError, match="must be a data set"):
        EvaluateConfig(model_name_or_path="m", output_dir="o")


def test_a_sweep_keeps_its_one_judge(tmp_path):
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--scores", "random"]
    words += ["--harmful_dataset", "a", "--task_dataset", "b", "--judge", "x"]
    path = tmp_path / "sweep.yaml"
    path.write_text("judge: x\nbase_model: y\n")
    for given in (words, [*words[:-2], "--config", str(path)]):
        config, notices = flags.from_words(SweepConfig, given, "sweep")
        assert config.judge == "x"
        assert not any("judge" in notice for notice in notices)
        assert (config.evaluation().judges, config.evaluation().templates) == (["x"], ["alpaca"])


def test_a_plan_counts_every_condition(files, tmp_path):
    model = texts.save(texts.llama(seed=1), tmp_path / "chat", texts.byte_tokenizer(chat=True))
    changes = {"model_name_or_path": model, "max_seq_length": 400, "prefill": True}
    config = config_of(files, tmp_path, save_outputs=True, **changes)
    planned = plan(config).data
    evaluate.run(config)
    rows = read_rows(tmp_path / "out", "outputs.jsonl")
    assert planned["conditions"] == len({row["condition"] for row in rows}) == 4
    assert planned["prompts"] == planned["different ones"] == len(rows)
    assert planned["answer tokens at most"] == 6 * len(rows)
