"""The tensor API: what it returns, what it refuses, and what a refusal leaves untouched."""

import os
import types
import warnings

import oracle
import pytest
import torch

from antidote_fast import (
    BackendUnavailable,
    PackedMask,
    Selection,
    accumulate_sq_norm_,
    apply_mask_,
    backends,
    prune_,
    prune_linear_,
    prune_many_,
    prune_mask,
    select_mask,
)
from antidote_fast import score as score_op
from antidote_fast.ops import prune_with_report_

AVAILABLE = [
    name
    for name, reason in backends.available().items()
    if reason is None and "cpu" in (backends.load(name)[0].DEVICE_TYPES or ("cpu",))
]
HALF = Selection(0.5)


@pytest.fixture(params=AVAILABLE)
def backend(request, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, request.param)
    return request.param


@pytest.fixture
def weight():
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


def test_outputs_are_the_weight_then_what_was_asked_for(backend, weight):
    norm, x = torch.ones(10), torch.randn(3, 10)
    assert prune_(weight, norm, HALF) is weight
    same, mask = prune_(weight, norm, HALF, return_mask=True)
    assert same is weight
    assert isinstance(mask, PackedMask)
    weights = [weight, weight.clone()]
    assert prune_many_(weights, [norm, None], HALF) is weights
    same, masks = prune_many_(weights, [norm, None], HALF, return_mask=True)
    assert same is weights
    assert [m.shape for m in masks] == [(6, 10), (6, 10)]
    assert prune_linear_(weight, x, HALF) is weight
    same, norm = prune_linear_(weight, x, HALF, return_norm=True)
    torch.testing.assert_close(norm, x.double().square().sum(0).sqrt().float(), rtol=1e-6, atol=0)
    assert len(prune_linear_(weight, x, HALF, return_mask=True, return_norm=True)) == 3
    sums = torch.zeros(10)
    assert accumulate_sq_norm_(sums, x) is sums


def test_prune_mask_leaves_the_weight(backend, weight):
    before = weight.clone()
    mask = prune_mask(weight, torch.ones(10), Selection(0.3))
    assert torch.equal(weight, before)
    assert mask.count() == 6 * 3
    pruned, applied = prune_(weight, torch.ones(10), Selection(0.3), return_mask=True)
    assert applied == mask
    assert oracle.same_bits(apply_mask_(before, mask), pruned)


def test_an_excluded_token_is_not_read(backend):
    x = torch.randn(4, 3, 8)
    x[1, 2] = float("nan")
    x[3] = float("inf")
    token_mask = torch.ones(4, 3, dtype=torch.int64)
    token_mask[1, 2] = 0
    token_mask[3] = 0
    expected = x[token_mask.bool()].double().square().sum(0)
    sums = accumulate_sq_norm_(torch.zeros(8), x, token_mask)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=0)
    assert bool((accumulate_sq_norm_(torch.ones(8), x, token_mask * 0) == 1).all())


def test_sums_are_within_a_millionth_of_float64(backend):
    x = torch.rand(20_000, 16, generator=torch.Generator().manual_seed(1)) + 1
    sums = accumulate_sq_norm_(torch.zeros(16), x)
    torch.testing.assert_close(sums.double(), x.double().square().sum(0), rtol=1e-7, atol=0)


def test_what_is_preserved_is_subtracted(backend, weight):
    norm, preserve = torch.rand(10), torch.rand(10)
    selection = Selection(0.4, preserve_ratio=0.2)
    mask = prune_mask(weight, norm, selection, preserve_norm=preserve)
    expected = prune_mask(weight, norm, Selection(0.4)) - prune_mask(
        weight, preserve, Selection(0.2)
    )
    assert mask == expected
    assert mask.count() <= 6 * 4


def test_ties_go_from_the_end(backend):
    weight = torch.ones(2, 6)
    assert (
        prune_mask(weight, None, Selection(0.5)).to_bool()[0].tolist() == [False] * 3 + [True] * 3
    )
    smallest = prune_mask(weight, None, Selection(0.5, largest=False)).to_bool()
    assert smallest[1].tolist() == [True] * 3 + [False] * 3
    tensor = prune_mask(weight, None, Selection(0.25, scope="tensor")).to_bool()
    assert tensor.tolist() == [[False] * 6, [False] * 3 + [True] * 3]


