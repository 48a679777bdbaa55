"""Lisa: whose turn it is, the pull towards the other state's weights, and what both are for."""

import contextlib
import copy
import functools

import pytest
import tiny
import torch

from antidote_fast.config.train import FinetuneConfig
from antidote_fast.training import sft
from antidote_fast.training.defenses.lisa import Lisa, phases
from antidote_fast.training.objective import Objective, plan_steps

SAFE = tiny.examples(
    ([1, 5, 6], [30, 31, 2]), ([1, 7, 8, 9], [30, 32, 33, 31, 2]), ([1, 10, 5], [30, 31, 34, 2])
)
USER = tiny.examples(
    ([1, 60, 61], [70, 71, 72, 73, 2]),
    ([1, 62, 63, 64, 65], [74, 75, 2]),
    ([1, 66, 60], [76, 70, 77, 2]),
    ([1, 61, 67], [78, 79, 2]),
)


def config(**options):
    values = {
        "model_name_or_path": "m",
        "output_dir": "o",
        "dataset": "d",
        "poison_ratio": 0.0,
        "defense": "lisa",
        "safe_dataset": "s",
        "lisa_rho": 0.5,
        "lisa_alignment_steps": 2,
        "lisa_finetune_steps": 3,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 15,
        "weight_decay": 0.0,
        "lora_r": 4,
        "lora_alpha": 8,
    }
    return FinetuneConfig(**values | options)


def build(tuning, settings=None, seed=0):
    model = tiny.build(seed=seed)
    return sft.add_lora(model, settings or config()) if tuning == "lora" else model


@contextlib.contextmanager
def attached(model, settings, safe=SAFE):
    goal = Lisa(model, tiny.tokenizer(), USER, settings, safe=safe)
    with goal.attached():
        yield goal


# --- whose turn it is -----------------------------------------------------------------------------


def test_phases_of_the_papers_run():
    turns = phases(20000, 100, 900)
    assert len(turns) == 20000
    for start in range(0, 20000, 1000):
        assert turns[start : start + 1000] == [True] * 100 + [False] * 900


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, "A"),
        (2, "Au"),
        (5, "AuAuA"),
        (10, "AuAuAuAuAu"),
        (25, "Auuuu" * 5),
        (50, "Auuuuuuuuu" * 5),
        (100, ("AA" + "u" * 18) * 5),
        (104, ("AA" + "u" * 18) * 5 + "AAuu"),
    ],
)
def test_short_runs_have_five_rounds(steps, expected):
    assert "".join("A" if turn else "u" for turn in phases(steps, 100, 900)) == expected


