"""An exception between any two lines: a model's hooks, modes and gradients are as before.

``raising_at`` raises at the n-th line that runs in the package's own code which touches a model,
also in the lines that clean up; ``points`` are the n at which each of its lines runs for the first
and for the last time.
"""

import contextlib
import itertools
import signal
import sys
import threading

import pytest
import tiny
import torch
from torch import nn

from antidote_fast import ActivationNorms, Selection, ops, prune_model_
from antidote_fast.errors import AntidoteError, UsageError
from antidote_fast.models import undo
from antidote_fast.models.targets import find_targets
from antidote_fast.norms import activation_norms, batches, collector, fusion
from antidote_fast.norms.collector import NormCollector
from antidote_fast.pruning import layers, prune
from antidote_fast.system import interrupts

COLLECTING = {module.__file__ for module in (activation_norms, batches, collector, fusion, undo)}
PRUNING = {module.__file__ for module in (prune, layers, interrupts, undo)}


class Small(nn.Module):
    """The least that a calibration takes, so that hundreds of them take no time."""

    def __init__(self):
        super().__init__()
        self.embed, self.dropout = nn.Embedding(tiny.VOCAB, 8), nn.Dropout(0.5)
        self.q_proj, self.k_proj, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask, logits_to_keep=0):
        x = self.dropout(self.embed(input_ids))
        return self.lm_head(self.q_proj(x) + self.k_proj(x).repeat(1, 1, 2))


class Boom(BaseException):
    pass


@contextlib.contextmanager
def raising_at(number, files):
    """Raise Boom at the ``number``-th line of these files; yields a list of what was passed."""
    passed = []

    def lines(frame, event, arg):
        if event == "line":
            passed.append((frame.f_code.co_name, frame.f_lineno))
            if len(passed) == number:
                raise Boom
        return lines

    before = sys.gettrace()  # of coverage
    sys.settrace(lambda frame, *_: lines if frame.f_code.co_filename in files else None)
    try:
        yield passed
    finally:
        sys.settrace(before)


def points(call, files):
    """When each line of these files runs for the first time and for the last one, in ``call``."""
    with raising_at(0, files) as passed:
        call()
    first, last = {}, {}
    for number, line in enumerate(passed, 1):
        first.setdefault(line, number)
        last[line] = number
    return sorted({*first.values(), *last.values()})


