"""A global selection that sees one weight at a time, against the one that sees all of them."""

import json
import math

import plain_prune
import pytest
import sampling
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidote_fast import ops
from antidote_fast.config.scores import computed_scores
from antidote_fast.errors import DataError, NothingPruned, UsageError
from antidote_fast.models.targets import natural_key
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning import global_cut
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.global_cut import GlobalCut, find_cut
from antidote_fast.pruning.prune import prune_state_
from antidote_fast.selection import Selection, num_pruned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=[1, 50, 1 << 18], ids=["row by row", "some rows", "whole"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(global_cut, "_CHUNK", request.param)


class Reader:
    """Hands out one weight at a time, and counts."""

    def __init__(self, weights):
        self.weights, self.read = weights, []

    def __call__(self, key):
        self.read.append(key)
        return self.weights[key].clone()


def cut_of(weights, evidence, selection, seed=0):
    """(the cut, {key: mask}) with everything that a cut promises of itself."""
    read = Reader(weights)
    cut = find_cut(list(weights), read, evidence, selection, seed=seed)
    order = sorted(weights, key=natural_key)
    assert read.read in (order * 2, order)  # one pass is enough where nothing is removed
    masks = {key: cut.mask(key, weights[key]) for key in reversed(order)}
    assert {key: mask.count() for key, mask in masks.items()} == cut.counts
    assert sum(cut.counts.values()) == num_pruned(
        sum(w.numel() for w in weights.values()), selection
    )
    return cut, masks


def assert_like_all_at_once(weights, norms, selection, score="wanda", seed=0):
    evidence = Evidence(norms, score)
    cut, masks = cut_of(weights, evidence, selection, seed)
    copies = {key: weight.clone() for key, weight in weights.items()}
    report = prune_state_(copies, evidence, selection, seed=seed, return_masks=True)
    for layer in report.layers:
        assert torch.equal(masks[layer.key].bits, report.masks[layer.key].bits), layer.key
        assert cut.counts[layer.key] == layer.removed
        if layer.shape[0] and layer.shape[1]:
            edge = math.nan if layer.threshold is None else layer.threshold
            assert edge == cut.threshold or (math.isnan(edge) and math.isnan(cut.threshold))


def weights_of(shapes, dtype, seed=0, few_values=False):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator)
        if few_values:  # ties everywhere, zeros among them
            values = torch.randint(-2, 3, shape, generator=generator) / 4
        weights[f"model.layers.{(7 * i) % 12}.{i}.q_proj.weight"] = values.to(dtype)
    return weights


def norms_of(weights, seed=0, few_values=False):
    generator = torch.Generator().manual_seed(seed)
    sums = {key: torch.rand(w.shape[1], generator=generator) + 0.1 for key, w in weights.items()}
    if few_values:
        sums = {key: torch.ones_like(value) for key, value in sums.items()}
    return ActivationNorms(sums, num_sequences=3, num_tokens=11)


SHAPES = [(5, 16), (3, 33), (1, 1), (64, 7), (2, 250), (11, 9)]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("score", [score for score in computed_scores()])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_as_all_at_once(dtype, score, largest):
    weights = weights_of(SHAPES, dtype)
    for ratio in (0.0, 1e-6, 0.1, 0.5, 0.999, 1.0):
        selection = Selection(ratio, scope="global", largest=largest)
        assert_like_all_at_once(weights, norms_of(weights), selection, score=score, seed=3)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("largest", [True, False])
def test_ties_across_weights(largest):
    weights = weights_of(SHAPES, torch.bfloat16, few_values=True)
    norms = norms_of(weights, few_values=True)
    for ratio in torch.linspace(0, 1, 60).tolist():
        selection = Selection(ratio, scope="global", largest=largest)
        assert_like_all_at_once(weights, norms, selection)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.25, 65504.0])
def test_all_scores_equal(value, largest):
    weights = {f"{i}.weight": torch.full((i, 5), value) for i in (11, 2, 3)}
    for count in (1, 10, 11, 25, 26, 79, 80):
        selection = Selection(count / 80, scope="global", largest=largest)
        _, masks = cut_of(weights, Evidence(score="magnitude"), selection)
        flat = torch.cat([masks[f"{i}.weight"].to_bool().view(-1) for i in (2, 3, 11)])
        removed = num_pruned(80, selection)
        expected = torch.zeros(80, dtype=torch.bool)
        expected[80 - removed :] = largest
        expected[:removed] |= not largest
        assert torch.equal(flat, expected)