@pytest.mark.parametrize("asked", [(100, 900), (1, 1), (3, 5), (900, 100), (1, 40), (7, 2)])
def test_both_kinds_come_and_a_round_keeps_the_ratio_as_well_as_whole_steps_can(asked):
    share = asked[0] / sum(asked)
    for steps in range(2, 400):
        turns = phases(steps, *asked)
        assert len(turns) == steps
        assert turns[0]
        assert not all(turns)
        length = min(sum(asked), max(2, steps // 5))
        assert turns == [turns[number % length] for number in range(steps)]
        count = sum(turns[:length])
        assert turns[:length] == [True] * count + [False] * (length - count)
        errors = [abs(each / length - share) for each in range(1, length)]
        assert abs(count / length - share) == pytest.approx(min(errors))


def test_a_run_has_as_many_steps_as_without_it_and_the_users_data_in_that_order():
    settings = config()
    with attached(build("full"), settings) as goal:
        steps, turns = goal.steps, goal.is_alignment
    plain = plan_steps(USER, settings)
    assert len(steps) == len(plain) == 30
    assert turns == phases(30, 2, 3)
    user = [step for step, turn in zip(steps, turns, strict=True) if not turn]
    assert user == plain[:18]
    safe = [i for step, turn in zip(steps, turns, strict=True) if turn for b in step for i in b]
    for start in range(0, len(safe) - 2, 3):  # every epoch of safe data has each once
        assert sorted(safe[start : start + 3]) == [0, 1, 2]


def test_safe_data_are_gone_through_as_often_as_it_takes():
    with attached(build("full"), config(), safe=SAFE[:1]) as goal:
        taken = [step for step, turn in zip(goal.steps, goal.is_alignment, strict=True) if turn]
    assert taken == [[[0]]] * 12


# --- the pull -------------------------------------------------------------------------------------


def filled(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in parameters]


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("number", [7, 9], ids=["user", "safe"])
def test_gradient_is_that_of_the_loss_and_half_rho_times_the_squared_distance(number, tuning):
    settings = config(gradient_accumulation_steps=2, num_train_epochs=20)
    model = build(tuning)
    with attached(model, settings) as goal:
        turn = goal.is_alignment[number]
        assert turn == (number == 9)
        goal.anchors = {True: filled(goal.parameters, 1), False: filled(goal.parameters, 2)}
        loss = goal.backward(number)
        found = [p.grad.clone() for p in goal.parameters]

        anchors = filled(goal.parameters, 2 if turn else 1)  # the other state's
        data = SAFE if turn else USER
        batches = [goal.batch(indices, data) for indices in goal.steps[number]]
        assert len(batches) == 2
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        whole = sum(goal.loss(batch) for batch in batches) / tokens
        away = [p - a for p, a in zip(goal.parameters, anchors, strict=True)]
        whole = whole + 0.5 / 2 * sum(each.square().sum() for each in away)
        expected = torch.autograd.grad(whole, goal.parameters)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for mine, slow in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, slow, rtol=1e-4, atol=1e-5)


def test_a_weight_that_the_loss_does_not_reach_is_pulled_too():
    model = build("full")
    with attached(model, config()) as goal:
        goal.anchors[True] = filled(goal.parameters, 1)
        goal.pull(7)
        for p, anchor in zip(goal.parameters, goal.anchors[True], strict=True):
            torch.testing.assert_close(p.grad, 0.5 * (p - anchor).detach())


def test_the_first_tenth_of_the_steps_is_not_pulled():
    model = build("full")
    with attached(model, config(num_train_epochs=10)) as goal:
        assert len(goal.steps) == 20
        goal.anchors = {state: filled(goal.parameters, 1) for state in (True, False)}
        terms = [goal.pull(number) for number in range(20)]
        distance = sum(
            float((p - a).double().square().sum())
            for p, a in zip(goal.parameters, goal.anchors[True], strict=True)
        )
    assert terms == [0, 0, *[pytest.approx(0.5 / 2 * distance, rel=1e-5)] * 18]


class Recorded(Lisa):
    """Keeps the weights before each step and the anchor that the step is pulled to."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.weights, self.pulled_to = [copied(self.parameters)], []
        type(self).last = self

    def backward(self, number):
        self.pulled_to.append(copied(self.anchors[not self.is_alignment[number]]))
        return super().backward(number)

    def after(self, number):
        self.weights.append(copied(self.parameters))
        super().after(number)


def copied(tensors):
    return [t.detach().clone() for t in tensors]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_anchors_are_the_weights_at_the_end_of_the_other_states_last_phase(tuning):
    model = build(tuning)
    objective = functools.partial(Recorded, safe=SAFE)
    sft.train(model, tiny.tokenizer(), USER, config(), objective=objective)
    run = Recorded.last
    assert "".join("A" if turn else "u" for turn in run.is_alignment) == "AAuuu" * 6
    for number, anchor in enumerate(run.pulled_to):
        start = number - number % 5  # of the round
        # Safe steps: where the user's phase ended, the beginning in the first round; the user's:
        # where this round's safe phase ended.
        expected = run.weights[start if number % 5 < 2 else start + 2]
        assert same(anchor, expected), number
    assert not same(run.pulled_to[0], run.pulled_to[5])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_without_rho_it_is_plain_alternation(tuning):
    """Against a loop of its own: AdamW, gradients clipped at 1, a batch of each in turn."""
    settings = config(lisa_rho=0.0, num_train_epochs=5)
    model, other = build(tuning), build(tuning)
    objective = functools.partial(Lisa, safe=SAFE)
    losses = sft.train(model, tiny.tokenizer(), USER, settings, objective=objective)["loss"]

    goal = Objective(other, tiny.tokenizer(), USER, settings)
    user, safe = iter(plan_steps(USER, settings)), iter(plan_steps(SAFE, settings, 99))
    optimizer = torch.optim.AdamW(goal.parameters, lr=1e-2, weight_decay=0.0)
    expected = []
    with goal.attached():
        for turn in "AuAuAuAuAu":
            data, steps = (SAFE, safe) if turn == "A" else (USER, user)
            batch = goal.batch(next(steps)[0], data)
            loss = goal.loss(batch) / (batch["labels"] != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(goal.parameters, 1.0)
            optimizer.step()
            expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_state_goes_and_comes_back():
    model = build("lora")
    with attached(model, config()) as goal, attached(model, config()) as other:
        goal.anchors = {True: filled(goal.parameters, 1), False: filled(goal.parameters, 2)}
        state = {name: value.clone() for name, value in goal.state().items()}
        other.load_state(state, 7)
    assert len(state) == 2 * len(goal.parameters)
    for turn in (True, False):
        assert same(other.anchors[turn], goal.anchors[turn])
    assert not same(other.anchors[True], other.anchors[False])


# --- what it is for -------------------------------------------------------------------------------


@torch.no_grad()
def mean_loss(model, data):
    goal = Objective(model, tiny.tokenizer(), data, config())
    with goal.attached():
        batch = goal.batch(range(len(data)), data)
        return float(goal.loss(batch) / (batch["labels"] != -100).sum())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_weights_stay_near_and_what_was_aligned_is_not_forgotten(tuning):
    """From a model that has learned the safe data, 50 steps on the user's without and with it."""
    aligned = tiny.build()
    learning = config(tuning="full", learning_rate=3e-3, num_train_epochs=50)
    sft.train(aligned, tiny.tokenizer(), SAFE, learning)
    assert mean_loss(aligned, SAFE) < 0.05 < 3 < mean_loss(aligned, USER)
    safe, user, moved = {}, {}, {}
    for rho in (None, 0.0, 1.0, 100.0):  # None is plain fine-tuning
        settings = config(
            lisa_rho=rho or 0.0,
            lisa_alignment_steps=1,
            lisa_finetune_steps=4,
            num_train_epochs=25,
        )
        model = copy.deepcopy(aligned)
        model = sft.add_lora(model, settings) if tuning == "lora" else model
        start = copied(p for p in model.parameters() if p.requires_grad)
        objective = Objective if rho is None else functools.partial(Lisa, safe=SAFE)
        sft.train(model, tiny.tokenizer(), USER, settings, objective=objective)
        safe[rho], user[rho] = mean_loss(model, SAFE), mean_loss(model, USER)
        trained = [p for p in model.parameters() if p.requires_grad]
        moved[rho] = sum(
            float((p - q).detach().square().sum()) for p, q in zip(trained, start, strict=True)
        )
    # Measured, LoRA: safe 0.56, 0.03, 0.01, 0.03; full: 6.4, 0.21, 0.27, 0.03. Five seeds agree.
    assert max(safe[0.0], safe[1.0], safe[100.0]) < 0.5 * safe[None]
    assert user[1.0] < 0.5 * mean_loss(aligned, USER)
    assert moved[1.0] < moved[0.0] > 5 * moved[100.0]