def mixed(model):
    """Modes, gradients and what is trained, none of them the same everywhere."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        parameter.grad = torch.full_like(parameter, number) if number % 4 == 0 else None
    return model


def state(model):
    """All that a calibration may change, as values to compare."""
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
    return (
        [
            (m.training, "forward" in vars(m), [len(getattr(m, name)) for name in hooks])
            for m in model.modules()
        ],
        [(p.requires_grad, p.grad is None or p.grad.sum().item()) for p in model.parameters()],
        torch.is_grad_enabled(),
    )


def as_it_was(model, before):
    now = state(model)
    torch.set_grad_enabled(True)
    return now == before


@pytest.mark.parametrize(
    ("make", "files", "options"),
    [
        (Small, COLLECTING, {}),
        (
            lambda: tiny.build(layers=1),
            {fusion.__file__},
            {"targets": ["q_proj", "down_proj"], "fuse": True},
        ),
        (lambda: tiny.add_lora(tiny.build(layers=1)), {undo.__file__}, {"targets": ["lora_B"]}),
    ],
    ids=["model", "fused", "adapter"],
)
def test_collecting_interrupted_at_any_line(make, files, options):
    model = mixed(make())
    before, batches = state(model), tiny.batches(count=1, length=4)

    def collect():
        return ActivationNorms.collect(model, batches, fingerprint="", **options)

    whole, tried = collect(), points(collect, files)
    assert len(tried) > 25
    for number in tried:
        with pytest.raises(Boom), raising_at(number, files) as passed:
            collect()
        assert as_it_was(model, before), (number, passed[-1])
    norms = collect()
    assert all(torch.equal(norms.sq_sum[key], whole.sq_sum[key]) for key in whole.keys)


@pytest.mark.parametrize("place", ["forward", "iterator", "register", "registered", "eval"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_collecting_interrupted_elsewhere(place, error, monkeypatch):
    model = mixed(tiny.build())
    before, batches = state(model), tiny.batches()

    def stops(real, after=3):
        counted = itertools.count()

        def call(*args, **kwargs):
            if next(counted) < after:
                return real(*args, **kwargs)
            if place == "registered":
                real(*args, **kwargs)
            raise error

        return call

    if place == "iterator":
        batches = iter(stops(iter(batches).__next__, 2), None)
    elif place == "forward":
        model.model.layers[1].mlp.forward = stops(model.model.layers[1].mlp.forward, 1)
        before = state(model)
    elif place == "eval":
        real = torch.nn.Module.train
        monkeypatch.setattr(torch.nn.Module, "train", stops(real, 5))
    else:
        real = torch.nn.Module.register_forward_pre_hook
        monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", stops(real))
    with pytest.raises(error):
        ActivationNorms.collect(model, batches)
    assert as_it_was(model, before)
    monkeypatch.undo()
    vars(model.model.layers[1].mlp).pop("forward", None)
    assert ActivationNorms.collect(model, tiny.batches()).num_tokens > 0


# --- threads --------------------------------------------------------------------------------------


def in_thread(call):
    """What a call gives, or raises, in a thread of its own."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_second_collection_on_a_model_is_refused(wrapped):
    model = tiny.build()
    other = nn.ModuleDict({"inner": model}) if wrapped else model  # of which the model is a part
    before, batches = state(mixed(model)), tiny.batches()
    alone = ActivationNorms.collect(model, batches, targets=["o_proj"])
    caught = []

    def slowly():
        for batch in batches:
            caught.append(in_thread(lambda: ActivationNorms.collect(other, tiny.batches(seed=1))))
            yield batch

    norms = ActivationNorms.collect(model, slowly(), targets=["o_proj"])
    assert len(caught) == 3
    for error in caught:
        assert isinstance(error, UsageError)
        assert str(error).startswith("model: norms are being collected on it already")
    assert torch.equal(norms.sq_sum[norms.keys[0]], alone.sq_sum[norms.keys[0]])
    assert as_it_was(model, before)


def test_forwards_of_other_threads_do_not_count():
    model, batches = tiny.build(), tiny.batches(pads=False)
    alone = ActivationNorms.collect(model, batches)
    caught, ours = [], threading.get_ident()

    def another(*_):
        if threading.get_ident() == ours:
            caught.append(in_thread(lambda: model(batches[0]["input_ids"])))

    model.model.layers[0].mlp.register_forward_hook(another)
    norms = ActivationNorms.collect(model, batches)
    assert len(caught) == len(batches)
    assert not any(isinstance(found, Exception) for found in caught)
    assert all(torch.equal(norms.sq_sum[key], alone.sq_sum[key]) for key in norms.keys)


def test_two_collectors_in_two_threads_each_count_their_own():
    model = tiny.build()
    sets = [tiny.batches(seed=seed, count=6) for seed in range(2)]
    expected = [ActivationNorms.collect(model, batches) for batches in sets]
    turn = threading.Barrier(2, timeout=60)

    def run(batches):
        with NormCollector(find_targets(model)) as mine, torch.no_grad():
            for batch in batches:
                turn.wait()  # both have hooks on, and both run at once
                mine.start(batch)
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                mine.finish()
            turn.wait()
        return ActivationNorms.of(mine)

    found = [None, None]
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, run(sets[i]))) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, its in zip(found, expected, strict=True):
        assert all(torch.equal(mine.sq_sum[key], its.sq_sum[key]) for key in its.keys)


