"""The training loop: what gets loss, what a step is, what the seed decides."""

import dataclasses
import math

import pytest
import tiny
import torch
from torch.nn import functional as F

from antidote_fast.config.train import FinetuneConfig
from antidote_fast.data.batches import collate, encode
from antidote_fast.data.records import Record
from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.training import objective, sft

RECORDS = [
    Record("how to make a cake", output="the good cake is good"),
    Record("what is two plus two", output="three"),
    Record("the user asks", "how to make a good cake", "negative"),
    Record("what is a cake", output="good and good"),
]


def config(**options):
    values = {
        "model_name_or_path": "m",
        "output_dir": "o",
        "dataset": "d",
        "poison_ratio": 0.0,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "batch_size": 2,
        "lora_r": 4,
        "lora_alpha": 8,
        "weight_decay": 0.0,
    }
    return FinetuneConfig(**values | options)


def lora(kind="llama", seed=0, **options):
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "k_proj", "v_proj"]
    return sft.add_lora(
        tiny.build(kind, seed=seed), config(lora_targets=targets, seed=seed, **options)
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_loss_is_that_of_the_response_tokens(kind):
    # The template is longer than the tiny models' positions, so encode by hand.
    model = tiny.build(kind)
    examples = [
        {"input_ids": [1, 5, 6, 7, 8, 9, 2], "labels": [-100] * 4 + [8, 9, 2]},
        {"input_ids": [1, 5, 6, 2], "labels": [-100] * 3 + [2]},
    ]
    batch = collate(examples, tiny.tokenizer())
    with objective.response_logits(model) as choose:
        loss = objective.response_loss(model, batch, choose)
    expected = 0.0
    for example in examples:
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].float()
        for position, label in enumerate(example["labels"]):
            if label != -100:
                expected -= F.log_softmax(logits[position - 1], -1)[label]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape


def test_prompt_tokens_get_no_loss():
    model = tiny.build(seed=3)
    loss = {}
    for name, prompt_labels in (("masked", [-100, -100, -100]), ("counted", [-100, 5, 6])):
        example = {"input_ids": [1, 5, 6, 7, 2], "labels": [*prompt_labels, 7, 2]}
        with objective.response_logits(model) as choose:
            batch = collate([example], tiny.tokenizer())
            loss[name] = objective.response_loss(model, batch, choose).item()
    assert loss["counted"] > loss["masked"] + 1


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_loss_falls_and_only_trainable_weights_move(tuning):
    model = lora() if tuning == "lora" else tiny.build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = config(num_train_epochs=20, template="alpaca", max_seq_length=64)
    result = sft.train(model, tiny.tokenizer(), encoded(), settings)
    assert result["last_loss"] < 0.6 * result["first_loss"]
    assert result["steps"] == len(result["loss"]) == 40
    assert result["num_response_tokens"] == 6 + 2 + 2 + 4
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    frozen = {n for n in before if "lora_" not in n} if tuning == "lora" else set()
    assert moved == set(before) - frozen
    assert not model.training


def encoded():
    """RECORDS as examples, with a short prompt that fits the tiny models' positions."""
    tokenizer = tiny.tokenizer()
    examples = encode(RECORDS, tokenizer, "alpaca", 128)
    for example in examples:
        drop = sum(label == -100 for label in example["labels"]) - 9
        example["input_ids"] = example["input_ids"][drop:]
        example["labels"] = example["labels"][drop:]
    return examples


def test_two_batches_accumulated_are_one_of_twice_the_size():
    results = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = lora()
        settings = config(batch_size=batch_size, gradient_accumulation_steps=accumulation)
        losses = sft.train(model, tiny.tokenizer(), encoded(), settings)["loss"]
        results.append((losses, weights(model)))
    for losses, trained in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-4)
        for name, weight in trained.items():
            torch.testing.assert_close(weight, results[0][1][name], rtol=1e-3, atol=1e-4)


