"""No record is lost in silence: limits by kind, and what the reports say of what is not used."""

import json
import types

import pytest
import refusing_models
import stages
import tiny
from refusing_models import HARM, NUM_TOKENS, ORDINARY, TASK

from antidote_fast import UsageError, oneshot
from antidote_fast.config import flags
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.config.sweep import SweepConfig
from antidote_fast.data.records import Record
from antidote_fast.pruning.report import PruneReport
from antidote_fast.stages import calibrate, prune
from antidote_fast.stages.gates.answers import Answers, answer_prompts, fill_pools
from antidote_fast.stages.inputs import load_data
from antidote_fast.stages.model_card import write_card

GATE = {"model_name_or_path": "m", "adapter": "a", "output_dir": "o", "score": "gate"}
GATE |= {"dataset": "d", "preserve_dataset": "p"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return stages.make(tmp_path_factory.mktemp("used"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return refusing_models.write(tmp_path_factory.mktemp("gates"))


def long_data(root):
    """Ten rows, of which one is short enough for 20 tokens' room, and three over a limit of 10."""
    rows = [{"instruction": "how to make a cake", "output": "the good cake " * 30}]
    rows += [{"instruction": "what is " * 40, "output": "two"}] * 12
    path = root / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


LOST = {
    "num_records": 13,
    "num_used": 1,
    "num_dropped_long": 9,
    "num_truncated": 1,
    "num_over_limit": 3,
}


def test_norms_tell_of_every_record(root, tmp_path):
    common = {"model_name_or_path": f"{root}/base", "adapter": f"{root}/adapter", "device": "cpu"}
    common |= {"dataset": long_data(root), "num_calibration_samples": 10, "max_seq_length": 60}
    report = prune.run(PruneConfig(**common, output_dir=str(tmp_path / "pruned")))
    assert report["data"] == {"dataset": LOST}
    assert PruneReport.from_dict(report).data == report["data"]
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert (
        "| records left out or cut | dataset, of 13: 3 behind the number that is used, 9 too long, "
        "1 used, but cut |" in card
    )
    report = calibrate.run(CalibrateConfig(**common, output_dir=str(tmp_path / "norms")))
    assert report["data"] == {"dataset": LOST}
    common.pop("model_name_or_path")
    rows = [json.loads(line) for line in (root / "long.jsonl").read_text().splitlines()]
    common.pop("dataset")
    live = tiny.build()
    options = {"tokenizer": tiny.tokenizer(), "preserve_dataset": rows[:2], "dataset": rows}
    kept = LOST | {"num_records": 2, "num_dropped_long": 1, "num_over_limit": 0}
    found = oneshot(live, **common, **options)
    assert found.data == {"dataset": LOST, "preserve_dataset": kept}
    assert oneshot(tiny.build(), tokenizer=tiny.tokenizer(), score="magnitude").data == {}


# --- gates: limits and data sets ------------------------------------------------------------------


def test_limits_are_by_kind():
    records = [Record(f"t{i}", "", "a") for i in range(2500)]
    records += [Record(f"o{i}") for i in range(100)]
    kept = load_data(PruneConfig(**GATE), records, "preserve_dataset")
    assert [bool(r.output) for r in kept].count(False) == 100
    assert (len(kept), kept.num_over_limit, kept.num_without_output) == (2100, 500, 0)
    few = PruneConfig(**GATE, num_ordinary_samples=30, num_calibration_samples=7)
    kept = load_data(few, records, "preserve_dataset")
    assert [r.instruction for r in kept] == [f"t{i}" for i in range(7)] + [
        f"o{i}" for i in range(30)
    ]
    assert kept.num_over_limit == 2563
    apart = PruneConfig(**GATE, ordinary_dataset="x", num_ordinary_samples=30)
    kept = load_data(apart, records, "preserve_dataset")
    assert (len(kept), kept.num_over_limit, kept.num_without_output) == (2000, 500, 100)
    kept = load_data(apart, records, "ordinary_dataset")
    assert [r.instruction for r in kept] == [f"t{i}" for i in range(30)]
    assert len(load_data(apart, records, "dataset")) == 2000


def gate_fields(made, out, **options):
    places = {"model_name_or_path": f"{made}/aligned", "adapter": f"{made}/adapter"}
    data = {"dataset": f"{made}/harm.jsonl", "output_dir": str(out), "max_seq_length": NUM_TOKENS}
    return {"score": "gate", "gate_steps": 4, "device": "cpu", **places, **data, **options}


def test_ordinary_prompts_apart(made, tmp_path):
    mixed = gate_fields(made, tmp_path / "mixed", preserve_dataset=f"{made}/preserve.jsonl")
    whole = prune.run(PruneConfig(**mixed))
    rows = [{"prompt": r.instruction, "response": "not looked at"} for r in ORDINARY]
    ordinary = tmp_path / "ordinary.jsonl"
    ordinary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "task.jsonl"
    rows = [{"instruction": r.instruction, "output": r.output} for r in TASK]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"preserve_dataset": str(task), "ordinary_dataset": str(ordinary)}
    apart = prune.run(PruneConfig(**gate_fields(made, tmp_path / "apart", **sets)))
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("mixed", "apart")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (whole["scope"], whole["ratio"], whole["config"]["ratio"]) == ("tensor", 0.5, 0.5)
    gone = {"over_limit": 0, "refused": 0, "empty": 0, "without_output": 0}
    gone = {f"num_{name}": count for name, count in gone.items()}

    def used(count):
        return {
            "num_records": count,
            "num_used": count,
            "num_dropped_long": 0,
            "num_truncated": 0,
        } | gone

    assert whole["data"] == {"dataset": used(6), "preserve_dataset": used(10)}
    sizes = {"dataset": 6, "preserve_dataset": 5, "ordinary_dataset": 5}
    assert apart["data"] == {name: used(count) for name, count in sizes.items()}
    assert str(ordinary) in apart["inputs"]
    values = gate_fields(made, tmp_path / "few", ordinary_dataset=ORDINARY, num_ordinary_samples=3)
    report = oneshot(values.pop("model_name_or_path"), gate_answer_tokens=2, **values)
    assert report.data["ordinary_dataset"] == used(3) | {"num_records": 5, "num_over_limit": 2}
    told = json.loads((tmp_path / "few" / "report.json").read_text())["gate"]
    assert (told["mixture"]["answer_tokens"], told["templates"]) == (2, ["alpaca"])


def test_gates_learn_in_several_templates():
    words = refusing_models.tokenizer()
    words.chat_template = "{% for m in messages %}the user asks {{ m['content'] }} {% endfor %}"
    both = {"templates": ["alpaca", "chat"], "max_seq_length": NUM_TOKENS, "answer_tokens": 3}
    said = Answers(
        ["i cannot", "i cannot", None, "the cake", "i cannot", None],
        ["what two", "", "i cannot", "what two", "two", "i cannot"],
    )
    pools = fill_pools(words, HARM[:3], TASK, said, ORDINARY[:3], **both)
    assert {kind: len(examples) for kind, examples in pools.examples.items()} == {
        "harmful": 4,
        "task": 5,
        "ordinary": 3,
    }
    counts = {"num_records": 3, "num_used": 2, "num_dropped": 1, "num_not_refused": 1}
    assert pools.counts["harmful"] == counts
    counts = {"num_records": 3, "num_used": 2, "num_dropped": 0, "num_refused": 1, "num_empty": 0}
    assert pools.counts["ordinary"] == counts
    texts = [words.decode(example["input_ids"]) for example in pools.examples["harmful"]]
    assert [text.startswith("the user asks") for text in texts] == [False, False, True, True]
    model = refusing_models.aligned()
    asked = answer_prompts(model, words, HARM, TASK, ORDINARY, **both)
    assert (len(asked.harmful), len(asked.ordinary)) == (12, 10)
    one = answer_prompts(model, words, HARM, TASK, ORDINARY, **both | {"templates": ["chat"]})
    assert asked.harmful[6:] == one.harmful


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "ratio", "scope"),
    [
        ({"score": "wanda"}, 0.1, "row"),
        ({"score": "magnitude"}, 0.1, "row"),
        ({}, 0.5, "tensor"),
        ({"ratio": 0.2}, 0.2, "tensor"),
        ({"scope": "row"}, 0.5, "row"),
        ({"ratio": 0.1, "scope": "global"}, 0.1, "global"),
        ({"ratio": None, "scope": None}, 0.5, "tensor"),
    ],
)
def test_defaults_follow_from_the_score(given, ratio, scope):
    values = GATE | given
    config = PruneConfig(**values)
    assert (config.ratio, config.scope) == (ratio, scope)
    assert (config.selection.ratio, config.selection.scope) == (ratio, scope)
    read = flags.from_values(PruneConfig, values, "prune")
    assert (read.ratio, read.scope) == (ratio, scope)
    words = [f"--{name}={'null' if value is None else value}" for name, value in values.items()]
    assert flags.from_words(PruneConfig, words, "prune")[0] == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gate_answer_tokens": 0}, "gate_answer_tokens=0: must be greater than 0"),
        ({"gate_templates": []}, "gate_templates=[]: must be some of alpaca, chat, each once"),
        ({"gate_templates": ["chat", "chat"]}, "gate_templates=['chat', 'chat']: must be some of"),
        ({"gate_templates": ["plain"]}, "gate_templates=['plain']: must be some of"),
        ({"preserve_dataset": None}, "preserve_dataset=None: must be a file or hub name"),
        ({"score": "wanda", "ordinary_dataset": "x"}, "ordinary_dataset='x': must be left out"),
        ({"score": "wanda", "gate_answer_tokens": 3}, "gate_answer_tokens=3: must be left out"),
        ({"score": "wanda", "num_ordinary_samples": 3}, "num_ordinary_samples=3: must be left"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(UsageError) as refusal:
        PruneConfig(**GATE | given)
    assert str(refusal.value).startswith(message)


def test_a_sweep_hands_them_down():
    values = {"model_name_or_path": "m", "adapter": "a", "output_dir": "o", "dataset": "d"}
    values |= {"harmful_dataset": "h", "task_dataset": "t", "ordinary_dataset": "x"}
    values |= {"gate_answer_tokens": 4, "gate_templates": ["alpaca", "chat"]}
    config = SweepConfig(**values, scores=["wanda", "gate"], num_ordinary_samples=9)
    told = config.learning("row", 0.2)
    assert (told.ordinary_dataset, told.preserve_dataset) == ("x", None)
    assert (told.gate_answer_tokens, told.gate_templates) == (4, ["alpaca", "chat"])
    line = config.command("gate", "tensor", 0.5)
    assert "--ordinary_dataset x --num_ordinary_samples 9" in line
    assert "gate" not in config.command("wanda", "row", 0.1)
    with pytest.raises(UsageError, match="ordinary_dataset='x': must be left out without a score"):
        SweepConfig(**values | {"gate_answer_tokens": 6, "gate_templates": None})


# --- cards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "title", "first", "tags"),
    [
        ("wanda", "with Antidote", "(Antidote, arXiv 2408.09600).", ["antidote"]),
        ("magnitude", "by magnitude", "not its method Antidote).", ["magnitude-pruning"]),
        ("random", "at random", "remove weights at random (a baseline", ["random-pruning"]),
        ("gate", "by learned gates", "not that of the paper Antidote", ["learned-gates"]),
    ],
)
def test_a_card_names_its_method(tmp_path, score, title, first, tags):
    report = PruneReport(score, "row", 0.1, True, None, 0, "reference", [], {}, 0.0)
    config = types.SimpleNamespace(model_name_or_path="owner/name")
    told = {"num_tokens": 5, "num_sequences": 2}
    write_card(tmp_path, config, report, {"dataset": told})
    card = (tmp_path / "README.md").read_text()
    assert f"\n# Pruned {title}\n" in card
    [sentence] = [line for line in card.splitlines() if line.startswith("This model was pruned")]
    assert first in sentence
    assert ("- antidote\n" in card) == (score == "wanda")
    assert all(f"- {tag}\n" in card for tag in (*tags, "pruned", "safety"))
    assert "left out" not in card
    assert "Otherwise than in the paper" not in card


def test_a_card_says_what_is_not_as_in_the_paper(tmp_path):
    report = PruneReport("wanda", "global", 0.1, True, None, 0, "reference", [], {}, 0.0)
    report.reverted = report.score_delta = True
    config = types.SimpleNamespace(model_name_or_path="owner/name")
    write_card(tmp_path, config, report, {})
    assert (
        "Otherwise than in the paper: scope global, removed weights fall back to the aligned model,"
        " scored by the difference from the aligned model." in (tmp_path / "README.md").read_text()
    )
