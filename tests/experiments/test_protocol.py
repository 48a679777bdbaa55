"""The paper's protocol with its real names, answered by a hub of tiny models and data."""

from pathlib import Path

import pytest
import texts

from antidote_fast import EvaluateConfig, UsageError
from antidote_fast.config import flags
from antidote_fast.config.experiment import ExperimentConfig
from antidote_fast.data import hub
from antidote_fast.evaluation.classifiers import BEAVER_DAM
from antidote_fast.evaluation.judges import get_judge
from antidote_fast.experiments import experiment, tables
from antidote_fast.stages import evaluate

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
BEAVER_LABELS = [f"harm_{i}" for i in range(14)]
TRAIN, TEST = 24, 6


def rows_of(path, split):
    """What the hub's data sets hold, by their own columns; train and test share no prompt."""
    count, start = (TEST, 1000) if "test" in split or "validation" in split else (TRAIN, 0)
    numbers = range(start, start + count)
    if path == "PKU-Alignment/BeaverTails":
        # 5000 unsafe rows belong to the attack, the ones after them to the defender.
        count = 10_100 if split == "30k_train" else 2 * TEST
        rows = texts.beavertails_rows(count)
        return rows if split == "30k_train" else [r | {"prompt": "held out"} for r in rows]
    if path == "stanfordnlp/sst2":
        return [{"sentence": f"film {i}", "label": i % 2} for i in numbers]
    if path == "fancyzhang/ag_news":
        return [{"text": f"news {i}", "label": i % 4} for i in numbers]
    if path == "openai/gsm8k":
        return [{"question": f"{i}+1?", "answer": f"so #### {i + 1}"} for i in numbers]
    assert path == "json"  # alpaca_eval's file
    return [{"instruction": f"tell {i}", "output": f"story {i}"} for i in range(693)]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A hub whose models are tiny and whose data sets are short; returns what was asked of it."""
    import datasets
    import huggingface_hub

    asked = {"models": set(), "data": set()}
    causal = texts.save(texts.llama(positions=1024), tmp_path / "causal")
    beaver = texts.llama(labels=BEAVER_LABELS, problem_type="multi_label_classification", seed=3)
    classifier = texts.save(beaver, tmp_path / "beaver")

    def snapshot_download(name, **options):
        asked["models"].add(name)
        return classifier if name == BEAVER_DAM else causal

    def load_dataset(path, config=None, *, split, data_files=None):
        asked["data"].add((path, config, split))
        rows = datasets.Dataset.from_list(rows_of(path, split))
        if data_files is None:
            return rows
        # The real file is longer than the 122 that are held out of it.
        held_out = len(rows) - 10
        return rows.select(
            range(held_out) if split == "train[:-122]" else range(held_out, len(rows))
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_probe_hub", lambda path: None)
    return asked


SMALL = [
    *("--dtype", "float32", "--device", "cpu"),
    *("--align.num_train_samples", "6", "--align.num_train_epochs", "1", "--align.lora_r", "2"),
    *("--finetune.num_train_epochs", "1", "--finetune.lora_r", "2"),
    *("--finetune.num_train_samples", "10", "--prune.num_calibration_samples", "4"),
    *("--evaluate.num_samples", "6", "--evaluate.max_new_tokens", "3"),
]


def run(name, tmp_path, *words):
    places = ["--output_dir", str(tmp_path / "out"), "--stages", str(tmp_path / "stages")]
    argv = [str(EXPERIMENTS / f"{name}.yaml"), *SMALL, *places]
    config, _ = flags.from_words(ExperimentConfig, [*argv, *words], "experiment")
    report = experiment.run(config)
    assert not report["failed"]
    return tables.read_csv(tmp_path / "out/rows.csv")


def test_the_four_tasks_of_table_5_from_its_file(stand_ins, tmp_path, monkeypatch):
    judged = []
    judge = get_judge

    def noted(name, **options):
        judged.append(name)
        return judge(name, **options)

    monkeypatch.setattr(evaluate, "get_judge", noted)
    rows = run("t5", tmp_path, "--defenses", "sft", "antidote")
    assert [(row["defense"], row["task"]) for row in rows] == [
        (defense, task)
        for defense in ("clean", "sft", "antidote")
        for task in ("sst2", "agnews", "gsm8k", "alpaca")
    ]
    assert judged == ["beaver-dam"] * 12
    for row in rows:
        assert 0 <= row["harmful_score"] <= 100
        assert 0 <= row["finetune_accuracy"] <= 100
        assert row["embedding_drift_per_token"] > 0
    assert {row["strength"] for row in rows} == {None, "ratio=0.1", "ratio=0.05"}
    assert stand_ins["models"] == {
        "meta-llama/Llama-2-7b-hf",
        BEAVER_DAM,
        "Qwen/Qwen2.5-7B-Instruct",
    }
    assert stand_ins["data"] == {
        ("PKU-Alignment/BeaverTails", None, "30k_train"),
        ("PKU-Alignment/BeaverTails", None, "30k_test"),
        ("stanfordnlp/sst2", None, "train"),
        ("stanfordnlp/sst2", None, "validation"),
        ("fancyzhang/ag_news", None, "train"),
        ("fancyzhang/ag_news", None, "test"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("json", None, "train[:-122]"),
        ("json", None, "train[-122:]"),
    }


@pytest.mark.parametrize("name", ["t1", "t3", "t6", "t10", "t13"])
def test_other_tables_from_their_files(name, stand_ins, tmp_path):
    short = {
        "t1": ("--grid", '{"poison_ratio": [0, 0.5]}', "--defenses", "vaccine", "lisa"),
        "t3": ("--grid", '{"task": ["gsm8k"], "learning_rate": [1e-7]}', "--defenses", "repnoise"),
        "t6": ("--defenses", "antidote"),
        "t10": ("--defenses", "ldifs", "antidote"),
        "t13": ("--grid", '{"harmful_samples": [0, 5, 10]}'),
    }
    rows = run(name, tmp_path, *short[name])
    clean = [row for row in rows if row["defense"] == "clean"]
    rows = rows[len(clean) :]
    assert len(clean) == {"t1": 1, "t3": 1, "t6": 4, "t10": 1, "t13": 1}[name]
    assert len(rows) == {"t1": 4, "t3": 1, "t6": 4, "t10": 2, "t13": 3}[name]
    if name == "t6":
        assert len(stand_ins["models"]) == 5  # four models and the judge
        assert [row["model"].partition("/")[0] for row in rows] == [
            *("meta-llama", "mistralai", "google", "meta-llama"),
        ]
    if name == "t10":
        text = (tmp_path / "out/tables.md").read_text()
        assert "align s" in text
        assert rows[1]["prune_seconds"] > 0
        assert rows[1]["finetune_memory_bytes"] > 10**7


def test_evaluate_with_paper_takes_the_papers_names(stand_ins, tmp_path):
    config = EvaluateConfig(
        model_name_or_path="meta-llama/Llama-2-7b-hf",
        reference_model="meta-llama/Llama-2-7b-hf",
        output_dir=str(tmp_path / "scores"),
        task="gsm8k",
        paper=True,
        max_seq_length=500,
        max_new_tokens=4,
        dtype="float32",
    )
    assert (config.judge, config.num_samples) == ("beaver-dam", 1000)
    assert (config.judges, config.templates) == (["beaver-dam"], ["alpaca"])
    assert config.harmful_dataset == "PKU-Alignment/BeaverTails:eval"
    assert config.task_dataset == "openai/gsm8k"
    assert config.drift_dataset == "PKU-Alignment/BeaverTails:safe"
    report = evaluate.run(config)
    assert report["judge"] == "beaver-dam"
    assert report["metrics"]["harmful"]["num_prompts"] == TEST
    assert report["metrics"]["task"]["num_records"] == TEST
    assert report["metrics"]["drift"]["embedding_drift_sum"] == 0
    assert stand_ins["models"] == {"meta-llama/Llama-2-7b-hf", BEAVER_DAM}


def test_flags_that_are_given_stay_with_paper():
    options = {"model_name_or_path": "m", "output_dir": "o", "paper": True}
    config = EvaluateConfig(**options, judges="refusal", num_samples=7, task="alpaca")
    assert (config.judge, config.num_samples) == ("refusal", 7)
    assert config.max_new_tokens == 512
    assert config.win_rate_judge == "Qwen/Qwen2.5-7B-Instruct"
    assert config.task_dataset == "tatsu-lab/alpaca_eval"
    assert EvaluateConfig(**options).task_dataset is None  # label names no data set
    assert EvaluateConfig(**options | {"paper": False}, harmful_dataset="x").judge == "refusal"
    with pytest.raises(UsageError, match="win_rate_judge='x': must be given with task alpaca"):
        EvaluateConfig(**options, task="sst2", win_rate_judge="x")