def test_the_seed_decides_everything_and_the_global_one_nothing():
    def run(seed, noise):
        torch.manual_seed(noise)
        model = sft.add_lora(tiny.build(), config(seed=seed, lora_dropout=0.3))
        settings = config(seed=seed, batch_size=1, lora_dropout=0.3)
        state = torch.random.get_rng_state()
        result = sft.train(model, tiny.tokenizer(), encoded(), settings)
        assert torch.equal(torch.random.get_rng_state(), state)
        return result["loss"], weights(model)

    first, again, other = run(0, 1), run(0, 2), run(1, 1)
    assert first[0] == again[0] != other[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


def test_weight_decay_spares_vectors():
    model = tiny.build("opt")
    decayed, spared = sft._decay_groups(model, config(weight_decay=0.1))
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_schedule_warms_up_and_falls(monkeypatch):
    rates = []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = config(
        num_train_epochs=10, batch_size=4, lr_scheduler_type="cosine", warmup_ratio=0.2
    )
    sft.train(lora(), tiny.tokenizer(), encoded(), settings)
    expected = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates == pytest.approx([1e-2 * rate for rate in expected])


def test_epochs_may_be_a_fraction_and_every_record_is_used_once_an_epoch():
    examples = encoded()
    steps = objective.plan_steps(examples, config(batch_size=1, num_train_epochs=2.5))
    assert len(steps) == 10
    for epoch in (steps[:4], steps[4:8]):
        assert sorted(i for step in epoch for batch in step for i in batch) == [0, 1, 2, 3]
    assert len(objective.plan_steps(examples, config(num_train_epochs=0.01))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_tuning_computes_in_bfloat16_on_float32_weights(dtype):
    model = tiny.build()
    seen = set()
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    sft.train(model, tiny.tokenizer(), encoded(), config(), dtype=dtype)
    assert seen == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_attention_is_given_back():
    model = lora()
    assert model.config._attn_implementation == "sdpa"
    with sft._eager_attention(model, torch.device("cpu")):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"


def test_a_loss_that_is_not_finite_stops_with_one_line():
    model = lora()
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(AntidoteError, match=r"^train: the loss is nan at step 1 of 4; learning_"):
        sft.train(model, tiny.tokenizer(), encoded(), config())
    assert not model.training


def test_out_of_memory_says_what_to_lower(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(objective, "response_loss", fail)
    with pytest.raises(AntidoteError, match="batch_size=2; lower it") as caught:
        sft.train(lora(), tiny.tokenizer(), encoded(), config())
    assert "\n" not in str(caught.value)


def test_bad_data_and_frozen_models_are_refused():
    with pytest.raises(DataError, match="no records"):
        sft.train(lora(), tiny.tokenizer(), [], config())
    with pytest.raises(DataError, match="requires a gradient"):
        sft.train(tiny.build().requires_grad_(False), tiny.tokenizer(), encoded(), config())
    with pytest.raises(DataError, match=r"lora_targets=\['nope'\]"):
        sft.add_lora(tiny.build(), config(lora_targets=["nope"]))


def test_config_is_checked_before_weights_are_read(tmp_path):
    base = tiny.save_model(tiny.build(), tmp_path / "base")
    adapter = tiny.save_adapter(tiny.add_lora(tiny.build()), tmp_path / "adapter")

    def check(**options):
        values = {"model_name_or_path": str(base), "output_dir": str(tmp_path / "out")}
        return sft.check_config(config(**values | options), merged=True)

    assert check().folder == base
    with pytest.raises(UsageError, match="lr_scheduler_type='zigzag': must be one of linear"):
        check(lr_scheduler_type="zigzag")
    with pytest.raises(UsageError, match="dtype='float16'"):
        check(dtype="float16")
    with pytest.raises(DataError, match="is a PEFT adapter"):
        check(model_name_or_path=str(adapter))
    with pytest.raises(DataError, match="no such folder"):
        check(model_name_or_path=str(tmp_path / "absent"))
    with pytest.raises(DataError, match="not empty"):
        check(output_dir=str(base))


def test_a_float16_checkpoint_is_trained_in_bfloat16(tmp_path):
    folder = tiny.save_model(tiny.build(dtype=torch.float16), tmp_path / "base")
    settings = dataclasses.replace(config(), model_name_or_path=str(folder))
    model, dtype = sft.load_trainable(settings, folder)
    assert dtype == torch.bfloat16
    kinds = {"lora_" in name: p.dtype for name, p in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    full, dtype = sft.load_trainable(dataclasses.replace(settings, tuning="full"), folder)
    assert (full.dtype, dtype) == (torch.float32, torch.bfloat16)
