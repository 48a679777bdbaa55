"""The Triton kernels against the reference: interpreted where there is no GPU, else compiled."""

import itertools

import oracle
import parity
import pytest
import sampling
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import SELECTIONS

from antidote_fast import (
    PackedMask,
    Selection,
    apply_mask_,
    backends,
    prune_,
    prune_linear_,
    prune_many_,
    prune_mask,
    select_mask,
)
from antidote_fast import score as score_op
from antidote_fast.backends import load
from antidote_fast.errors import BackendUnavailable

COMPILED = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(
        load("triton")[1] is not None, reason=f"triton backend: {load('triton')[1]}"
    ),
    pytest.mark.thin(strength=2 if COMPILED else 1),
]
DEVICE = "cuda" if COMPILED else "cpu"
# Interpreted, a row takes as long as all of them on a GPU, and nine do what 33 do.
MOST_ROWS = 33 if COMPILED or sampling.WHOLE else 9
SHAPES = [(min(rows, MOST_ROWS), columns) for rows, columns in parity.SHAPES]
# Interpreted, an operation takes a fifth of a second: one kind of weight a case there, not all.
KINDS = list(itertools.product(oracle.WEIGHT_KINDS, ("none", "uniform", "dead", "nan")))
WIDE = [(3, 2048), (2, 4096), (2, 4104), (1, 8192), (2, 8200), (1, 16384), (1, 16385)]


def both(weights, norms, selection, preserve=None, bases=None):
    return parity.same("triton", weights, norms, selection, preserve, bases, DEVICE)


def some(cases, number):
    """All cases where kernels are compiled, else a few, other ones for each number."""
    return cases if COMPILED else [cases[(7 * number + i) % len(cases)] for i in (0, 13)]


def name_of(shape):
    return f"{shape[0]}x{shape[1]}"


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=name_of)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_kind_of_input(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    for kind, norm_kind in some(KINDS, sum(shape) + len(dtype)):
        padding = 3 if norm_kind == "dead" else 0
        weight = oracle.make_weight(kind, shape, oracle.DTYPES[dtype], generator, padding)
        norm = oracle.make_norm(norm_kind, shape[1], generator)
        both([weight], [norm], Selection(0.2))


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=name_of)
def test_every_selection(shape, name):
    selection = SELECTIONS[name]
    generator = torch.Generator().manual_seed(7)
    cases = list(itertools.product(("gauss", "ties", "bits"), oracle.DTYPES.values()))
    for kind, dtype in some(cases, sum(shape) + len(name)):
        weight = oracle.make_weight(kind, shape, dtype, generator, padding=8)
        norm = oracle.make_norm("uniform", shape[1], generator)
        base = oracle.make_weight("ties", shape, dtype, generator, padding=1)
        preserve = None
        if selection.n_m is None:
            preserve = [oracle.make_norm("outlier", shape[1], generator)]
        both([weight], [norm], selection)
        both([weight], [norm], selection, preserve, [base])


@pytest.mark.parametrize("shape", WIDE, ids=name_of)
def test_wide_rows_with_all_options(shape):
    """Set difference, revert and score of a difference, in blocks and in parts."""
    generator = torch.Generator().manual_seed(3)
    for dtype, largest in some(
        list(itertools.product(oracle.DTYPES.values(), (True, False))), sum(shape)
    ):
        selection = Selection(0.3, largest=largest, preserve_ratio=0.2, score_delta=largest)
        weight, base = (oracle.make_weight("gauss", shape, dtype, generator) for _ in range(2))
        norms = [oracle.make_norm(kind, shape[1], generator) for kind in ("uniform", "outlier")]
        both([weight], norms[:1], selection, norms[1:], [base])


@pytest.mark.parametrize("kind", ["gauss", "equal", "zeros", "sorted", "huge"])
@pytest.mark.parametrize("columns", [20000, 131072])
def test_rows_that_are_read_in_parts(columns, kind):
    generator = torch.Generator().manual_seed(5)
    weight = oracle.make_weight(kind, (2, columns), torch.bfloat16, generator)
    both([weight], [oracle.make_norm("uniform", columns, generator)], Selection(0.05))
    if columns < 100_000 or COMPILED:
        both([weight.float()], [None], Selection(0.7, largest=False))


