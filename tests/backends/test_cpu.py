"""The C++ kernels against the reference: the same bits, in every instruction set of this CPU."""

import itertools
import threading

import oracle
import parity
import pytest
import sampling
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import SELECTIONS, SHAPES

from antidote_fast import (
    Selection,
    accumulate_sq_norm_,
    apply_mask_,
    prune_,
    prune_linear_,
    prune_many_,
    prune_mask,
    select_mask,
)
from antidote_fast import score as score_op
from antidote_fast.backends import cpu, load

pytestmark = [
    pytest.mark.skipif(load("cpu")[1] is not None, reason=f"cpu backend: {load('cpu')[1]}"),
    pytest.mark.thin,
]


@pytest.fixture(params=cpu.ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(cpu.ENVIRONMENT, request.param)
    return request.param


def both(weights, norms, selection, preserve=None, bases=None):
    return parity.same("cpu", weights, norms, selection, preserve, bases)


@pytest.mark.table
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_kind_of_input(isa, shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    kinds = itertools.product(oracle.WEIGHT_KINDS, ("none", "uniform", "dead", "nan"))
    for kind, norm_kind in kinds:
        padding = 3 if norm_kind == "dead" else 0
        weight = oracle.make_weight(kind, shape, oracle.DTYPES[dtype], generator, padding)
        norm = oracle.make_norm(norm_kind, shape[1], generator)
        assert oracle.same_bits(
            score_op(weight, norm, backend="cpu"), score_op(weight, norm, backend="reference")
        )
        both([weight], [norm], Selection(0.2))


@pytest.mark.table
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_selection(isa, shape, name):
    selection = SELECTIONS[name]
    generator = torch.Generator().manual_seed(7)
    for kind, dtype in itertools.product(("gauss", "ties", "bits"), oracle.DTYPES.values()):
        weight = oracle.make_weight(kind, shape, dtype, generator, padding=5)
        norm = oracle.make_norm("uniform", shape[1], generator)
        base = oracle.make_weight("ties", shape, dtype, generator, padding=1)
        preserve = None
        if selection.n_m is None:
            preserve = [oracle.make_norm("outlier", shape[1], generator)]
        both([weight], [norm], selection)
        both([weight], [norm], selection, preserve, [base])


@pytest.mark.table
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
@pytest.mark.parametrize("largest", [True, False])
def test_lists(isa, scope, largest):
    generator = torch.Generator().manual_seed(3)
    selection = Selection(0.15, scope=scope, largest=largest, preserve_ratio=0.1)
    for kind, dtype in itertools.product(("gauss", "equal"), oracle.DTYPES.values()):
        weights = [oracle.make_weight(kind, s, dtype, generator) for s in SHAPES]
        norms = [oracle.make_norm("uniform", s[1], generator) for s in SHAPES]
        norms[4] = None
        preserve = [n if i % 2 else None for i, n in enumerate(norms)]
        both(weights, norms, selection)
        both(weights, norms, selection, preserve)


@pytest.mark.table
@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("largest", [True, False])
def test_signed_scores(isa, scope, largest):
    generator = torch.Generator().manual_seed(4)
    selection = Selection(0.3, scope=scope, largest=largest)
    for shape, kind in itertools.product(SHAPES, oracle.WEIGHT_KINDS):
        scores = oracle.make_weight(kind, shape, torch.float32, generator, padding=2)
        expected = select_mask(scores, selection, backend="reference")
        assert select_mask(scores, selection, backend="cpu") == expected


@pytest.mark.table
@pytest.mark.parametrize("columns", [40000, 131072])
def test_long_rows(isa, columns):
    generator = torch.Generator().manual_seed(5)
    for kind in ("gauss", "equal", "zeros", "sorted"):
        weight = oracle.make_weight(kind, (2, columns), torch.bfloat16, generator)
        both([weight], [oracle.make_norm("uniform", columns, generator)], Selection(0.05))
        both([weight], [None], Selection(0.7))


@pytest.mark.table
def test_rows_whose_scales_jump(isa):
    """The last row's threshold is a bad guess for the next one's: it must only cost time."""
    generator = torch.Generator().manual_seed(6)
    scale = torch.exp2(torch.randint(-60, 60, (64, 1), generator=generator).float())
    weight = torch.randn(64, 700, generator=generator) * scale
    both([weight], [None], Selection(0.1))
    both([weight.bfloat16()], [torch.rand(700, generator=generator)], Selection(0.5))


@pytest.mark.table
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_sums_of_squares(isa, dtype):
    generator = torch.Generator().manual_seed(8)
    for rows, columns in [(1, 1), (3, 7), (65, 33), (200, 576), (1000, 130), (70, 5000)]:
        x = torch.randn(rows, columns, generator=generator).to(oracle.DTYPES[dtype])
        token_mask = torch.rand(rows, generator=generator) > 0.3
        start = torch.rand(columns, generator=generator)
        for mask in (None, token_mask, token_mask.long() * 3):
            counted = x if mask is None else x[mask.bool()]
            expected = start.double() + counted.double().square().sum(dim=0)
            sums = accumulate_sq_norm_(start.clone(), x, mask, backend="cpu")
            torch.testing.assert_close(sums.double(), expected, rtol=1e-7, atol=0)


@pytest.mark.table
def test_sums_of_squares_of_strided_activations(isa):
    x = torch.randn(6, 5, 40, generator=torch.Generator().manual_seed(9)).bfloat16()
    for view in (x[::2, 1:4, 3:36], x.transpose(0, 1)[:, :, :31], x[0, 0]):
        mask = torch.ones(view.shape[:-1], dtype=torch.bool)
        if view.dim() > 1:
            mask[0] = False
        expected = view[mask].double().square().sum(dim=0) if view.dim() > 1 else view.double() ** 2
        sums = torch.zeros(view.shape[-1])
        accumulate_sq_norm_(sums, view, mask, backend="cpu")
        torch.testing.assert_close(sums.double(), expected, rtol=1e-7, atol=0)


def test_sums_do_not_depend_on_threads(isa):
    x = torch.randn(3000, 700, generator=torch.Generator().manual_seed(10))
    before = torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(accumulate_sq_norm_(torch.zeros(700), x, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert oracle.same_bits(sums[0], sums[1])
    assert oracle.same_bits(sums[0], sums[2])


@pytest.mark.table
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_apply_mask(isa, dtype):
    generator = torch.Generator().manual_seed(11)
    for shape, base_too in itertools.product(SHAPES, (False, True)):
        weight = oracle.make_weight("bits", shape, oracle.DTYPES[dtype], generator, padding=2)
        base = oracle.make_weight("bits", shape, oracle.DTYPES[dtype], generator)
        mask = prune_mask(weight, None, Selection(0.3), backend="reference")
        outcomes = [
            apply_mask_(
                parity.copied(weight), mask, base_weight=base if base_too else None, backend=backend
            )
            for backend in ("reference", "cpu")
        ]
        assert oracle.same_bits(*outcomes)
        parity.check_padding(outcomes[1])


def test_denormals_count_under_flush_to_zero(isa):
    weight = torch.tensor([[1e-40, 2e-40, 3e-40, 0.0]])
    expected = prune_mask(weight, None, Selection(0.5), backend="cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        assert prune_mask(weight, None, Selection(0.5), backend="cpu") == expected
    finally:
        torch.set_flush_denormal(False)


def test_prune_linear_is_its_parts(isa):
    generator = torch.Generator().manual_seed(12)
    weight = torch.randn(20, 96, generator=generator).bfloat16()
    x = torch.randn(2, 30, 96, generator=generator).bfloat16()
    token_mask = torch.rand(2, 30, generator=generator) > 0.5
    pruned, mask, norm = prune_linear_(
        weight.clone(),
        x,
        Selection(0.1),
        token_mask=token_mask,
        return_mask=True,
        return_norm=True,
        backend="cpu",
    )
    assert mask == prune_mask(weight, norm, Selection(0.1), backend="reference")
    assert oracle.same_bits(pruned, prune_(weight.clone(), norm, Selection(0.1)))


def test_many_threads_at_once(isa):
    """Calls from several Python threads share nothing."""
    generator = torch.Generator().manual_seed(13)
    weights = [torch.randn(64, 300, generator=generator) for _ in range(4)]
    expected = [prune_mask(w, None, Selection(0.1), backend="reference") for w in weights]
    failures = []

    def work(i):
        for _ in range(20):
            if prune_mask(weights[i], None, Selection(0.1), backend="cpu") != expected[i]:
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(cpu.ENVIRONMENT, "avx9")
    with pytest.raises(ValueError, match="ANTIDOTE_CPU_ISA='avx9'"):
        prune_mask(torch.ones(2, 3), None, Selection(0.5), backend="cpu")


@settings(max_examples=sampling.examples(3000, 400), deadline=None)
@given(st.data())
def test_any_call(data):
    weights, norms, selection, preserve, bases = parity.draw_call(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.ENVIRONMENT, data.draw(st.sampled_from(cpu.ISAS)))
        both(weights, norms, selection, preserve, bases)


def test_lists_give_what_single_calls_give(isa):
    generator = torch.Generator().manual_seed(14)
    weights = [torch.randn(9, 50, generator=generator) for _ in range(3)]
    norms = [torch.rand(50, generator=generator) for _ in range(3)]
    singles = [prune_(w.clone(), n, Selection(0.2)) for w, n in zip(weights, norms, strict=True)]
    many = prune_many_([w.clone() for w in weights], norms, Selection(0.2))
    assert all(oracle.same_bits(a, b) for a, b in zip(singles, many, strict=True))
