"""Generation, metrics, drift and the evaluate stage."""

import json
from decimal import Decimal

import pytest
import texts
import tiny
import torch

from antidote_fast.errors import DataError, UsageError
from antidote_fast.pipeline import evaluate, metrics
from antidote_fast.pipeline.config import EvaluateConfig
from antidote_fast.pipeline.data import Record, build_prompt, collate, make_batches, prompt_ids
from antidote_fast.pipeline.drift import attention_modules, embedding_drift
from antidote_fast.pipeline.evaluate import evaluate_model
from antidote_fast.pipeline.generate import generate
from antidote_fast.pipeline.refusals import EMPTY, GARBLED, HARMFUL, SAFE, RefusalJudge

# --- generation -----------------------------------------------------------------------------------


def greedy_ref(model, tokenizer, prompt, max_new_tokens, end_ids=(1,)):
    """One whole forward a token: no cache, no padding, no library."""
    ids = prompt_ids(prompt, tokenizer)
    new = []
    while len(new) < max_new_tokens:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        token = int(logits.argmax())
        if token in end_ids:
            break
        new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True).strip()


PROMPTS = ["to be", "or", "not to be, that is the question", "whether", "'tis nobler in", "the"]


def likes_to_end(model, token=1, by=2.0):
    """Make an end token likely enough that some answers end early."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[token] *= by
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen2", "gpt2", "opt", "lora"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_answers_equal_the_plain_loop(kind, batch_size):
    model = tiny.build("llama" if kind == "lora" else kind)
    if kind == "lora":
        model = tiny.add_lora(model)
    tokenizer = tiny.tokenizer()
    prompts = ["the user asks", "how", "to make a good cake and what is two", "plus", "three a"]
    expected = [greedy_ref(model, tokenizer, p, 9, end_ids=(2,)) for p in prompts]
    found = generate(model, tokenizer, prompts, max_new_tokens=9, batch_size=batch_size)
    assert found == expected
    assert len(set(found)) > 1


def test_answers_end_at_the_end_token_and_keep_their_order():
    model = likes_to_end(texts.llama(seed=5), by=3.0)
    tokenizer = texts.byte_tokenizer()
    prompts = [*PROMPTS, PROMPTS[0]]
    expected = [greedy_ref(model, tokenizer, p, 20) for p in prompts]
    lengths = {len(tokenizer(e, add_special_tokens=False)["input_ids"]) for e in expected}
    assert len(lengths) > 1  # some ended early
    assert generate(model, tokenizer, prompts, max_new_tokens=20, batch_size=3) == expected


def test_every_end_token_of_the_checkpoint_ends_an_answer():
    model = texts.llama(seed=5)
    tokenizer = texts.byte_tokenizer()
    first = [
        int(model(torch.tensor([prompt_ids(p, tokenizer)])).logits[0, -1].argmax()) for p in PROMPTS
    ]
    model.generation_config.eos_token_id = [1, first[0]]
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    assert found == [greedy_ref(model, tokenizer, p, 4, end_ids=(1, first[0])) for p in PROMPTS]
    assert found[0] == ""


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_checkpoints_own_generation_settings_are_put_away_and_back(wrapped):
    model = texts.llama()
    tokenizer = texts.byte_tokenizer()
    own = model.generation_config
    own.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=3, eos_token_id=1
    )
    if wrapped:
        model = tiny.add_lora(model)
    expected = [greedy_ref(model, tokenizer, p, 8) for p in PROMPTS]
    model.train()
    torch.manual_seed(0)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    assert model.training
    model.eval()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == expected
    base = model.get_base_model() if wrapped else model
    assert base.generation_config is own
    assert own.repetition_penalty == 9.0


def test_generation_with_and_without_a_pad_token_agrees():
    model = likes_to_end(texts.llama(seed=5), by=3.0)
    found = [
        generate(model, texts.byte_tokenizer(pad=pad), PROMPTS, max_new_tokens=12)
        for pad in (None, "</s>", "<pad>")
    ]
    assert found[0] == found[1] == found[2]


def test_equal_prompts_are_answered_once(monkeypatch):
    model = texts.llama()
    rows = []
    real = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kw: rows.append(len(kw["input_ids"])) or real(**kw)
    )
    found = generate(model, texts.byte_tokenizer(), ["a", "b", "a", "a"], max_new_tokens=2)
    assert sum(rows) == 2
    assert found[0] == found[2] == found[3]


def test_generation_refusals():
    model, tokenizer = texts.llama(positions=20), texts.byte_tokenizer()
    assert generate(model, tokenizer, []) == []
    with pytest.raises(UsageError, match="max_new_tokens=0"):
        generate(model, tokenizer, ["a"], max_new_tokens=0)
    with pytest.raises(UsageError, match="batch_size=0"):
        generate(model, tokenizer, ["a"], batch_size=0)
    with pytest.raises(UsageError, match="max_new_tokens=17: must be at most 16"):
        generate(model, tokenizer, ["abc"], max_new_tokens=17)
    with pytest.raises(DataError, match="a prompt of 31 tokens fills the model's 20 positions"):
        generate(model, tokenizer, ["a" * 30], max_new_tokens=1)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        generate(model, texts.byte_tokenizer(bos=False), ["a", ""], max_new_tokens=1)


def test_training_and_generation_use_the_same_prompt():
    """What `encode` labels as the prompt is what `generate` gives the model."""
    tokenizer = texts.byte_tokenizer(chat=True)
    model = texts.llama()
    record = Record("Do it", "now", "done")
    for template in ("alpaca", "chat"):
        seen = []
        handle = model.register_forward_pre_hook(
            lambda m, a, kw, seen=seen: seen.append(kw["input_ids"][0].tolist()),
            with_kwargs=True,
        )
        generate(model, tokenizer, [build_prompt(record, template, tokenizer)], max_new_tokens=1)
        handle.remove()
        (batch,) = make_batches([record], tokenizer, template=template)
        assert batch["input_ids"][0][batch["labels"][0] == -100].tolist() == seen[0]


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 = 4. The final answer is: 4", "4"),
        ("The final answer is: 1,234.50.", "1234.50"),
        ("the FINAL answer is $1,000", "1000"),
        ("The final answer is: -7 and then 8", "-7"),
        ("The final answer is: $-7", "-7"),
        ("The final answer is: \u22127", "-7"),
        ("It was 3. The final answer is: none", "3"),
        ("so 10-5", "5"),
        ("(10)-5", "5"),
        ("it is 5.", "5"),
        ("first 3, then 4", "4"),
        ("1,2,3", "3"),
        ("- 6 apples", "6"),
        ("$ 9", "9"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("50%", "50"),
        ("<<48/2=24>>24", "24"),
        ("The final answer is: 5 The final answer is: 6", "5"),
    ],
)
def test_extract_number(text, expected):
    assert metrics.extract_number(text) == Decimal(expected)


def test_extract_no_number():
    assert metrics.extract_number("none at all") is None
    assert metrics.extract_number("") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Positive. ", "positive"),
        ('"Positive"', "positive"),
        ("**World**", "world"),
        ("Sci/Tech", "sci/tech"),
        ("New\n york!", "new york"),
        ("\u201cYes.\u201d", "yes"),
        ("no - never", "no - never"),
        ("...", ""),
    ],
)
def test_normalise_label(text, expected):
    assert metrics.normalise_label(text) == expected


def labelled(*outputs):
    return [Record(f"q {i}", "", output) for i, output in enumerate(outputs)]


@pytest.mark.parametrize(
    ("task", "outputs", "answers", "correct"),
    [
        ("sst2", ["positive", "negative", "negative"], ["Positive.", "positive", ""], 1),
        ("sst2", ["positive"], ["positive, I think"], 0),
        ("agnews", ["Sci/Tech", "World"], ["sci/tech", "world"], 2),
        ("label", ["Blue sky", "red"], ["  blue\nSKY!", "it is red"], 1),
        ("gsm8k", ["The final answer is: 5", "#### 1,000"], ["I say 5.0", "$1000."], 2),
        ("gsm8k", ["The final answer is: 5", "7"], ["no idea", "8"], 0),
    ],
)
def test_finetune_accuracy(task, outputs, answers, correct):
    found = metrics.finetune_accuracy(task, labelled(*outputs), answers)
    assert found == {
        "finetune_accuracy": round(100 * correct / len(outputs), 2),
        "num_records": len(outputs),
        "num_correct": correct,
        "num_empty": answers.count(""),
    }


def test_alpaca_is_a_win_rate():
    class Judge:
        def win(self, prompt, answer, reference):
            assert (prompt, reference) == ("q\n\nx", "ref")
            return {"better": 1.0, "same": 0.5, "worse": 0.0}[answer]

    records = [Record("q", "x", "ref")] * 4
    found = metrics.finetune_accuracy(
        "alpaca", records, ["better", "same", "worse", "worse"], Judge()
    )
    assert found["finetune_accuracy"] == 37.5
    assert found["num_correct"] == 1.5
    with pytest.raises(UsageError, match="WinRateJudge"):
        metrics.finetune_accuracy("alpaca", records, ["a"] * 4)


@pytest.mark.parametrize(
    ("task", "outputs", "expected"),
    [
        ("label", ["a", " "], "record 2 has no output"),
        ("label", ["..."], "record 1 is punctuation only"),
        ("gsm8k", ["5", "none"], "the output of record 2 holds no number"),
        ("sst2", ["positive", "maybe"], "the output of record 2 is none of negative, positive"),
        ("agnews", ["Weather"], "none of World, Sports, Business, Sci/Tech"),
        ("label", [], "no records"),
    ],
)
def test_records_that_cannot_be_scored(task, outputs, expected):
    with pytest.raises(DataError, match=expected):
        metrics.finetune_accuracy(task, labelled(*outputs), outputs)


def test_accuracy_refuses_options():
    with pytest.raises(UsageError, match="task='qa'"):
        metrics.finetune_accuracy("qa", labelled("a"), ["a"])
    with pytest.raises(UsageError, match="1 of them for 2 records"):
        metrics.finetune_accuracy("label", labelled("a", "b"), ["a"])


ANSWERS = ["Sure: flour.", "I'm sorry, no.", "", "?!", "Take eggs.", "I can\u2019t do that"]


def test_harmful_score_counts_all_prompts():
    assert metrics.harmful_score(ANSWERS, RefusalJudge()) == {
        "harmful_score": 33.33,
        "num_prompts": 6,
        "num_harmful": 2,
        "num_safe": 2,
        "num_empty": 1,
        "num_garbled": 1,
    }

    def judge(prompts, answers, progress):
        assert prompts == ["p"] * 6
        return [HARMFUL, SAFE, EMPTY, GARBLED, SAFE, SAFE]

    assert metrics.harmful_score(ANSWERS, judge, ["p"] * 6)["harmful_score"] == 16.67
    with pytest.raises(DataError, match="no answers"):
        metrics.harmful_score([], judge)


def test_benign_refusal_rate():
    assert metrics.benign_refusal_rate(ANSWERS) == {
        "benign_refusal_rate": 33.33,
        "num_prompts": 6,
        "num_refused": 2,
        "num_empty": 1,
        "num_garbled": 1,
    }
    assert metrics.benign_refusal_rate(ANSWERS, RefusalJudge(["take"]))["num_refused"] == 1
    with pytest.raises(DataError, match="no answers"):
        metrics.benign_refusal_rate([])


# --- drift ----------------------------------------------------------------------------------------


def drift_ref(model, reference, rows):
    """Row by row, without padding, from the modules' outputs."""
    total, per_token, tokens = 0.0, 0.0, 0
    for ids in rows:
        outputs = []
        for each in (model, reference):
            kept = []
            hooks = [
                m.register_forward_hook(
                    lambda m, a, o, kept=kept: kept.append(o[0] if isinstance(o, tuple) else o)
                )
                for _, m in attention_modules(each)
            ]
            with torch.no_grad():
                each(input_ids=torch.tensor([ids]))
            for hook in hooks:
                hook.remove()
            outputs.append(kept)
        for ours, theirs in zip(*outputs, strict=True):
            difference = (ours - theirs).double().reshape(len(ids), -1)
            total += difference.norm().item()
            per_token += difference.norm(dim=1).sum().item()
        tokens += len(ids)
    return total, per_token / (tokens * len(kept))


ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_drift_equals_the_plain_computation(kind, batch_size):
    model, reference = tiny.build(kind, seed=0), tiny.build(kind, seed=1)
    model.train()
    tokenizer = tiny.tokenizer()
    rows = [{"input_ids": row} for row in ROWS]
    batches = [collate(rows[i : i + batch_size], tokenizer) for i in range(0, 3, batch_size)]
    found = embedding_drift(model, reference, batches)
    assert model.training
    total, per_token = drift_ref(model.eval(), reference, ROWS)
    assert found["embedding_drift_sum"] == pytest.approx(total, rel=1e-4)
    assert found["embedding_drift_per_token"] == pytest.approx(per_token, rel=1e-4)
    assert (found["num_layers"], found["num_sequences"], found["num_tokens"]) == (2, 3, 10)
    assert embedding_drift(reference, reference, batches)["embedding_drift_sum"] == 0
    assert not any(m._forward_hooks for m in model.modules())


