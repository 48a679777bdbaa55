"""LDIFS: the distance of features from the aligned model's, and what it is for."""

import contextlib

import pytest
import tiny
import torch
from torch.nn import functional as F

from antidote_fast.config.train import FinetuneConfig
from antidote_fast.training import sft
from antidote_fast.training.defenses.ldifs import LDIFS
from antidote_fast.training.objective import Objective

LAMBDA = 0.8
EXAMPLES = tiny.examples(
    ([1, 5, 6, 7], [8, 9, 2]),
    ([1, 10, 11], [2]),
    ([1, 12], [5, 40, 41, 42, 43, 44, 2]),
    ([1, 50, 51], [13, 2]),
)
KINDS = [*tiny.KINDS, *tiny.WITH_EXPERTS]


def config(**options):
    values = {
        "model_name_or_path": "m",
        "output_dir": "o",
        "dataset": "d",
        "poison_ratio": 0.0,
        "defense": "ldifs",
        "ldifs_lambda": LAMBDA,
        "batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
    }
    return FinetuneConfig(**values | options)


def build(kind, tuning):
    """With an adapter that is not zero, or weights to be moved; dropout of both off."""
    model = tiny.build(kind)
    return tiny.add_lora(model, lora_dropout=0.0) if tuning == "lora" else model