@settings(max_examples=sampling.examples(150, 40), deadline=None)
@given(data=st.data())
def test_as_all_at_once_whatever_comes(data):
    number = data.draw(st.integers(1, 4))
    shapes = [(data.draw(st.integers(0, 9)), data.draw(st.integers(0, 20))) for _ in range(number)]
    if not any(rows * columns for rows, columns in shapes):
        shapes.append((2, 3))
    weights = weights_of(
        shapes,
        data.draw(st.sampled_from(list(DTYPES.values()))),
        seed=data.draw(st.integers(0, 99)),
        few_values=data.draw(st.booleans()),
    )
    norms = norms_of(weights, few_values=data.draw(st.booleans()))
    largest = data.draw(st.booleans())
    selection = Selection(data.draw(st.floats(0, 1)), scope="global", largest=largest)
    _, masks = cut_of(weights, norms, selection)
    order = sorted(weights, key=natural_key)
    expected = ops.prune_many_(
        [weights[key].clone() for key in order],
        [norms.act_norm(key, "global") for key in order],
        selection,
        return_mask=True,
        backend="reference",
    )[1]
    for key, mask in zip(order, expected, strict=True):
        assert masks[key] == mask


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_not_a_number_is_one_score_above_infinity(dtype, largest):
    odd = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8]
    weights = {
        "a": torch.tensor(odd * 3, dtype=dtype).view(5, 6),
        "b": torch.tensor(odd[::-1] * 2, dtype=dtype).view(4, 5),
    }
    signless = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -8388607], dtype=torch.int32)
    weights["c"] = signless.view(torch.float32).to(dtype).view(2, 2)
    for count in range(55):
        selection = Selection(count / 54, scope="global", largest=largest)
        cut, masks = cut_of(weights, Evidence(score="magnitude"), selection)
        expected = ops.prune_many_(
            [w.clone() for w in weights.values()],
            [None] * 3,
            selection,
            return_mask=True,
            backend="reference",
        )[1]
        assert list(masks.values())[::-1] == expected
        if largest and 0 < count < 10:
            assert math.isnan(cut.threshold)


def test_scores_that_span_all_magnitudes():
    exponents = torch.linspace(-148, 126, 4000)
    weights = {
        "a": torch.exp2(exponents).view(40, 100),
        "b": -torch.exp2(exponents / 2).view(-1, 8),
    }
    for ratio in (0.001, 0.3, 0.77, 0.9999):
        for largest in (True, False):
            selection = Selection(ratio, scope="global", largest=largest)
            assert_like_all_at_once(weights, None, selection, score="magnitude")


def test_random_scores_are_drawn_in_parts():
    whole = plain_prune.random_scores("a", (700, 1000), 5)  # more than one chunk
    parts = list(global_cut._chunks("a", torch.empty(700, 1000), Evidence(score="random"), 5))
    assert len(parts) > 1
    assert torch.equal(torch.cat(parts).view(torch.float32), whole)


def test_weights_are_read_and_not_written():
    weights = weights_of(SHAPES, torch.bfloat16)
    before = {key: weight.clone() for key, weight in weights.items()}
    selection = Selection(0.5, scope="global")
    norms = norms_of(weights)
    cut = find_cut(list(weights), weights.__getitem__, norms, selection)
    for key, weight in weights.items():
        cut.mask(key, weight)
        assert torch.equal(weight, before[key])


def test_a_cut_survives_being_written_down():
    weights = weights_of(SHAPES, torch.bfloat16, few_values=True)
    norms = norms_of(weights)
    cut, masks = cut_of(weights, norms, Selection(0.3, scope="global"))
    again = GlobalCut.from_dict(json.loads(json.dumps(cut.to_dict())), Evidence(norms))
    assert again == cut
    assert all(again.mask(key, weights[key]) == mask for key, mask in masks.items())


def test_one_weight_is_in_memory_at_a_time():
    alive = []

    def read(key):
        import weakref

        tensor = torch.randn(6, 8, generator=torch.Generator().manual_seed(int(key)))
        assert not any(reference() is not None for reference in alive)
        alive.append(weakref.ref(tensor))
        return tensor

    find_cut(
        [str(i) for i in range(9)], read, Evidence(score="random"), Selection(0.2, scope="global")
    )
    assert len(alive) == 18


def test_a_weight_that_changed_is_refused():
    weights = weights_of(SHAPES, torch.float32)
    cut, _ = cut_of(weights, Evidence(score="magnitude"), Selection(0.5, scope="global"))
    key = next(iter(weights))
    with pytest.raises(DataError, match=f"{key}: has changed since"):
        cut.mask(key, weights[key] * 2)


def test_a_weight_that_changes_between_the_passes_is_refused():
    reads = iter([torch.arange(1.0, 7).view(2, 3), torch.arange(11.0, 17).view(2, 3)])
    with pytest.raises(DataError, match="changed since their scores were counted"):
        find_cut(
            ["a"],
            lambda key: next(reads),
            Evidence(score="magnitude"),
            Selection(0.5, scope="global"),
        )
    reads = iter([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(DataError, match="a: has changed since"):
        find_cut(
            ["a"],
            lambda key: next(reads),
            Evidence(score="magnitude"),
            Selection(0.5, scope="global"),
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"selection": Selection(0.1)}, "selection=.*must be a Selection of scope='global'"),
        ({"selection": None}, "selection=None: must be a Selection"),
        (
            {"selection": Selection(0.1, scope="global", preserve_ratio=0.2)},
            "preserve_norms=None: must be given with preserve_ratio=0.2",
        ),
        ({"score": "other"}, "score='other': must be one of wanda"),
        ({"score": "wanda"}, "norms=None: must be given"),
    ],
)
def test_refusals(options, words):
    options = {"selection": Selection(0.1, scope="global"), "score": "magnitude"} | options
    with pytest.raises(UsageError, match=words):
        find_cut(["a"], None, Evidence(score=options["score"]), options["selection"])


def test_no_weights_are_refused():
    with pytest.raises(NothingPruned, match="no weights"):
        find_cut([], None, Evidence(score="random"), Selection(0.1, scope="global"))