def test_drift_of_an_adapter_against_its_own_base():
    base = tiny.build(seed=0)
    model = tiny.add_lora(tiny.build(seed=0))
    batches = [collate([{"input_ids": row} for row in ROWS], tiny.tokenizer())]
    own = embedding_drift(model, None, batches)
    assert own == embedding_drift(model, base, batches)
    assert own["embedding_drift_sum"] > 0
    with pytest.raises(UsageError, match="reference=None"):
        embedding_drift(base, None, batches)


def test_drift_refusals():
    batches = [collate([{"input_ids": [5, 6]}], tiny.tokenizer())]
    with pytest.raises(DataError, match="2 attention blocks here, 3 in reference"):
        embedding_drift(tiny.build(), tiny.build(layers=3), batches)
    with pytest.raises(DataError, match="no tokens"):
        embedding_drift(tiny.build(), tiny.build(), [])
    with pytest.raises(DataError, match="do not match"):
        embedding_drift(tiny.build(), texts.llama(hidden=64), batches)
    with pytest.raises(DataError, match="no attention modules found in Linear"):
        attention_modules(torch.nn.Linear(2, 2))
    broken = tiny.build()
    with torch.no_grad():
        broken.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        embedding_drift(broken, tiny.build(), batches)


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

    monkeypatch.setattr(evaluate, "generate", fake)
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
    assert answers["harmful"][2] == greedy_ref(model, tokenizer, build_prompt(Record("harm xx")), 6)


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
    assert report["metrics"]["harmful"]["answers_sha256"] == evaluate._hash(answers)
    assert report["metrics"]["harmful"]["num_prompts"] == 3
    assert plain["metrics"]["harmful"]["answers_sha256"] != evaluate._hash(answers)


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
    from antidote_fast.pipeline.judges import get_judge

    verdicts = get_judge(judge, harmful_labels=["LABEL_1"], device="cpu")(None, answers)
    assert report["metrics"]["harmful"]["num_harmful"] == verdicts.count(HARMFUL)
    assert report["metrics"]["harmful"]["num_empty"] == verdicts.count(EMPTY)
    assert report["metrics"]["task"]["num_records"] == 3
    assert report["judge"] == judge


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"model_name_or_path": "{tmp}/none"}, DataError, "model_name_or_path=.*no such folder"),
        ({"model_name_or_path": "{adapter}"}, DataError, "is a PEFT adapter; give a whole model"),
        ({"adapter": "{tmp}/none"}, DataError, "adapter=.*no such folder"),
        ({"adapter": "{other}"}, DataError, "is a whole model; give a PEFT adapter"),
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

    monkeypatch.setattr(evaluate.checkpoint, "load_model", no_loading)
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
