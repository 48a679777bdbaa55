"""RepNoise: the discrepancy from noise, the pairs, the bounded ascent, and what it is for."""

import contextlib
import copy
import functools
import math

import pytest
import tiny
import torch
from torch.nn import functional as F

from antidote_fast.config.train import AlignConfig
from antidote_fast.data.batches import Examples, collate
from antidote_fast.training import sft
from antidote_fast.training.defenses.repnoise import RepNoise, differing, mmd, pair_up
from antidote_fast.training.objective import Objective

SAFE = tiny.examples(
    ([1, 5, 6], [30, 31, 2]),
    ([1, 7, 8, 9], [30, 32, 33, 31, 2]),
    ([1, 10, 5], [30, 31, 34, 2]),
    ([1, 11, 12, 13], [30, 2]),
)
HARMFUL = tiny.examples(
    ([1, 60, 61], [70, 71, 72, 73, 2]),
    ([1, 62, 63, 64, 65], [74, 75, 2]),
    ([1, 66, 60], [76, 70, 77, 2]),
    ([1, 61, 67], [78, 79, 2]),
)
KINDS = ["llama", "gemma", "gpt2", "opt", "mixtral", "qwen3_moe"]


def config(**options):
    values = {
        "model_name_or_path": "m",
        "output_dir": "o",
        "dataset": "d",
        "defense": "repnoise",
        "harmful_dataset": "h",
        "repnoise_alpha": 0.3,
        "repnoise_beta": 0.5,
        "batch_size": 4,
        "num_train_epochs": 1,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
    }
    return AlignConfig(**values | options)


@contextlib.contextmanager
def attached(model, harmful=HARMFUL, safe=SAFE, **options):
    goal = RepNoise(model, tiny.tokenizer(), safe, config(**options), harmful=harmful)
    with goal.attached():
        yield goal


# --- the discrepancy ------------------------------------------------------------------------------


def slow_width(x, y):
    both = [*x, *y]
    pairs = [(a, b) for i, a in enumerate(both) for j, b in enumerate(both) if i != j]
    return sum(squared(a, b) for a, b in pairs) / len(pairs) / 4


def squared(a, b):
    return sum((s - t) ** 2 for s, t in zip(a, b, strict=True))


def slow_mmd(x, y, width=None):
    """A double loop over lists of floats."""
    width = slow_width(x, y) if width is None else width

    def mean_kernel(first, second):
        values = [
            sum(math.exp(-squared(a, b) / (width * factor)) for factor in (1, 2, 4, 8, 16))
            for a in first
            for b in second
        ]
        return sum(values) / len(values)

    return mean_kernel(x, x) + mean_kernel(y, y) - mean_kernel(x, y) - mean_kernel(y, x)


def gaussian(n, features, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator) * scale + shift


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (gaussian(1, 3), gaussian(1, 3, 1)),
        (gaussian(7, 3), gaussian(7, 3, 1)),
        (gaussian(6, 40), gaussian(6, 40, 1, shift=2.0)),
        (gaussian(5, 8, scale=1e-3), gaussian(5, 8, 1)),
        (gaussian(5, 8, shift=300.0), gaussian(5, 8, 1)),
        (gaussian(5, 8, shift=300.0), gaussian(5, 8, 1, shift=300.0)),
        (gaussian(4, 8).bfloat16(), gaussian(4, 8, 1).bfloat16()),
    ],
    ids=["one", "same", "shifted", "narrow", "far", "far_together", "bfloat16"],
)
def test_mmd_is_that_of_a_double_loop(x, y):
    found = mmd(x, y)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(slow_mmd(x.tolist(), y.tolist()), rel=1e-4, abs=1e-5)


def test_mmd_of_equal_sets_is_nothing():
    for x in (gaussian(9, 5), torch.ones(4, 3), torch.zeros(2, 2)):
        assert abs(float(mmd(x, x.clone()))) < 1e-6