@pytest.mark.parametrize("rank", [4, 8, 16, 48, 64, 256, 512] if COMPILED else [4, 16, 48, 512])
@pytest.mark.parametrize("preserved", [False, True] if COMPILED else [True])
def test_an_adapter_in_one_launch(rank, preserved, monkeypatch):
    """A (rank, in) and B (out, rank) factors of several modules: the same bits, one launch."""
    from antidote_fast.backends.triton_kernels import launch

    generator = torch.Generator().manual_seed(rank)
    sizes = [(1024, 96), (576, 130), (5000, 64)]
    shapes = [shape for wide, tall in sizes for shape in ((rank, wide), (tall, rank))]
    if not COMPILED:
        shapes = [(min(rows, 12), columns) for rows, columns in shapes]
    weights = [oracle.make_weight("gauss", s, torch.bfloat16, generator) for s in shapes]
    weights[1].zero_()  # as B is before training
    norms = [oracle.make_norm("uniform", s[1], generator) for s in shapes]
    preserve = None
    if preserved:
        preserve = [n if i % 3 else None for i, n in enumerate(norms[::-1][: len(norms)])]
        preserve = [
            None if p is None else oracle.make_norm("outlier", s[1], generator)
            for p, s in zip(preserve, shapes, strict=True)
        ]
    launches = []
    usual = launch.run
    monkeypatch.setattr(launch, "run", lambda *a, **k: (launches.append(a[0]), usual(*a, **k)))
    both(weights, norms, Selection(0.1, preserve_ratio=0.05), preserve)
    assert len(launches) == 1