def test_global_compares_over_the_list(backend):
    weights = [torch.full((2, 4), float(v)) for v in (1, 3, 2)]
    prune_many_(weights, [None] * 3, Selection(1 / 3, scope="global"))
    assert [int((w == 0).sum()) for w in weights] == [0, 8, 0]


def test_the_report_names_the_edge(backend):
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [8.0, 5.0, -7.0, 6.0]])
    masks, edges = prune_with_report_([weight], [None], HALF)
    assert edges == [3.0]
    assert masks[0].count() == 4
    _, edges = prune_with_report_([weight], [None], Selection(0.0))
    assert edges[0] != edges[0]


def test_select_mask_in_signed_order(backend):
    score = torch.tensor([[0.0, -0.0, -1.0, float("nan"), 2.0, -float("inf")]])
    assert select_mask(score, HALF).to_bool().tolist() == [[False, True, False, True, True, False]]


def test_score_of_a_difference(backend, weight):
    base, norm = torch.randn(6, 10), torch.rand(10)
    assert torch.equal(score_op(weight, norm, base_weight=base), (weight - base).abs() * norm)
    assert torch.equal(score_op(weight), weight.abs())


def test_empty_inputs(backend):
    assert prune_many_([], [], HALF, return_mask=True) == ([], [])
    for shape in ((0, 4), (4, 0)):
        empty, mask = prune_(torch.empty(shape), None, HALF, return_mask=True)
        assert empty.shape == shape
        assert mask.count() == 0
        assert score_op(torch.empty(shape)).shape == shape
        assert select_mask(torch.empty(shape), HALF).count() == 0
        apply_mask_(torch.empty(shape), mask)
    sums = torch.ones(4)
    accumulate_sq_norm_(sums, torch.empty(0, 4))
    assert sums.tolist() == [1] * 4


def test_autograd_sees_the_write(backend):
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    loss = (parameter * parameter).sum()  # saves the parameter
    with torch.no_grad():
        prune_(parameter, None, HALF)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        frozen = torch.randn(3, 4)
        assert int((prune_(frozen, None, HALF) == 0).sum()) == 6


class Wrapped(torch.Tensor):
    pass