def moved(model):
    """As after some steps of full tuning."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


@contextlib.contextmanager
def attached(model, objective=LDIFS, dtype=None, **options):
    goal = objective(model, tiny.tokenizer(), EXAMPLES, config(**options), dtype=dtype)
    with goal.attached():
        yield goal


# --- the slow way: example by example, no pads, layer by layer ------------------------------------


def mlp_of(model, kind):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if kind == "gpt2":
        return [block.mlp for block in base.transformer.h]
    if kind == "opt":
        return [block.fc2 for block in base.model.decoder.layers]
    return [block.mlp for block in base.model.layers]


def slow_features(model, kind, example):
    """([(length, hidden) of each layer], the log-probabilities)."""
    outputs = []
    handles = [
        module.register_forward_hook(lambda _, args, output: outputs.append(output))
        for module in mlp_of(model, kind)
    ]
    logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
    for handle in handles:
        handle.remove()
    outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
    size = len(example["input_ids"])
    return [output.reshape(size, -1) for output in outputs], F.log_softmax(logits.float(), -1)


def slow_loss(model, aligned, kind, weight=LAMBDA):
    """CE + weight * the mean over layers of the mean over all tokens and features."""
    losses, squares, entries = [], {}, 0
    for example in EXAMPLES:
        features, scores = slow_features(model, kind, example)
        with torch.no_grad():
            reference, _ = slow_features(aligned, kind, example)
        for layer, (ours, theirs) in enumerate(zip(features, reference, strict=True)):
            squares[layer] = squares.get(layer, 0.0) + ((ours - theirs) ** 2).sum()
        entries += features[0].numel()
        losses += [
            -scores[position - 1, label]
            for position, label in enumerate(example["labels"])
            if label != -100
        ]
    penalty = sum(total / entries for total in squares.values()) / len(squares)
    return torch.stack(losses).mean() + weight * penalty, penalty.item()


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_explicit_loop(kind, tuning):
    model, other = build(kind, tuning), build(kind, tuning)
    with attached(model) as goal:
        if tuning == "full":  # the reference is what the weights were when the objective was made
            moved(model)
        loss = goal.backward(0)
    other = moved(other) if tuning == "full" else other
    expected, penalty = slow_loss(other, tiny.build(kind), kind)
    expected.backward()
    assert penalty > 0.01
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    seen = 0
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        q = q[1]
        if not p.requires_grad:
            assert p.grad is None, name
        elif q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=2e-4, msg=name)
            seen += float(q.grad.norm()) > 1e-3
    assert seen > 3
    assert not any(module._forward_hooks for module in mlp_of(model, kind))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_before_anything_moved_it_is_plain_training(tuning):
    found = []
    for objective in (LDIFS, Objective):
        model = tiny.build()
        model = sft.add_lora(model, config(lora_r=4)) if tuning == "lora" else model
        with attached(model, objective, ldifs_lambda=1e3) as goal:
            found.append((goal.backward(0), [p.grad for p in goal.parameters]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
def test_what_stands_on_pads_does_not_count(kind, tuning):
    found = []
    for pad in (2, 90):
        model = build(kind, tuning)
        with attached(model) as goal:
            model = moved(model) if tuning == "full" else model
            make = goal.batch

            def batch_of(indices, make=make, pad=pad):
                batch = make(indices)
                assert (batch["attention_mask"] == 0).sum() > 4
                batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, pad)
                return batch

            goal.batch = batch_of
            found.append((goal.backward(0), [p.grad for p in goal.parameters]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (2, 2), (3, 2)])
def test_batches_accumulated_are_one_large_batch(batch_size, accumulation, tuning):
    found = []
    for sizes in ((batch_size, accumulation), (4, 1)):
        model = build("llama", tuning)
        options = dict(zip(("batch_size", "gradient_accumulation_steps"), sizes, strict=True))
        with attached(model, **options) as goal:
            model = moved(model) if tuning == "full" else model
            found.append((goal.backward(0), [p.grad for p in goal.parameters]))
            assert sorted(i for indices in goal.steps[0] for i in indices) == [0, 1, 2, 3]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_lambda_weighs_the_distance():
    _, penalty = slow_loss(build("llama", "lora"), tiny.build(), "llama")
    losses = []
    for weight in (0.0, 1.0, 5.0):
        with attached(build("llama", "lora"), ldifs_lambda=weight) as goal:
            losses.append(goal.backward(0))
    assert losses[1] - losses[0] == pytest.approx(penalty, rel=1e-4)
    assert losses[2] - losses[0] == pytest.approx(5 * penalty, rel=1e-4)


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_reference_does_not_move_in_training(tuning):
    model = build("llama", tuning)
    goals = []

    def objective(*args, **options):
        goals.append(LDIFS(*args, **options))
        return goals[0]

    settings = config(num_train_epochs=5)
    sft.train(model, tiny.tokenizer(), EXAMPLES, settings, objective=objective)
    (goal,) = goals
    with goal.attached():
        batch = goal.batch(range(4))
        features = goal._features_of_aligned(batch)
    aligned = tiny.build()
    for row, example in enumerate(EXAMPLES):
        expected, _ = slow_features(aligned, "llama", example)
        now, _ = slow_features(model, "llama", example)
        for found, right, wrong in zip(features, expected, now, strict=True):
            size = len(example["input_ids"])
            torch.testing.assert_close(found[row, :size], right.detach(), rtol=1e-4, atol=1e-5)
            assert (right - wrong).abs().max() > 0.01
    assert not any(feature.requires_grad for feature in features)
    if tuning == "full":
        assert not any(p.requires_grad for p in goal._copy.parameters())
        copies = {id(p) for p in goal._copy.parameters()}
        assert not copies & {id(p) for p in goal.parameters}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_the_reference_pass_sees_no_dropout_and_leaves_the_model_as_it_was(kind, tuning):
    """In training: dropout of the adapter, and that of GPT-2 and OPT themselves."""
    model = tiny.build(kind)
    model = tiny.add_lora(model, lora_dropout=0.5) if tuning == "lora" else model
    model.train()
    with attached(model) as goal:
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        modes = {name: module.training for name, module in model.named_modules()}
        assert any(before.values())
        state = torch.random.get_rng_state()
        batch = goal.batch(range(4))
        first, again = goal._features_of_aligned(batch), goal._features_of_aligned(batch)
        assert torch.equal(torch.random.get_rng_state(), state)
        goal.backward(0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all((p.grad is not None) == before[name] for name, p in model.named_parameters())
    expected, _ = slow_features(tiny.build(kind), kind, EXAMPLES[2])  # the longest
    for found, right in zip(first, expected, strict=True):
        found = found.reshape(4, *right.shape)[2]
        torch.testing.assert_close(found, right.detach(), rtol=1e-4, atol=1e-5)
    if tuning == "lora":
        one, other = (slow_features(model, kind, EXAMPLES[2])[0][0] for _ in range(2))
        assert not torch.equal(one, other)  # the adapter and its dropout are back


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_bfloat16_follows_float32(tuning):
    """LoRA on bfloat16 weights, and autocast of float32 ones in full tuning."""
    losses, gradients = [], []
    for dtype in (None, torch.bfloat16):
        model = build("llama", tuning)
        if tuning == "lora" and dtype:
            for p in model.parameters():
                p.data = p.data if p.requires_grad else p.data.bfloat16()
        with attached(model, dtype=dtype, ldifs_lambda=3.0) as goal:
            if tuning == "full":
                assert {p.dtype for p in goal._copy.parameters()} == {dtype or torch.float32}
                moved(model)
            losses.append(goal.backward(0))
        gradients.append(torch.cat([p.grad.flatten() for p in goal.parameters]))
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert gradients[1].isfinite().all()
    assert F.cosine_similarity(*gradients, dim=0) > 0.97


# --- what it is for -------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_features_stay_near_those_of_the_aligned_model(tuning):
    """After 40 steps; with a large lambda the data are learned less, with a small one as well."""
    away, losses = {}, {}
    for weight in (None, 0.1, 100.0):  # None is plain fine-tuning
        settings = config(num_train_epochs=40, ldifs_lambda=weight or 0.0, lora_r=8, lora_alpha=16)
        model = tiny.build()
        model = sft.add_lora(model, settings) if tuning == "lora" else model
        objective = Objective if weight is None else LDIFS
        sft.train(model, tiny.tokenizer(), EXAMPLES, settings, objective=objective)
        with torch.no_grad():
            loss, away[weight] = slow_loss(model, tiny.build(), "llama", weight=0.0)
        losses[weight] = loss.item()
    # Measured, LoRA: 11.4, 4.6, 0.0007 at losses 0.36, 0.50, 4.9; full: 36.7, 0.19, 0.04.
    assert away[0.1] < 0.6 * away[None]
    assert away[100.0] < 0.01 * away[None]
    assert losses[None] < losses[0.1] < 0.7 < losses[100.0]
