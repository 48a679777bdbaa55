"""Vaccine: the size and direction of the shift, what the step descends, and what it is for."""

import contextlib

import pytest
import tiny
import torch
from torch.nn import functional as F

from antidote_fast.config.train import AlignConfig
from antidote_fast.training import sft
from antidote_fast.training.defenses.vaccine import Vaccine
from antidote_fast.training.objective import Objective

RHO = 0.7
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
        "defense": "vaccine",
        "vaccine_rho": RHO,
        "batch_size": 4,
        "num_train_epochs": 1,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
    }
    return AlignConfig(**values | options)


def build(kind, tuning, **options):
    model = tiny.build(kind)
    return tiny.add_lora(model, **options) if tuning == "lora" else model


@contextlib.contextmanager
def attached(model, dtype=None, **options):
    goal = Vaccine(model, tiny.tokenizer(), EXAMPLES, config(**options), dtype=dtype)
    with goal.attached():
        yield goal


def shifts_of(goal, number=0):
    """Of a step's batches, as backward takes them, and the batches."""
    batches = [goal.batch(indices) for indices in goal.steps[number]]
    total = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    return goal.shifts(batches, total), batches


def in_float64(model):
    # Grouped products of experts know no float64.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config._experts_implementation = "eager"
    return model.double()


# --- the slow way: example by example, no pads, constants added by hooks of its own, in float64 ---


def attention_of(model, kind):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if kind == "gpt2":
        return [block.attn for block in base.transformer.h]
    layers = base.model.decoder.layers if kind == "opt" else base.model.layers
    return [block.self_attn for block in layers]


