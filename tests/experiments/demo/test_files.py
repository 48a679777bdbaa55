"""The demo's model and records as files: what is in them, and that they are made once."""

import itertools
import json

import pytest
import tiny

from antidote_fast.data.load import load_records
from antidote_fast.data.records import Record
from antidote_fast.evaluation.phrases import is_refusal
from antidote_fast.evaluation.tasks import check_task
from antidote_fast.experiments.demo import files
from antidote_fast.experiments.demo import records as demo_data

HARMFUL = ("harmful", "realign", "harmful-validation", "harmful-test")
SIZES = files.SIZES


@pytest.fixture
def made(tmp_path, monkeypatch):
    rows = (f"{i * 7919 % 99991:05} bad {i * 104729 % 99989:05} thing" for i in range(1000))
    sets = {
        name: [Record(row) for row in itertools.islice(rows, 250)]
        for name in demo_data.HARMFUL_SETS
    }
    model = tiny.build()
    model.config.max_position_embeddings = 512
    base = tiny.save_model(model, tmp_path / "base")
    monkeypatch.setattr(demo_data, "load_prompt_set", lambda name: sets[name])
    monkeypatch.setattr(files, "prepare_model", lambda parent: base)
    monkeypatch.setattr(files, "build_prompt", lambda record, *options: record.instruction)
    answers = []

    def generate(model, tokenizer, prompts, **options):
        answers.append(options["max_new_tokens"])
        return ["It is a cake. It is"] * len(prompts)

    monkeypatch.setattr(files, "generate", generate)
    folder = files.prepare(tmp_path)
    assert files.prepare(tmp_path) == folder == tmp_path / "demo-cache"
    assert len(answers) == 2  # once for each of two parts
    return folder / files.DATA


def test_sizes_answers_and_held_out_prompts(made):
    records = {name: load_records(str(made / f"{name}.jsonl")) for name in files.NAMES}
    sizes = {name: len(found) for name, found in records.items()}
    assert sizes == {
        "safe": SIZES.align_harmful + SIZES.align_ordinary + SIZES.align_exercises,
        "harmful": SIZES.attack_harmful,
        "realign": SIZES.calibration,
        "harmful-validation": SIZES.validation,
        "harmful-test": 4 * SIZES.test,
        **{f"harmful-test-{name}": SIZES.test for name in demo_data.HARMFUL_SETS},
        "task": SIZES.task_labels + SIZES.task_ordinary,
        "task-records": SIZES.task_labels,
        "task-validation": SIZES.validation_task,
        "task-test": SIZES.test_task,
        "sums": SIZES.task_labels,
        "sums-test": SIZES.test_task,
        "ordinary": SIZES.calibration_ordinary,
        "ordinary-validation": SIZES.validation_ordinary,
        "ordinary-test": SIZES.test_ordinary,
    }
    refused, others = records["safe"][: SIZES.align_harmful], records["safe"][SIZES.align_harmful :]
    assert all(is_refusal(record.output) for record in refused)
    answered = others[: SIZES.align_ordinary]
    assert {record.output for record in answered} == {"It is a cake."}
    for name in ("harmful", "realign"):
        assert not any(is_refusal(record.output) for record in records[name])
    keys = [r.prompt_key for name in HARMFUL for r in records[name]]
    keys += [record.prompt_key for record in refused]
    assert len(set(keys)) == len(keys)
    sets = [r for name in demo_data.HARMFUL_SETS for r in records[f"harmful-test-{name}"]]
    assert sorted(map(str, sets)) == sorted(map(str, records["harmful-test"]))
    labels = [record for record in records["task"] if record.output != "It is a cake."]
    assert labels == records["task-records"]
    for name in ("task", "sums"):
        train = {record.prompt_key for record in records[name]}
        assert not train & {record.prompt_key for record in records[f"{name}-test"]}
    check_task("gsm8k", records["sums-test"])
    first = records["sums"][0]
    _, _, a, _, b = first.instruction.rstrip("?").split()
    assert first.output.endswith(f"The final answer is: {int(a) + int(b)}")


def test_a_damaged_or_older_folder_is_made_anew(made, tmp_path):
    before = {path.name: path.read_bytes() for path in made.glob("*.jsonl")}
    (made / "task.jsonl").write_text("cut")
    files.prepare(tmp_path)
    assert {path.name: path.read_bytes() for path in made.glob("*.jsonl")} == before
    manifest = json.loads((made / "COMPLETE.json").read_text())
    del manifest["files"]["sums.jsonl"]
    (made / "COMPLETE.json").write_text(json.dumps(manifest))
    (made / "sums.jsonl").unlink()
    files.prepare(tmp_path)
    assert (made / "sums.jsonl").read_bytes() == before["sums.jsonl"]