def test_two_models_at_once():
    models = [tiny.build(seed=seed) for seed in range(2)]
    batches = tiny.batches(count=6)
    expected = [ActivationNorms.collect(model, batches) for model in models]
    turn, found = threading.Barrier(2, timeout=60), [None, None]

    def run(i):
        def in_turn():
            for batch in batches:
                turn.wait()
                yield batch

        found[i] = ActivationNorms.collect(models[i], in_turn())

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, its in zip(found, expected, strict=True):
        assert all(torch.equal(mine.sq_sum[key], its.sq_sum[key]) for key in its.keys)


def test_start_in_one_thread_and_the_forward_in_another():
    model, (batch, *_) = tiny.build(), tiny.batches()
    with NormCollector(find_targets(model)) as mine, torch.no_grad():
        mine.start(batch)
        in_thread(lambda: model(batch["input_ids"]))
        with pytest.raises(UsageError, match=r"^finish: the forward ran in another thread"):
            mine.finish()


# --- pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "scope"),
    [(Small, "row"), (Small, "global"), (lambda: tiny.build("gpt2", layers=1), "row")],
    ids=["row", "global", "gpt2"],
)
def test_pruning_interrupted_at_any_line_is_all_or_nothing(make, scope):
    model = make()
    weights = [t.weight for t in find_targets(model, "all-linear")]
    originals = [weight.detach().clone() for weight in weights]
    options = {"targets": "all-linear", "score": "magnitude"}
    prune_model_(model, None, Selection(0.3, scope=scope), **options)
    pruned = [weight.detach().clone() for weight in weights]
    seen, handlers = set(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def prune_again():
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
        prune_model_(model, None, Selection(0.3, scope=scope), **options)

    for number in points(prune_again, PRUNING):
        with pytest.raises(Boom), raising_at(number, PRUNING) as passed:
            prune_again()
        done = [torch.equal(w, p) for w, p in zip(weights, pruned, strict=True)]
        left = [torch.equal(w, o) for w, o in zip(weights, originals, strict=True)]
        assert all(done) or all(left), (number, passed[-1])
        assert torch.is_grad_enabled(), (number, passed[-1])
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        seen.add(all(done))
    assert seen == {True, False}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_weights_waits_for_the_last(number, monkeypatch):
    model = tiny.build()
    real, calls = ops.apply_mask_, []

    def apply(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(number)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "apply_mask_", apply)
    before = [
        (n, signal.signal(n, signal.default_int_handler)) for n in (signal.SIGINT, signal.SIGTERM)
    ]
    try:
        options = {"score": "magnitude", "cross_check": False}
        with pytest.raises(KeyboardInterrupt) as caught:
            prune_model_(model, None, Selection(0.5), **options)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        for each, handler in before:
            signal.signal(each, handler)
    assert len(calls) == 6
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["all 6 weights are pruned"]
    for target in find_targets(model):
        assert (target.weight == 0).float().mean() == 0.5


def test_a_device_that_fails_for_good_says_which_are_done(monkeypatch):
    model, real = tiny.build(), ops.apply_mask_
    third = find_targets(model)[2]

    def apply(weight, *args, **kwargs):
        if weight.data_ptr() == third.weight.data_ptr():
            raise torch.OutOfMemoryError("no memory")
        return real(weight, *args, **kwargs)

    monkeypatch.setattr(ops, "apply_mask_", apply)
    says = rf"^{third.key}: could not be written \(OutOfMemoryError\); 2 of 6 weights are pruned"
    with pytest.raises(AntidoteError, match=says):
        prune_model_(model, None, Selection(0.5), score="magnitude", cross_check=False)
    zeros = [(t.weight == 0).float().mean().item() for t in find_targets(model)]
    assert zeros == [0.5, 0.5, 0, 0, 0, 0]


def test_a_selection_that_fails_half_way_leaves_every_weight(monkeypatch):
    model, real = tiny.build(), ops.prune_with_report_
    before, calls = {k: v.clone() for k, v in model.state_dict().items()}, itertools.count()

    def select(*args, **kwargs):
        if next(calls) == 4:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "prune_with_report_", select)
    with pytest.raises(torch.OutOfMemoryError):
        prune_model_(model, None, Selection(0.5), score="magnitude", cross_check=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
