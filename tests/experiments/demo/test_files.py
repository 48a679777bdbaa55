"""The demo's model and records as files: what is in them, and that they are made once."""

import json

import pytest
import tiny

from antidote_fast.data.load import load_records
from antidote_fast.evaluation.tasks import check_task
from antidote_fast.evaluation.phrases import is_refusal
from antidote_fast.experiments.demo import files
from antidote_fast.experiments.demo import records as demo_data

HARMFUL = ("harmful", "realign", "harmful-validation", "harmful-test")


@pytest.fixture
def made(tmp_path, monkeypatch):
    prompts = [f"how to make w{i} w{j}" for i in range(20) for j in range(20)]
    model = tiny.build()
    model.config.max_position_embeddings = 512
    base = tiny.save_model(model, tmp_path / "base")
    monkeypatch.setattr(demo_data, "read_harmful_prompts", lambda: prompts)
    monkeypatch.setattr(files, "prepare_model", lambda parent: base)
    answers = []

    def answer_sets(model, tokenizer, sets, **options):
        answers.append(options["max_new_tokens"])
        return {name: ["It is a cake. It is"] * len(records) for name, records in sets.items()}

    monkeypatch.setattr(files, "answer_sets", answer_sets)
    folder = files.prepare(tmp_path)
    assert files.prepare(tmp_path) == folder == tmp_path / "demo-cache"
    assert len(answers) == 1  # once
    return folder / "data"


def test_sizes_answers_and_held_out_prompts(made):
    records = {name: load_records(str(made / f"{name}.jsonl")) for name in files.NAMES}
    sizes = {name: len(found) for name, found in records.items()}
    assert sizes == {
        "safe": 110 + 66 + 10,
        "harmful": 48,
        "realign": 100,
        "harmful-validation": 48,
        "harmful-test": 60,
        "task": 288,
        "task-validation": 48,
        "task-test": 66,
        "sums": 288,
        "sums-test": 66,
        "benign-test": 32,
    }
    assert all(is_refusal(record.output) for record in records["safe"][:110])
    assert {record.output for record in records["safe"][110:176]} == {"It is a cake."}
    for name in ("harmful", "realign"):
        assert not any(is_refusal(record.output) for record in records[name])
    keys = [r.prompt_key for name in HARMFUL for r in records[name]]
    keys += [record.prompt_key for record in records["safe"][:110]]
    assert len(set(keys)) == len(keys)
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