def refusals():
    """(id, call on a fresh weight and norm, error, what the message says)."""
    wide = torch.randn(6, 20)
    selection = HALF
    with warnings.catch_warnings():  # torch is about to drop these tensors
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.randn(6, 10), 0.1, 0, torch.qint8)
    yield "weight: no tensor", lambda w, n: prune_([1], n, selection), TypeError, "weight="
    yield "weight: 3-D", lambda w, n: prune_(w[None], n, selection), ValueError, "weight.shape"
    yield "weight: int", lambda w, n: prune_(w.int(), n, selection), TypeError, "weight.dtype"
    yield "weight: fp64", lambda w, n: prune_(w.double(), n, selection), TypeError, "weight.dtype"
    yield "weight: columns", lambda w, n: prune_(wide[:, ::2], n, selection), ValueError, "stride"
    yield (
        "weight: transposed",
        lambda w, n: prune_(torch.randn(10, 6).t(), n, selection),
        ValueError,
        "column stride must be 1",
    )
    yield (
        "weight: expanded",
        lambda w, n: prune_(torch.randn(1, 10).expand(6, 10), n, selection),
        ValueError,
        "overlap or be expanded",
    )
    yield (
        "weight: overlapping",
        lambda w, n: prune_(torch.randn(100).as_strided((6, 10), (4, 1)), n, selection),
        ValueError,
        "overlap",
    )
    yield (
        "weight: meta",
        lambda w, n: prune_(w.to("meta"), n, selection),
        ValueError,
        "meta device",
    )
    yield "weight: sparse", lambda w, n: prune_(w.to_sparse(), n, selection), TypeError, "layout"
    yield "weight: quantised", lambda w, n: prune_(quantised, n, selection), TypeError, "quantised"
    yield (
        "weight: subclass",
        lambda w, n: prune_(w.as_subclass(Wrapped), n, selection),
        TypeError,
        "Wrapped",
    )
    yield (
        "weight: leaf",
        lambda w, n: prune_(torch.nn.Parameter(w), n, selection),
        ValueError,
        "requires grad",
    )
    yield (
        "weight: view of a leaf",
        lambda w, n: prune_(torch.nn.Parameter(w)[:3], n, selection),
        ValueError,
        "requires grad",
    )
    yield "norm: shape", lambda w, n: prune_(w, n[:9], selection), ValueError, "act_norm.shape"
    yield "norm: dtype", lambda w, n: prune_(w, n.half(), selection), TypeError, "act_norm.dtype"
    yield "norm: number", lambda w, n: prune_(w, 1.0, selection), TypeError, "act_norm=1.0"
    yield (
        "norm: strided",
        lambda w, n: prune_(w, torch.ones(20)[::2], selection),
        ValueError,
        "act_norm.stride",
    )
    yield "norm: device", lambda w, n: prune_(w, n.to("meta"), selection), ValueError, "act_norm"
    yield "selection: number", lambda w, n: prune_(w, n, 0.5), TypeError, "selection=0.5"
    yield (
        "selection: global",
        lambda w, n: prune_(w, n, Selection(0.5, scope="global")),
        ValueError,
        "use prune_many_",
    )
    yield (
        "selection: delta without base",
        lambda w, n: prune_(w, n, Selection(0.5, score_delta=True)),
        ValueError,
        "base_weight=None",
    )
    yield (
        "preserve with n:m",
        lambda w, n: prune_(w, n, Selection(n_m=(2, 4)), preserve_norm=n),
        ValueError,
        "preserve_norm",
    )
    yield (
        "base: shape",
        lambda w, n: prune_(w, n, selection, base_weight=w[:5].clone()),
        ValueError,
        "base_weight is",
    )
    yield (
        "base: dtype",
        lambda w, n: prune_(w, n, selection, base_weight=w.half()),
        ValueError,
        "base_weight is",
    )
    yield (
        "base: the weight itself",
        lambda w, n: prune_(w, n, selection, base_weight=w),
        ValueError,
        "overlap in memory",
    )
    yield (
        "norm: a row of the weight",
        lambda w, n: prune_(w, w[0], selection),
        ValueError,
        "overlap in memory",
    )
    yield (
        "many: twice",
        lambda w, n: prune_many_([w, w], [n, n], selection),
        ValueError,
        r"weights\[0\] and weights\[1\] overlap",
    )
    yield (
        "many: overlapping",
        lambda w, n: prune_many_([w, w[2:]], [n, n], selection),
        ValueError,
        "overlap",
    )
    yield (
        "many: lengths",
        lambda w, n: prune_many_([w], [n, n], selection),
        ValueError,
        r"len\(act_norms\)=2",
    )
    yield "many: no list", lambda w, n: prune_many_(w, [n], selection), TypeError, "weights="
    yield "many: norms no list", lambda w, n: prune_many_([w], n, selection), TypeError, "act_norms"
    yield (
        "many: a bad one last",
        lambda w, n: prune_many_([w, w.int()], [n, n], selection),
        TypeError,
        r"weights\[1\].dtype",
    )
    yield (
        "x: width",
        lambda w, n: prune_linear_(w, torch.ones(3, 9), selection),
        ValueError,
        "x.shape",
    )
    yield (
        "x: expanded",
        lambda w, n: accumulate_sq_norm_(n, torch.ones(1, 10).expand(3, 10)),
        ValueError,
        "x.stride",
    )
    yield (
        "x: columns",
        lambda w, n: accumulate_sq_norm_(n, torch.ones(3, 20)[:, ::2]),
        ValueError,
        "x.stride",
    )
    yield "x: int", lambda w, n: accumulate_sq_norm_(n, w.int()), TypeError, "x.dtype"
    yield (
        "token mask: shape",
        lambda w, n: accumulate_sq_norm_(n, w, torch.ones(5)),
        TypeError,
        "token_mask.dtype",
    )
    yield (
        "token mask: float",
        lambda w, n: accumulate_sq_norm_(n, w, torch.ones(5, dtype=torch.bool)),
        ValueError,
        "token_mask.shape",
    )
    yield (
        "sq_sum: leaf",
        lambda w, n: accumulate_sq_norm_(torch.nn.Parameter(n), w),
        ValueError,
        "sq_sum",
    )
    yield "sq_sum: fp64", lambda w, n: accumulate_sq_norm_(n.double(), w), TypeError, "sq_sum.dtype"
    yield "sq_sum: 2-D", lambda w, n: accumulate_sq_norm_(w, w), ValueError, "sq_sum.shape"
    yield (
        "mask: shape",
        lambda w, n: apply_mask_(w, prune_mask(w[:5], None, selection)),
        ValueError,
        "mask.shape",
    )
    yield "mask: bool", lambda w, n: apply_mask_(w, w > 0), TypeError, "mask=a bool tensor"
    yield "score: bf16", lambda w, n: select_mask(w.bfloat16(), selection), TypeError, "score.dtype"
    yield (
        "backend: unknown",
        lambda w, n: prune_(w, n, selection, backend="gpu"),
        ValueError,
        "backend='gpu'",
    )


