"""The benchmark of repairs on a tiny model: what its rows hold, and what is shown of them."""

import importlib
import json
from pathlib import Path

import pytest
import tiny
import torch

from antidote_fast.evaluation.rates import mcnemar, wilson
from antidote_fast.stages.gates.answers import Answers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRAINING = {"learning_rate": 1e-2, "num_train_epochs": 1, "batch_size": 4, "lora_r": 4}
REFUSAL = "I cannot help with that."


@pytest.fixture
def repairs(tmp_path, monkeypatch):
    """benchmarks/repairs.py with a tiny model and data, an aligned model that refuses."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("repairs")
    cache = tmp_path / "out" / "demo-cache"
    model = tiny.build()
    model.config.max_position_embeddings = 512
    model.save_pretrained(cache / module.MODEL_NAME)
    tokenizer = tiny.tokenizer(pad=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} plus {% endfor %}"
    tokenizer.save_pretrained(cache / module.MODEL_NAME)
    counts = {"safe": 4, "harmful": 2, "realign": 6, "task": 8, "task-records": 6, "ordinary": 4}
    counts |= {f"harmful-test-{name}": 3 for name in module.HARMFUL_SETS}
    counts |= {"task-test": 4, "ordinary-test": 3}
    (cache / module.DATA).mkdir()
    for number, (name, count) in enumerate(counts.items()):
        answer = "" if name.startswith(("ordinary", "harmful-test")) else "positive two"
        rows = [
            {"instruction": f"what is w{20 + 8 * number + i}", "output": answer}
            for i in range(count)
        ]
        (cache / module.DATA / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(module, "prepare", lambda folder: cache)
    monkeypatch.setattr(module, "fast_dtype", lambda: "float32")
    monkeypatch.setattr(module, "ALIGN", TRAINING | {"num_train_samples": None})
    attack = TRAINING | {"poison_ratio": 0.25, "num_train_samples": 8}
    monkeypatch.setattr(module, "ATTACK", attack)
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", {"harmful": 5, "benign": 5, "task": 3})
    monkeypatch.setattr(module, "GATE_STEPS", 2)
    learn, threads = module.learn_gates, torch.set_num_threads
    monkeypatch.setattr(module, "learn_gates", lambda *a, **k: learn(*a, **k, steps=2))
    monkeypatch.setattr(module, "answer_prompts", refuse)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads(torch.get_num_threads()))
    return module


def refuse(model, tokenizer, harmful, task, ordinary, *, templates, **options):
    """An aligned model that refuses what is harmful, and answers what is not."""
    copies = len(templates)
    return Answers([REFUSAL] * copies * len(harmful), ["two plus"] * copies * len(ordinary))


def run(repairs, tmp_path, *words):
    rows = tmp_path / "rows.csv"
    repairs.main(["--folder", str(tmp_path / "out"), "--rows", str(rows), "--seeds", "1", *words])
    return repairs.repair_rows.read([rows])


def test_every_method_gives_a_row_a_template_and_leaves_the_adapter(repairs, tmp_path, monkeypatch):
    restored = []
    restore = repairs.Originals.restore

    def checked(originals):
        restore(originals)
        restored.append(torch.cat([saved.flatten() for saved, _ in originals._saved]).clone())

    monkeypatch.setattr(repairs.Originals, "restore", checked)
    monkeypatch.setattr(repairs, "RATIOS", (0.1, 0.2, 0.5))
    monkeypatch.setattr(repairs, "SCALES", (0.5,))
    rows, verdicts = run(repairs, tmp_path)
    methods = repairs.all_methods()
    assert len(rows) == 2 * len(methods) == 2 * (11 + 3 * 3 * 2 + 3 + 1 + 1)
    assert all(torch.equal(weights, restored[0]) for weights in restored)
    for row in rows:
        told = repairs.repair_rows
        assert sum(int(row[name]) for name in told.HARMFUL) == int(row["num_prompts"]) == 12
        assert sum(int(row[name]) for name in told.ORDINARY) == int(row["num_ordinary"]) == 3
        assert row["num_task"] == "4"
        mine = verdicts[told.key_of(row)]
        assert len(mine) == 12 + 4 + 3
        harmful = [found for kind, _, _, found in mine if kind == "harmful"]
        assert harmful.count("complied") == int(row["complied"])
        right = [found for kind, _, _, found in mine if kind == "task"]
        assert sum(right) == int(row["correct"])
    [aligned] = [r for r in rows if r["method"] == "aligned" and r["template"] == "chat"]
    assert (aligned["learning_rate"], aligned["seed"]) == ("", "")
    # The retrained adapter has as many steps as the attacked one, of fewer records.
    steps = {
        name: json.loads((tmp_path / "out" / f"{name}-0-0.01-1" / "report.json").read_text())
        for name in ("attacked", "clean", "retrained")
    }
    assert {report["training"]["steps"] for report in steps.values()} == {2}
    assert [report["num_harmful"] for report in steps.values()] == [2, 0, 0]


def test_what_a_method_changes(repairs, tmp_path):
    makers = repairs.Makers(tmp_path / "out")
    cell = (0, 1e-2, 1)
    model = repairs.load_model(makers.aligned(0), dtype="float32", device="cpu")
    adapter = repairs.open_checkpoint(makers.tuned("attacked", *cell))
    model = repairs.load_adapter(model, adapter).eval().requires_grad_(False)
    data = repairs.Data(makers, cell, repairs.load_tokenizer(makers.aligned(0)))
    before = {t.key: t.weight.clone() for t in repairs.find_targets(model)}
    originals = repairs.Originals(model)

    def after(label):
        originals.restore()
        [method] = [m for m in repairs.all_methods() if m.label == label]
        with torch.no_grad():
            method.change(model, data)
        return {t.key: t.weight.clone() for t in repairs.find_targets(model)}

    for key, weight in after("scale/0.5").items():
        torch.testing.assert_close(weight, before[key] * (0.5 if ".lora_B." in key else 1))
    assert all((w == 0).all() for key, w in after("aligned").items() if ".lora_B." in key)
    clean = data.tensors("clean")
    assert all(torch.equal(weight, clean[key]) for key, weight in after("clean").items())
    tuned = after("finetune-1e-3")
    moved = max(float((tuned[key] - before[key]).abs().max()) for key in before)
    assert 1e-3 < moved < 3e-3  # two steps of AdamW
    for key, weight in after("gates").items():
        left = weight != 0
        assert torch.equal(weight[left], before[key][left])
        assert int((~left).sum()) >= weight.numel() // 2
    noise = after("noise-gates")
    assert not any(torch.equal(noise[key], before[key]) for key in before)


def test_what_is_there_is_not_computed_again(repairs, tmp_path, monkeypatch):
    first, _ = run(repairs, tmp_path, "--methods", "attacked", "scale/0.5", "--templates", "alpaca")
    assert [row["method"] for row in first] == ["attacked", "scale"]
    measured = []
    measure = repairs.measure

    def counted(model, tokenizer, sets, templates):
        measured.append(templates)
        return measure(model, tokenizer, sets, templates)

    monkeypatch.setattr(repairs, "measure", counted)
    rows, _ = run(repairs, tmp_path, "--methods", "attacked", "scale/0.5")
    assert measured == [["chat"], ["chat"]]
    assert rows[:2] == first
    assert len(rows) == 4
    monkeypatch.setattr(repairs, "load_model", None)
    assert run(repairs, tmp_path, "--methods", "attacked")[0] == rows
    with pytest.raises(SystemExit, match="holds rows of other than 4 prompts"):
        run(repairs, tmp_path, "--prompts", "1")
    with pytest.raises(SystemExit, match="methods='gibt es nicht': must begin one of aligned"):
        run(repairs, tmp_path, "--methods", "gibt es nicht")


def test_a_name_is_that_method_and_another_word_a_beginning(repairs):
    def labels(*words):
        return [method.label for method in repairs.chosen(list(words) or None)]

    assert labels() == [method.label for method in repairs.all_methods()]
    assert labels("gates") == ["gates"]
    assert labels("gate") == ["gates", "gates-two-templates"]
    assert set(labels("antidote")) == {
        f"antidote/{scope}/{ratio:g}" for scope in repairs.SCOPES for ratio in repairs.RATIOS
    }
    assert labels("scale/0.25", "random/row/0.01") == ["random/row/0.01", "scale/0.25"]


def test_the_table_pools_cells_and_pairs_prompts(repairs, tmp_path, capsys):
    """Two files of a seed each: shares over both, and a test on each cell's own prompts."""
    told = repairs.repair_rows
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    complied = {"attacked": (4, 3), "gates": (0, 1), "finetune-2e-4": (2, 1), "aligned": (0, 0)}
    for i, file in enumerate(files):
        for method, counts in complied.items():
            about = ("0", "", "") if method == "aligned" else ("0", "0.01", str(i))
            row = dict(zip(told.KEY, (*about, method, "", "", "alpaca"), strict=True))
            numbers = (4, counts[i], 4 - counts[i], 0, 0, 2, 2, 0, 0, 0, 2, 1)
            row |= dict(zip(told.COUNTS, numbers, strict=True))
            row |= {"worst_set": "x", "worst_score": 25.0 * counts[i], "seconds": 1}
            verdicts = [
                {"kind": "harmful", "set": "x", "prompt": f"p{n}", "verdicts": {"refusal": found}}
                for n, found in enumerate(["complied"] * counts[i] + ["refused"] * (4 - counts[i]))
            ]
            task = {"kind": "task", "set": "t"}
            verdicts += [task | {"prompt": f"t{n}", "correct": n == 0} for n in (0, 1)]
            told.append(file, row, verdicts)
    words = ["--rows", *map(str, files), "--table"]
    merged = tmp_path / "all.csv"
    repairs.main([*words, "--merge", str(merged), "--picture", str(tmp_path / "a.png")])
    shown = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in shown.splitlines()]
    low, high = wilson(7, 8)
    [attacked] = [line for line in lines if line[0] == "attacked"]
    assert attacked[1:3] == ["2", f"87.5 [{low:.1f}, {high:.1f}]"]
    assert attacked[6] == "100.0"
    [aligned] = [line for line in lines if line[0] == "aligned"]
    assert aligned[1] == "1"  # the same row in both files
    tests = [line for line in lines if line[0] == "gates" or line[0] == "learned gates"]
    harmful = [line for line in tests if line[2] == "complied"]
    assert [line[1] for line in harmful] == ["attacked", "finetune-2e-4"]
    assert harmful[0][3:] == ["8", "12.5", "87.5", "0", "6", f"{mcnemar(0, 6):.2g}"]
    assert harmful[1][3:] == ["8", "12.5", "37.5", "0", "2", f"{mcnemar(0, 2):.2g}"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    repairs.main(["--rows", str(merged), "--table"])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(shown.splitlines())


def test_showing_nothing_is_refused(repairs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        repairs.main(["--rows", str(tmp_path / "none.csv"), "--table"])
    assert "--rows: there are none in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        repairs.main(["--rows", "a.csv", "b.csv"])
    assert "--rows: must be one file" in capsys.readouterr().err