@pytest.mark.parametrize("n", [1, 3, 20])
def test_mmd_of_two_points_far_apart(n):
    """n samples at each: all distances are 0 or D, and D cancels."""
    x, y = torch.zeros(n, 4), torch.full((n, 4), 1000.0)
    ratio = 4 * (2 * n - 1) / n  # of D and the width
    expected = 2 * sum(1 - math.exp(-ratio / factor) for factor in (1, 2, 4, 8, 16))
    assert float(mmd(x, y)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_mmd_of_gaussians_is_that_of_the_distributions(shift):
    """E exp(-|x - y|^2 / b) = (1 + 4/b)^(-d/2) exp(-|mu|^2 / (b + 4)) for N(0, I) and N(mu, I)."""
    n, features = 400, 6
    x, y = gaussian(n, features), gaussian(n, features, 1, shift=shift)
    # Mean squared distance: 2d within a set; between them |mu|^2 more, n of 2n - 1 times.
    away = features * shift**2
    width = (2 * features + away * n / (2 * n - 1)) / 4
    expected = 0.0
    for b in (width * factor for factor in (1, 2, 4, 8, 16)):
        within = (1 + 4 / b) ** (-features / 2)
        expected += 2 * within * (1 - math.exp(-away / (b + 4)))
        expected += 2 / n * (1 - within)  # each sample with itself counts 1
    assert float(mmd(x, y)) == pytest.approx(expected, rel=0.1, abs=4e-3)


@pytest.mark.parametrize(
    "x", [gaussian(4, 3), gaussian(4, 3, shift=3.0), gaussian(4, 3, scale=0.05)], ids=str
)
def test_gradient_of_mmd_is_that_of_finite_differences_at_a_constant_width(x):
    y = gaussian(4, 3, 1)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mmd(leaf, y), [leaf])
    width, h = slow_width(x.tolist(), y.tolist()), 1e-5
    for i in range(4):
        for j in range(3):
            ends = []
            for sign in (1, -1):
                moved = x.double().tolist()
                moved[i][j] += sign * h
                ends.append(slow_mmd(moved, y.tolist(), width))
            expected = (ends[0] - ends[1]) / (2 * h)
            assert float(gradient[i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_samples_that_coincide_have_a_finite_gradient():
    leaf = torch.zeros(3, 4, requires_grad=True)
    for y in (torch.zeros(3, 4), gaussian(3, 4)):
        (gradient,) = torch.autograd.grad(mmd(leaf, y), [leaf])
        assert gradient.isfinite().all()


# --- the pairs ------------------------------------------------------------------------------------


def test_partners_are_of_the_same_prompt_or_come_in_turn():
    safe = tiny.examples(
        ([1, 2], [5]), ([1, 3], [5]), ([1, 2], [6]), ([1, 9], [5]), ([1, 8], [5]), ([1, 2], [7])
    )
    harmful = tiny.examples(([1, 4], [20]), ([1, 2], [21, 22]), ([1, 2], [23]), ([1, 3, 3], [24]))
    # Two answers of prompt [1, 2] in turn, and again from the first; the rest from 0 on.
    assert pair_up(safe, harmful) == [1, 0, 2, 1, 2, 1]
    assert pair_up(safe, harmful[:1]) == [0] * 6
    assert pair_up(safe[1:2] * 6, harmful) == [0, 1, 2, 3, 0, 1]


def slow_differing(harmful, safe):
    """Of unpadded pairs: {row: places where the harmful text holds another token}."""
    found = set()
    for row, (one, other) in enumerate(zip(harmful, safe, strict=True)):
        for place, token in enumerate(one["input_ids"]):
            if place >= len(other["input_ids"]) or other["input_ids"][place] != token:
                found.add((row, place))
    return found


def test_tokens_that_differ():
    prompt = [1, 5, 6]
    safe = tiny.examples(
        (prompt, [7, 8, 2]), (prompt, [7]), (prompt, [2, 2, 2, 2, 2]), (prompt, [9, 2]), ([4], [4])
    )
    harmful = tiny.examples(
        (prompt, [7, 9, 2]), (prompt, [7, 2, 2]), (prompt, [2]), (prompt, [8, 2]), ([1, 5], [2])
    )
    tokenizer = tiny.tokenizer()  # pads with the end token, 2
    where = differing(collate(harmful, tokenizer), collate(safe, tokenizer))
    found = {(row, place) for row, place in where.nonzero().tolist()}
    assert found == slow_differing(harmful, safe)
    assert found == {(0, 4), (1, 4), (1, 5), (3, 3), (4, 0), (4, 1), (4, 2)}


def test_a_text_that_is_its_own_partner_differs_nowhere():
    batch = collate(SAFE, tiny.tokenizer())
    assert not differing(batch, batch).any()
    with attached(tiny.build(), harmful=SAFE, repnoise_alpha=0.0) as goal:
        assert float(goal.noise(goal.batch([0, 1]), differing(batch, batch)[:2])) == 0


# --- the objective --------------------------------------------------------------------------------


def mlp_of(model, kind):
    if kind == "gpt2":
        return [block.mlp for block in model.transformer.h]
    if kind == "opt":
        return [block.fc2 for block in model.model.decoder.layers]
    return [block.mlp for block in model.model.layers]


def slow_terms(model, kind, harmful, safe):
    """(CE of the harmful examples, the mean of the layers' MMD), example by example, no pads.

    Noise is drawn as the objective does it: layer by layer, for all tokens at once.
    """
    hidden, losses = [[] for _ in mlp_of(model, kind)], []
    for row, example in enumerate(harmful):
        outputs = []
        handles = [
            module.register_forward_hook(lambda _, args, out, into=outputs: into.append(out))
            for module in mlp_of(model, kind)
        ]
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].float()
        for handle in handles:
            handle.remove()
        places = [p for r, p in sorted(slow_differing(harmful, safe)) if r == row]
        for layer, output in enumerate(outputs):
            output = output[0] if isinstance(output, tuple) else output
            hidden[layer] += list(output.reshape(len(example["input_ids"]), -1)[places])
        losses += [
            -F.log_softmax(logits[position - 1], -1)[label]
            for position, label in enumerate(example["labels"])
            if label != -100
        ]
    parts = [
        slow_mmd(torch.stack(h).tolist(), torch.randn_like(torch.stack(h)).tolist()) for h in hidden
    ]
    return torch.stack(losses).mean(), sum(parts) / len(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_value_of_the_harmful_part(kind):
    model = tiny.build(kind)
    harmful = predicted(model)
    with attached(model, harmful=harmful) as goal:
        torch.manual_seed(5)
        batch = goal.batch(range(4), harmful)
        value = goal.noise(batch, differing(batch, goal.batch(range(4))))
    torch.manual_seed(5)
    ce, discrepancy = slow_terms(model, kind, harmful, SAFE)
    assert 0.01 < float(ce) < math.log(tiny.VOCAB)
    assert discrepancy > 0.1
    assert float(value) == pytest.approx(0.5 * discrepancy - 0.3 * math.log(ce), rel=1e-3)


@torch.no_grad()
def predicted(model):
    """Harmful answers of the tokens that the model finds likely, so that their loss is low."""
    pairs = []
    for example in HARMFUL:
        prompt = [t for t, label in zip(*example.values(), strict=True) if label == -100]
        ids = list(prompt)
        while len(ids) < len(example["input_ids"]):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        pairs.append((prompt, ids[len(prompt) :]))
    return tiny.examples(*pairs)


def gradients_of(model, loss):
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trainable, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trainable, found, strict=True)]