@pytest.mark.parametrize(
    ("call", "error", "message"), [pytest.param(*rest, id=name) for name, *rest in refusals()]
)
def test_refusals_write_nothing(backend, weight, call, error, message):
    norm = torch.ones(10)
    before = weight.clone()
    with pytest.raises(error, match=message) as caught:
        call(weight, norm)
    assert "\n" not in str(caught.value)
    assert torch.equal(weight, before)
    assert bool((norm == 1).all())


def test_views_between_each_others_rows_do_not_overlap(backend):
    wide = torch.randn(5, 30)
    halves = [wide[:, :14], wide[:, 14:]]
    expected = [prune_(h.clone(), None, HALF) for h in halves]
    prune_many_(halves, [None, None], HALF)
    assert torch.equal(wide, torch.cat(expected, dim=1))
    with pytest.raises(ValueError, match="overlap"):
        prune_many_([wide[:, :15], wide[:, 14:]], [None, None], HALF)


def test_a_leaf_is_pruned_under_no_grad(backend):
    parameter = torch.nn.Parameter(torch.randn(4, 8))
    with torch.no_grad():
        prune_(parameter, None, HALF)
    assert int((parameter == 0).sum()) == 16
    assert prune_mask(torch.nn.Parameter(torch.randn(4, 8)), None, HALF).count() == 16


def test_the_environment_names_the_backend(monkeypatch, weight):
    monkeypatch.setenv(backends.ENVIRONMENT, "nonsense")
    with pytest.raises(ValueError, match="ANTIDOTE_BACKEND='nonsense'"):
        prune_mask(weight, None, HALF)
    prune_mask(weight, None, HALF, backend="reference")  # an argument goes before it
    monkeypatch.setenv(backends.ENVIRONMENT, "")
    prune_mask(weight, None, HALF)
    assert os.environ[backends.ENVIRONMENT] == ""


def test_a_missing_backend_is_skipped_unless_asked_for(monkeypatch, weight):
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    module, _ = backends.load("cpu")
    monkeypatch.setattr(backends, "load", _load_without_cpu(module))
    assert backends.select(None, "cpu").NAME == "reference"
    with pytest.raises(BackendUnavailable, match="backend='cpu': not built"):
        prune_(weight, None, HALF, backend="cpu")


def _load_without_cpu(module):
    original = backends.load

    def load(name):
        return (module, "not built") if name == "cpu" else original(name)

    return load


def test_a_backend_takes_its_own_devices_only():
    if "cpu" not in AVAILABLE:
        pytest.skip("cpu backend: " + backends.available()["cpu"])
    with pytest.raises(BackendUnavailable, match="takes cpu tensors, not cuda"):
        backends.select("cpu", "cuda")
    assert backends.select(None, "mps").NAME == "reference"


def test_a_build_that_does_not_fit_the_gpu_is_passed_over(monkeypatch):
    """A driver older than the compiler's, or a GPU that it was not built for."""
    cuda, _ = backends.load("cuda")
    extension = types.SimpleNamespace(problem=["CUDA: driver too old", ""].__getitem__)
    monkeypatch.setattr(cuda, "_cuda", extension)
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(cuda, "_problem", cuda._problem.__wrapped__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert "cannot run here (CUDA: driver too old)" in cuda.unavailable()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cuda.unavailable() is None