def test_a_list_of_everything():
    """Short, long and too long rows, mixed dtypes, views, an empty one."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(5, 16), (3, 1000), (0, 8), (2, 9001), (4, 7), (2, 2048), (1, 17000)]
    for dtypes in itertools.product((torch.bfloat16, torch.float32), repeat=2):
        weights = [
            oracle.make_weight("ties", s, dtypes[i % 2], generator, padding=8 * (i % 3))
            for i, s in enumerate(shapes)
        ]
        norms = [oracle.make_norm("uniform", s[1], generator) for s in shapes]
        norms[1] = None
        both(weights, norms, Selection(0.15))
        preserve = [None if i in (1, 3) else n for i, n in enumerate(norms)]
        both(weights, norms, Selection(0.15, preserve_ratio=0.1), preserve)


def test_a_long_list_takes_several_launches(monkeypatch):
    """Large matrices alone, the others by length, no more of them at once than a table holds."""
    from antidote_fast.backends.triton_kernels import configs, launch

    generator = torch.Generator().manual_seed(8)
    shapes = [(6, 1024), (3, 600), (2, 700), (3, 640), (4, 40), (3, 48)]
    weights = [oracle.make_weight("gauss", s, torch.bfloat16, generator) for s in shapes]
    norms = [oracle.make_norm("uniform", s[1], generator) for s in shapes]
    for name, value in {"MERGED_WEIGHTS": 1000, "ALONE": 6000, "MATRICES_A_LAUNCH": 2}.items():
        monkeypatch.setattr(configs, name, value)
    launches, usual = [], launch.run
    monkeypatch.setattr(
        launch, "run", lambda *a, **k: (launches.append(a[0].__name__), usual(*a, **k))
    )
    both(weights, norms, Selection(0.1))
    assert launches == ["prune_rows_kernel"] + ["prune_table_kernel"] * 3


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("largest", [True, False])
def test_signed_scores(scope, largest):
    generator = torch.Generator().manual_seed(4)
    selection = Selection(0.3, scope=scope, largest=largest)
    cases = list(itertools.product(SHAPES + WIDE[-2:], oracle.WEIGHT_KINDS))
    for shape, kind in cases if COMPILED else cases[:: 13 if scope == "row" else 19]:
        scores = oracle.make_weight(kind, shape, torch.float32, generator, padding=2)
        expected = select_mask(scores, selection, backend="reference")
        there = parity.copied(scores, DEVICE)
        assert select_mask(there, selection, backend="triton").to("cpu") == expected
    for n_m in ((1, 4), (5, 9)):
        groups = Selection(n_m=n_m, largest=largest)
        expected = select_mask(scores, groups, backend="reference")
        there = parity.copied(scores, DEVICE)
        assert select_mask(there, groups, backend="triton").to("cpu") == expected


@pytest.mark.parametrize("n_m", [(1, 2), (2, 4), (4, 8), (3, 16), (1, 1), (3, 7), (9, 70), (0, 4)])
@pytest.mark.parametrize("largest", [True, False])
def test_groups(n_m, largest):
    generator = torch.Generator().manual_seed(6)
    selection = Selection(n_m=n_m, largest=largest, score_delta=largest)
    for shape in [(3, 64), (2, 257), (4, 1000), (1, 5), (2, 40)]:
        for kind in ("gauss", "equal", "bits"):
            weight = oracle.make_weight(kind, shape, torch.float16, generator)
            base = oracle.make_weight("ties", shape, torch.float16, generator)
            both([weight], [oracle.make_norm("dead", shape[1], generator)], selection, None, [base])


def test_groups_too_large_for_a_program():
    weight = torch.randn(2, 9000, generator=torch.Generator().manual_seed(1)).bfloat16()
    both([weight], [None], Selection(n_m=(100, 8500)))
    there = weight.float().to(DEVICE)
    selection = Selection(n_m=(100, 8500))
    expected = select_mask(weight.float(), selection, backend="reference")
    assert select_mask(there, selection, backend="triton").to("cpu") == expected


def test_rows_whose_scales_jump():
    """The last row's threshold is a bad guess for the next one's: it must only cost time."""
    generator = torch.Generator().manual_seed(6)
    scale = torch.exp2(torch.randint(-60, 60, (24, 1), generator=generator).float())
    weight = torch.randn(24, 700, generator=generator) * scale
    both([weight], [None], Selection(0.1))
    both([weight.bfloat16()], [torch.rand(700, generator=generator)], Selection(0.5))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_scores_and_masks(dtype):
    generator = torch.Generator().manual_seed(11)
    for shape, base_too in itertools.product(SHAPES + WIDE[:2], (False, True)):
        weight = oracle.make_weight("bits", shape, oracle.DTYPES[dtype], generator, padding=8)
        base = oracle.make_weight("bits", shape, oracle.DTYPES[dtype], generator)
        norm = oracle.make_norm("nan" if base_too else "none", shape[1], generator)
        mask = prune_mask(weight, None, Selection(0.3), backend="reference")
        (there, there_base, there_norm) = parity.moved([weight, base, norm], DEVICE)
        bases = (base, there_base) if base_too else (None, None)
        assert oracle.same_bits(
            score_op(there, there_norm, base_weight=bases[1], backend="triton").cpu(),
            score_op(weight, norm, base_weight=bases[0], backend="reference"),
        )
        expected = apply_mask_(
            parity.copied(weight), mask, base_weight=bases[0], backend="reference"
        )
        applied = parity.copied(weight, DEVICE)
        apply_mask_(applied, mask.to(DEVICE), base_weight=bases[1], backend="triton")
        assert oracle.same_bits(applied.cpu(), expected)
        parity.check_padding(applied)


def test_pad_bits_of_a_mask_are_not_read():
    """A mask made elsewhere may have them set; no column past the end is touched."""
    weight = torch.ones(2, 12, device=DEVICE)[:, :9]
    mask = PackedMask(torch.full((2, 2), 255, dtype=torch.uint8, device=DEVICE), (2, 9))
    apply_mask_(weight, mask, backend="triton")
    assert weight._base.sum(dim=1).tolist() == [3.0, 3.0]


def test_prune_linear_is_its_parts():
    generator = torch.Generator().manual_seed(12)
    weight = torch.randn(20, 96, generator=generator).bfloat16()
    x = torch.randn(2, 30, 96, generator=generator).bfloat16()
    token_mask = torch.rand(2, 30, generator=generator) > 0.5
    pruned, mask, norm = prune_linear_(
        weight.to(DEVICE, copy=True),
        x.to(DEVICE),
        Selection(0.1),
        token_mask=token_mask.to(DEVICE),
        return_mask=True,
        return_norm=True,
        backend="triton",
    )
    exact = x[token_mask].double().square().sum(dim=0).sqrt()
    torch.testing.assert_close(norm.cpu().double(), exact, rtol=1e-6, atol=0)
    assert mask.to("cpu") == prune_mask(weight, norm.cpu(), Selection(0.1), backend="reference")
    assert oracle.same_bits(pruned.cpu(), prune_(weight.clone(), norm.cpu(), Selection(0.1)))


@settings(max_examples=300 if COMPILED else sampling.examples(60, 15), deadline=None)
@given(st.data())
def test_any_call(data):
    widths = st.integers(0, 140) | st.sampled_from([512, 520, 1024, 1030])
    both(*parity.draw_call(data, widths))


def test_lists_give_what_single_calls_give():
    generator = torch.Generator().manual_seed(14)
    weights = [torch.randn(9, 50, generator=generator) for _ in range(3)]
    norms = [torch.rand(50, generator=generator) for _ in range(3)]
    singles = [prune_(w.clone(), n, Selection(0.2)) for w, n in zip(weights, norms, strict=True)]
    many = prune_many_(
        parity.moved([w.clone() for w in weights], DEVICE),
        parity.moved(norms, DEVICE),
        Selection(0.2),
        backend="triton",
    )
    assert all(oracle.same_bits(a, b.cpu()) for a, b in zip(singles, many, strict=True))


def test_cpu_tensors_are_taken_under_the_interpreter_alone(monkeypatch):
    module, _ = backends.load("triton")
    monkeypatch.setattr(module, "DEVICE_TYPES", ("cuda", "xpu"))
    with pytest.raises(BackendUnavailable, match="takes cuda or xpu tensors, not cpu"):
        prune_(torch.ones(2, 3), None, Selection(0.5), backend="triton")


def test_it_says_why_it_cannot_run(monkeypatch):
    module, _ = backends.load("triton")
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "DEVICE_TYPES", ("cuda", "xpu"))
    for name in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)
    assert module.unavailable().startswith("torch sees no GPU here")
    monkeypatch.setattr(module, "_missing", "triton is not installed (pip install triton)")
    assert module.unavailable() == "triton is not installed (pip install triton)"
    monkeypatch.setattr(module, "_missing", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "capability 7.5; 8.0 or later is needed" in module.unavailable()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("CC", "cc")
    assert module.unavailable() is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "finds no C compiler" in module.unavailable()