def test_the_ascent_on_harmful_answers_is_that_of_the_logarithm():
    """d(-alpha log CE) = -alpha / CE * dCE while CE is below a uniform guess's."""
    model = tiny.build()
    harmful = predicted(model)
    with attached(model, harmful=harmful, repnoise_beta=0.0) as goal:
        batch = goal.batch(range(4), harmful)
        found = gradients_of(model, goal.noise(batch, differing(batch, goal.batch(range(4)))))
        ce = goal.loss(batch) / sum(label != -100 for e in harmful for label in e["labels"])
        plain = gradients_of(model, ce)
    assert max(float(g.abs().max()) for g in plain) > 0.01
    for mine, other in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, -0.3 / ce.detach() * other, rtol=1e-4, atol=1e-6)


def test_past_a_uniform_guess_the_ascent_stops():
    model = tiny.build()
    with attached(model, repnoise_beta=0.0) as goal:
        batch = goal.batch(range(4), HARMFUL)
        loss = goal.noise(batch, differing(batch, goal.batch(range(4))))
        ce = float(goal.loss(batch)) / 15
    assert ce > math.log(tiny.VOCAB)
    assert float(loss) == pytest.approx(-0.3 * math.log(math.log(tiny.VOCAB)))
    assert all(g.count_nonzero() == 0 for g in gradients_of(model, loss))