@contextlib.contextmanager
def added(modules, constants):
    def hook_of(constant):
        return lambda _, args, output: (output[0] + constant, *output[1:])

    handles = [
        module.register_forward_hook(hook_of(constant))
        for module, constant in zip(modules, constants, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_ce(model, kind, examples, constants):
    """Mean over the response tokens of all examples; constants[i][l] is added at layer l."""
    losses = []
    for example, each in zip(examples, constants, strict=True):
        with added(attention_of(model, kind), each):
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        scores = F.log_softmax(logits, -1)
        losses += [
            -scores[position - 1, label]
            for position, label in enumerate(example["labels"])
            if label != -100
        ]
    return torch.stack(losses).mean()


def zeros(model, examples):
    size, layers = model.config.hidden_size, model.config.num_hidden_layers
    return [
        [
            torch.zeros(1, len(example["input_ids"]), size, dtype=torch.float64, requires_grad=True)
            for _ in range(layers)
        ]
        for example in examples
    ]


def slow_gradients(model, kind, examples):
    """dL/de_l of each example and layer; ``model`` in float64."""
    constants = zeros(model, examples)
    flat = [constant for each in constants for constant in each]
    found = iter(torch.autograd.grad(mean_ce(model, kind, examples, constants), flat))
    return [[next(found) for _ in each] for each in constants]


def norm_of(tensors):
    return float(torch.cat([t.double().flatten() for each in tensors for t in each]).norm())


def by_example(shifts, batches, indices):
    """Shifts in the shape of slow_gradients, in the order of EXAMPLES, and what lies on pads."""
    found, on_pads = {}, []
    rows = [
        (shift, batch, row)
        for shift, batch in zip(shifts, batches, strict=True)
        for row in range(len(batch["input_ids"]))
    ]
    for index, (shift, batch, row) in zip(indices, rows, strict=True):
        size = int(batch["attention_mask"][row].sum())
        length = batch["input_ids"].shape[1]
        whole = [each.reshape(len(batch["input_ids"]), length, -1)[row] for each in shift]
        found[index] = [each[None, :size].double() for each in whole]
        on_pads += [each[size:] for each in whole]
    return [found[index] for index in sorted(found)], torch.cat(on_pads)


# --- the shift ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_shift_is_rho_times_the_gradient_over_its_norm_in_all_layers(kind, tuning):
    model = build(kind, tuning)
    with attached(model) as goal:
        shifts, batches = shifts_of(goal)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in attention_of(model, kind))
    ours, on_pads = by_example(shifts, batches, [i for each in goal.steps[0] for i in each])
    assert norm_of(shifts) == pytest.approx(RHO, rel=1e-5)
    assert len(on_pads) > 0
    assert on_pads.count_nonzero() == 0

    gradients = slow_gradients(in_float64(build(kind, tuning)), kind, EXAMPLES)
    norm = norm_of(gradients)
    assert norm > 0.1
    for mine, slow in zip(ours, gradients, strict=True):
        for a, b in zip(mine, slow, strict=True):
            torch.testing.assert_close(a, RHO * b / (norm + 1e-7), rtol=2e-3, atol=2e-5)


def test_slopes_along_the_shift_and_another_direction_by_finite_differences():
    """Along it the loss rises by the norm of the gradient, along others by their share of it."""
    model = tiny.build()
    with attached(model) as goal:
        shifts, batches = shifts_of(goal)
    ours, _ = by_example(shifts, batches, [i for each in goal.steps[0] for i in each])
    double = in_float64(tiny.build())
    norm = norm_of(slow_gradients(double, "llama", EXAMPLES))
    generator = torch.Generator().manual_seed(0)
    other = [
        [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in each]
        for each in ours
    ]

    @torch.no_grad()
    def slope(direction, h=2e-3):  # norms and softmax compute in float32 even here
        up, down = (
            mean_ce(double, "llama", EXAMPLES, [[sign * h * t for t in each] for each in direction])
            for sign in (1, -1)
        )
        return float(up - down) / (2 * h)

    assert slope(ours) == pytest.approx(RHO * norm, rel=1e-3)
    share = sum(
        float((a * b).sum())
        for mine, theirs in zip(ours, other, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    assert abs(share) > 0.1
    assert slope(other) == pytest.approx(share * norm / RHO, rel=1e-3)


def test_a_gradient_that_has_all_but_vanished_is_not_blown_up(monkeypatch):
    model = tiny.build()
    norm = norm_of(slow_gradients(in_float64(tiny.build()), "llama", EXAMPLES)) * 1e-7
    loss = Vaccine.loss
    monkeypatch.setattr(Vaccine, "loss", lambda self, batch: loss(self, batch) * 1e-7)
    with attached(model) as goal:
        shifts, _ = shifts_of(goal)
    assert 0.1 < norm / (norm + 1e-7) < 0.9
    assert norm_of(shifts) == pytest.approx(RHO * norm / (norm + 1e-7), rel=1e-4)


def test_pads_are_not_shifted_even_by_a_loss_that_sees_them(monkeypatch):
    """Right pads have no gradient by themselves; a router's balancing loss may give them one."""
    model = tiny.build()

    def loss_of_all(batch):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return model.model(**inputs).last_hidden_state[..., :5].sum()

    with attached(model) as goal:
        monkeypatch.setattr(goal, "loss", loss_of_all)
        shifts, batches = shifts_of(goal)
    ours, on_pads = by_example(shifts, batches, [i for each in goal.steps[0] for i in each])
    assert len(on_pads) > 0
    assert on_pads.count_nonzero() == 0
    assert norm_of(ours) == pytest.approx(RHO, rel=1e-5)
    assert min(float(t.norm()) for each in ours for t in each) > 0


@pytest.mark.parametrize("rho", [0.0, 3.0])
def test_rho_scales_the_shift(rho):
    with attached(tiny.build()) as goal, attached(tiny.build(), vaccine_rho=rho) as other:
        one, scaled = shifts_of(goal)[0], shifts_of(other)[0]
    for a, b in zip(one[0], scaled[0], strict=True):
        torch.testing.assert_close(b, a * (rho / RHO))


def test_where_no_lower_output_needs_a_gradient_by_itself():
    """Adapters on down_proj alone: below the first one nothing would have a graph."""
    model = build("llama", "lora", target_modules=["down_proj"])
    with attached(model) as goal:
        shifts, batches = shifts_of(goal)
        ours, _ = by_example(shifts, batches, [i for each in goal.steps[0] for i in each])
        goal.backward(0)
    double = in_float64(build("llama", "lora", target_modules=["down_proj"]))
    gradients = slow_gradients(double, "llama", EXAMPLES)
    assert min(float(each[0].norm()) for each in ours) > 0
    for mine, slow in zip(ours, gradients, strict=True):
        for a, b in zip(mine, slow, strict=True):
            torch.testing.assert_close(a, RHO * b / norm_of(gradients), rtol=2e-3, atol=2e-5)
    mean_ce(double, "llama", EXAMPLES, ours).backward()
    compare_gradients(model, double)


# --- the step -------------------------------------------------------------------------------------


def compare_gradients(model, slow, rtol=2e-3, atol=2e-4):
    seen = 0
    for (name, p), q in zip(model.named_parameters(), slow.parameters(), strict=True):
        if not p.requires_grad:
            assert p.grad is None, name
        elif q.grad is None:  # an expert that no token went to, say
            assert p.grad is None or p.grad.count_nonzero() == 0, name
        else:
            torch.testing.assert_close(
                p.grad.double(), q.grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
            seen += float(q.grad.norm()) > 1e-3
    assert seen > 3


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3", "gpt2", "opt", "mixtral"])
def test_the_step_descends_the_loss_with_constant_shifts(kind, tuning):
    model = build(kind, tuning)
    with attached(model) as goal:
        loss = goal.backward(0)
    double = in_float64(build(kind, tuning))
    gradients = slow_gradients(double, kind, EXAMPLES)
    norm = norm_of(gradients)
    constants = [[RHO * g / (norm + 1e-7) for g in each] for each in gradients]
    shifted = mean_ce(double, kind, EXAMPLES, constants)
    shifted.backward()
    assert loss == pytest.approx(shifted.item(), rel=1e-4)
    assert loss > float(mean_ce(double, kind, EXAMPLES, zeros(model, EXAMPLES))) + 0.1
    compare_gradients(model, double)
    assert not any(module._forward_hooks for module in attention_of(model, kind))


def test_without_rho_it_is_plain_training():
    results = []
    for objective, rho in ((Vaccine, 0.0), (Objective, RHO)):
        model = tiny.build()
        goal = objective(model, tiny.tokenizer(), EXAMPLES, config(vaccine_rho=rho))
        with goal.attached():
            results.append((goal.backward(0), [p.grad for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 2), (1, 4), (2, 2)])
def test_batches_accumulated_are_one_large_batch(batch_size, accumulation, tuning):
    results = []
    for sizes in ((batch_size, accumulation), (batch_size * accumulation, 1)):
        model = build("llama", tuning)
        options = dict(zip(("batch_size", "gradient_accumulation_steps"), sizes, strict=True))
        with attached(model, **options) as goal:
            loss = goal.backward(0)
            shifts, batches = shifts_of(goal)
        steps = sorted(i for indices in goal.steps[0] for i in indices)
        ours, _ = by_example(shifts, batches, [i for each in goal.steps[0] for i in each])
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss, steps, ours, gradients))
        assert norm_of(shifts) == pytest.approx(RHO, rel=1e-5)
    small, large = results
    assert small[1] == large[1]
    assert small[0] == pytest.approx(large[0], rel=1e-5)
    for a, b in zip(small[2], large[2], strict=True):
        for mine, theirs in zip(a, b, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    for name, gradient in small[3].items():
        torch.testing.assert_close(gradient, large[3][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_bfloat16_follows_float32(tuning):
    """LoRA on bfloat16 weights, and autocast of float32 ones in full tuning."""
    exact, rough = build("llama", tuning), build("llama", tuning)
    if tuning == "lora":
        for p in rough.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()
    found = []
    for model, dtype in ((exact, None), (rough, torch.bfloat16)):
        with attached(model, dtype) as goal:
            shifts, _ = shifts_of(goal)
            loss = goal.backward(0)
        shift = torch.cat([t.double().flatten() for each in shifts for t in each])
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((shift, gradient, loss))
    assert shifts[0][0].dtype == torch.bfloat16
    assert found[1][0].norm() == pytest.approx(RHO, rel=1e-2)
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        assert b.isfinite().all()
        assert F.cosine_similarity(a, b, dim=0) > 0.97
    assert found[1][2] == pytest.approx(found[0][2], rel=0.03)


# --- what it is for -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_a_shift_of_attention_harms_less_after_it_than_after_plain_training(seed):
    """Each model's own worst shift of norm 4, on the training data after 80 steps."""
    shifted = {}
    for objective in (Objective, Vaccine):
        options = {"vaccine_rho": 4.0, "num_train_epochs": 80, "learning_rate": 1e-2, "seed": seed}
        settings = config(lora_r=8, lora_alpha=16, **options)
        model = sft.add_lora(tiny.build(seed=seed), settings)
        result = sft.train(model, tiny.tokenizer(), EXAMPLES, settings, objective=objective)
        assert result["steps"] == 80
        with attached(model, vaccine_rho=4.0) as goal:
            shifted[objective] = goal.backward(0)
    # Measured: 0.33 and 1.05, 0.54 and 1.10; seeds 2 to 4 are like these.
    assert shifted[Vaccine] < 0.7 * shifted[Objective]