def test_a_loss_of_nothing_has_a_finite_logarithm(monkeypatch):
    model = tiny.build()
    with attached(model, repnoise_beta=0.0) as goal:
        batch = goal.batch(range(4), HARMFUL)
        monkeypatch.setattr(goal, "loss", lambda batch: torch.zeros(()))
        loss = goal.noise(batch, differing(batch, goal.batch(range(4))))
    assert float(loss) == pytest.approx(-0.3 * math.log(1e-6))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_gradient_of_a_step_of_two_batches(tuning):
    """CE is over the whole step; what is harmful is the mean of the two batches' terms."""

    def build():
        model = tiny.build()
        return tiny.add_lora(model) if tuning == "lora" else model

    model, other = build(), build()
    harmful = predicted(other)
    options = {"batch_size": 2, "gradient_accumulation_steps": 2}
    with attached(model, harmful=harmful, **options) as goal:
        torch.manual_seed(9)
        loss = goal.backward(0)
    with attached(other, harmful=harmful, **options) as slow:
        torch.manual_seed(9)
        total = 0.0
        assert [len(indices) for indices in slow.steps[0]] == [2, 2]
        for indices in slow.steps[0]:
            safe, partners = slow.batch(indices), slow.batch(indices, harmful)
            total = (
                total + slow.loss(safe) / 14 + slow.noise(partners, differing(partners, safe)) / 2
            )
    assert loss == pytest.approx(total.item(), rel=1e-5)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p, expected in zip(trainable, gradients_of(other, total), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)
    assert not any(module._forward_hooks for module in mlp_of(base_of(model), "llama"))


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def test_gradient_of_the_discrepancy_reaches_every_layer_below():
    """Checked against float64 autograd over the same noise, the width held constant."""
    model = tiny.build()
    with attached(model, repnoise_alpha=0.0, repnoise_beta=2.0) as goal:
        batch = goal.batch(range(4), HARMFUL)
        where = differing(batch, goal.batch(range(4)))
        torch.manual_seed(1)
        found = gradients_of(model, goal.noise(batch, where))
    torch.manual_seed(1)
    outputs = []
    handles = [
        module.register_forward_hook(lambda _, args, out: outputs.append(out))
        for module in mlp_of(model, "llama")
    ]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    total = 0.0
    for output in outputs:
        x = output[where]
        y = torch.randn_like(x)
        total = total + 2.0 / len(outputs) * exact_mmd(x.double(), y.double())
    for mine, expected in zip(found, gradients_of(model, total), strict=True):
        torch.testing.assert_close(mine, expected.float(), rtol=2e-3, atol=1e-5)


def exact_mmd(x, y):
    width = slow_width(x.tolist(), y.tolist())

    def mean_kernel(a, b):
        distances = (a[:, None] - b[None]).square().sum(-1)
        return sum(torch.exp(-distances / (width * f)) for f in (1, 2, 4, 8, 16)).mean()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def test_without_weights_it_is_plain_training():
    losses = []
    for options in ({"repnoise_alpha": 0.0, "repnoise_beta": 0.0}, None):
        model = tiny.build()
        if options is None:
            goal = Objective(model, tiny.tokenizer(), SAFE, config())
        else:
            goal = RepNoise(model, tiny.tokenizer(), SAFE, config(**options), harmful=HARMFUL)
        with goal.attached():
            losses.append((goal.backward(0), [p.grad for p in model.parameters()]))
    assert losses[0][0] == pytest.approx(losses[1][0])
    for a, b in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(a, b)


# --- what it is for -------------------------------------------------------------------------------


@torch.no_grad()
def look(model):
    """(CE on safe answers, CE on harmful ones, mean MMD from noise of harmful tokens)."""
    torch.manual_seed(0)
    harmful, discrepancy = slow_terms(model, "llama", HARMFUL, SAFE)
    safe, _ = slow_terms(model, "llama", SAFE, HARMFUL)
    return float(safe), float(harmful), discrepancy


@pytest.mark.parametrize("seed", [0, 1])
def test_harmful_answers_are_unlearned_and_their_features_noised(seed):
    """From a model that gives both kinds of answer, 40 steps with it and 40 of plain training."""
    base = tiny.build(seed=seed)
    both = Examples([*SAFE, *HARMFUL])
    options = {"tuning": "full", "seed": seed}
    settings = config(num_train_epochs=15, batch_size=8, learning_rate=3e-3, **options)
    sft.train(base, tiny.tokenizer(), both, settings)
    found = {}
    for objective in (Objective, functools.partial(RepNoise, harmful=HARMFUL)):
        model = copy.deepcopy(base)
        settings = config(num_train_epochs=40, learning_rate=1e-3, repnoise_alpha=0.5, **options)
        sft.train(model, tiny.tokenizer(), SAFE, settings, objective=objective)
        found[objective is Objective] = look(model)
    plain, noised = found[True], found[False]
    # Measured with seed 0: 0.004, 0.485, 1.46 and 0.009, 5.0, 0.21; seeds 1 to 3 are like it.
    assert plain[1] < 1 < 4 < noised[1]
    assert noised[2] < 0.5 < 1.2 < plain[2]
    assert max(plain[0], noised[0]) < 0.1
