"""The CUDA kernels against the reference: on a GPU, or emulated in the sanitizer build."""

import itertools

import numpy as np
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
    prune_,
    prune_linear_,
    prune_many_,
    prune_mask,
    select_mask,
)
from antidote_fast.backends import cuda, load

pytestmark = [
    pytest.mark.skipif(load("cuda")[1] is not None, reason=f"cuda backend: {load('cuda')[1]}"),
    pytest.mark.table,
    pytest.mark.thin,
]
DEVICE = "cpu" if cuda.EMULATED else "cuda"
KINDS = list(itertools.product(oracle.WEIGHT_KINDS, ("none", "uniform", "dead", "nan")))
# Of one warp, of blocks of 64 threads and more, and on both sides of each border.
WIDE = [(3, 1025), (2, 2048), (2, 2056), (3, 4096), (2, 4104), (2, 5001), (1, 8192), (1, 11008)]


def both(weights, norms, selection, preserve=None, bases=None):
    return parity.same("cuda", weights, norms, selection, preserve, bases, DEVICE)


@pytest.fixture(autouse=True, params=[0, 1, 2] if cuda.EMULATED else [None])
def schedule(request):
    """The order in which emulated threads run; on a GPU it is what it is."""
    if request.param is not None:
        cuda._cuda.schedule(request.param)
    return request.param


def some(cases, number):
    """All cases on a GPU, else two, other ones for each number."""
    return [cases[(7 * number + i) % len(cases)] for i in (0, 13)] if cuda.EMULATED else cases


def name_of(shape):
    return f"{shape[0]}x{shape[1]}"


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=name_of)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_kind_of_input(shape, dtype, schedule):
    generator = torch.Generator().manual_seed(sum(shape))
    for kind, norm_kind in some(KINDS, sum(shape) + len(dtype) + (schedule or 0)):
        padding = 3 if norm_kind == "dead" else 0
        weight = oracle.make_weight(kind, shape, oracle.DTYPES[dtype], generator, padding)
        norm = oracle.make_norm(norm_kind, shape[1], generator)
        both([weight], [norm], Selection(0.2))


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=name_of)
def test_every_selection(shape, name, schedule):
    selection = SELECTIONS[name]
    generator = torch.Generator().manual_seed(7)
    cases = list(itertools.product(("gauss", "ties", "bits"), oracle.DTYPES.values()))
    for kind, dtype in some(cases, sum(shape) + len(name) + (schedule or 0)):
        weight = oracle.make_weight(kind, shape, dtype, generator, padding=8)
        norm = oracle.make_norm("uniform", shape[1], generator)
        base = oracle.make_weight("ties", shape, dtype, generator, padding=1)
        preserve = None
        if selection.n_m is None:
            preserve = [oracle.make_norm("outlier", shape[1], generator)]
        both([weight], [norm], selection)
        both([weight], [norm], selection, preserve, [base])


@pytest.mark.parametrize("shape", WIDE, ids=name_of)
def test_wide_rows_with_all_options(shape, schedule):
    """Set difference, revert, and (in a kernel that reads rows again) score of a difference."""
    generator = torch.Generator().manual_seed(3)
    cases = itertools.product(oracle.DTYPES.values(), (True, False), (True, False))
    for dtype, largest, delta in some(list(cases), sum(shape) + (schedule or 0)):
        selection = Selection(0.3, largest=largest, preserve_ratio=0.2, score_delta=delta)
        weight, base = (oracle.make_weight("gauss", shape, dtype, generator) for _ in range(2))
        norms = [oracle.make_norm(kind, shape[1], generator) for kind in ("uniform", "outlier")]
        both([weight], norms[:1], selection, norms[1:], [base])


@pytest.mark.parametrize("kind", ["gauss", "equal", "zeros", "sorted", "huge"])
@pytest.mark.parametrize("columns", [16384, 20000, 32776, 131072])
def test_long_rows(columns, kind):
    """Up to 32768 columns a block holds a row; longer ones are read again."""
    generator = torch.Generator().manual_seed(5)
    weight = oracle.make_weight(kind, (1, columns), torch.bfloat16, generator)
    both([weight], [oracle.make_norm("uniform", columns, generator)], Selection(0.05))
    if columns < 100_000:
        both([weight.float()], [None], Selection(0.7, largest=False))


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("norm_kind", ["ones", "outlier", "sorted", "blocks"])
def test_rows_that_mislead_the_sample(ratio, norm_kind):
    """What is sampled is a quarter of the row: columns that differ from it in every way."""
    generator = torch.Generator().manual_seed(8)
    for columns, dtype in ((700, torch.float16), (4096, torch.bfloat16), (3001, torch.float32)):
        weight = oracle.make_weight("gauss", (3, columns), dtype, generator)
        norm = oracle.make_norm("outlier" if norm_kind == "outlier" else "ones", columns, generator)
        if norm_kind == "sorted":
            norm = torch.linspace(1e-3, 1e3, columns)
        elif norm_kind == "blocks":  # large just where the sample does not look
            norm = torch.where(torch.arange(columns) % 8 == 4, 1e4, 1.0)
        both([weight], [norm], Selection(ratio))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_rows_of_zeros_and_of_alike(share):
    """Bounds far apart, and the key looked for among many in the last bin between them."""
    generator = torch.Generator().manual_seed(12)
    for columns, dtype in ((700, torch.float16), (1500, torch.bfloat16), (4096, torch.float32)):
        weight = 1 + torch.rand(3, columns, generator=generator)
        weight *= torch.rand(3, columns, generator=generator) > share
        for ratio in (share - 0.01, share, share + 0.01):
            both([weight.to(dtype)], [None], Selection(ratio, largest=False))
            both([weight.to(dtype)], [None], Selection(1 - ratio))


@pytest.mark.parametrize("rank", [4, 8, 16, 32, 48, 64, 256])
@pytest.mark.parametrize("preserved", [False, True])
def test_an_adapter(rank, preserved):
    """A (rank, in) and B (out, rank) factors of several modules in one call."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [(1024, 96), (576, 130), (5000, 64), (11008, 40)]
    shapes = [shape for wide, tall in sizes for shape in ((rank, wide), (tall, rank))]
    if cuda.EMULATED:
        shapes = [(min(rows, 12 if columns > 100 else 300), columns) for rows, columns in shapes]
    weights = [oracle.make_weight("gauss", s, torch.bfloat16, generator) for s in shapes]
    weights[1].zero_()  # as B is before training
    norms = [oracle.make_norm("uniform", s[1], generator) for s in shapes]
    preserve = None
    if preserved:
        preserve = [
            oracle.make_norm("outlier", s[1], generator) if i % 3 else None
            for i, s in enumerate(shapes)
        ]
    both(weights, norms, Selection(0.1, preserve_ratio=0.05), preserve)


def test_a_list_of_everything():
    """Short, long and too long rows, mixed dtypes, views, an empty one."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(5, 16), (3, 1000), (0, 8), (2, 9001), (4, 7), (2, 2048), (1, 17000), (1, 33000)]
    for dtypes in itertools.product((torch.bfloat16, torch.float32), repeat=2):
        weights = [
            oracle.make_weight("ties", s, dtypes[i % 2], generator, padding=8 * (i % 3))
            for i, s in enumerate(shapes)
        ]
        norms = [oracle.make_norm("uniform", s[1], generator) for s in shapes]
        norms[1] = None
        bases = [w.clone() if i % 2 else None for i, w in enumerate(weights)]
        both(weights, norms, Selection(0.15), bases=bases)
        both(weights, norms, Selection(0.3, largest=False), norms)
        bases = [w.flip(0).contiguous() for w in weights]
        both(weights, norms, Selection(0.3, score_delta=True), norms, bases)


def test_a_list_longer_than_a_launch_takes():
    generator = torch.Generator().manual_seed(6)
    number = 40 if cuda.EMULATED else 900
    shapes = [((i * 7) % 5 + 1, (i * 13) % 70 + 1) for i in range(number)]
    weights = [oracle.make_weight("gauss", s, torch.float16, generator) for s in shapes]
    norms = [oracle.make_norm("uniform", s[1], generator) for s in shapes]
    both(weights, norms, Selection(0.2))


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("largest", [True, False])
def test_signed_scores(scope, largest):
    generator = torch.Generator().manual_seed(4)
    selection = Selection(0.3, scope=scope, largest=largest)
    for shape, kind in some(list(itertools.product(SHAPES, oracle.WEIGHT_KINDS)), 5 + largest):
        scores = oracle.make_weight(kind, shape, torch.float32, generator, padding=2)
        expected = select_mask(scores, selection, backend="reference")
        found = select_mask(parity.copied(scores, DEVICE), selection, backend="cuda")
        assert found.to("cpu") == expected


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_operands_that_are_not_aligned(offset):
    generator = torch.Generator().manual_seed(9)
    for columns in (16, 64, 520, 2048):
        plain = oracle.make_weight("gauss", (3, columns), torch.bfloat16, generator)
        norm = oracle.make_norm("uniform", columns, generator)
        expected = prune_(plain.clone(), norm, Selection(0.2), backend="reference")
        memory = torch.zeros(3 * columns + offset, dtype=torch.bfloat16, device=DEVICE)
        weight = memory[offset:].view(3, columns)
        weight.copy_(plain)
        norms = torch.zeros(columns + offset, device=DEVICE)
        norms[offset:] = norm.to(DEVICE)
        prune_(weight, norms[offset:], Selection(0.2), backend="cuda")
        assert oracle.same_bits(weight.cpu(), expected)


@settings(max_examples=sampling.examples(150, 40) if cuda.EMULATED else 1500, deadline=None)
@given(st.data())
def test_any_call(data):
    widths = st.integers(0, 140) | st.integers(1000, 1300) if cuda.EMULATED else None
    both(*parity.draw_call(data, widths))


@pytest.mark.parametrize("columns", [24, 200, 1500])
@pytest.mark.parametrize("masked", [False, True])
def test_a_linear_layer_in_one_launch(columns, masked):
    """The norms are those that accumulate_sq_norm_ gives, the mask that of these norms."""
    generator = torch.Generator().manual_seed(columns)
    for dtype, largest in itertools.product(oracle.DTYPES.values(), (True, False)):
        selection = Selection(0.2, largest=largest, preserve_ratio=0.1)
        weight = oracle.make_weight("gauss", (7, columns), dtype, generator)
        base = oracle.make_weight("gauss", (7, columns), dtype, generator)
        x = torch.randn(3, 11, columns, generator=generator).to(dtype)
        mask = torch.rand(3, 11, generator=generator) > 0.3 if masked else None
        preserve = oracle.make_norm("outlier", columns, generator)
        pruned, found, norm = prune_linear_(
            parity.copied(weight, DEVICE),
            x.to(DEVICE),
            selection,
            token_mask=None if mask is None else mask.to(DEVICE),
            preserve_norm=preserve.to(DEVICE),
            base_weight=base.to(DEVICE),
            return_mask=True,
            return_norm=True,
            backend="cuda",
        )
        sums = torch.zeros(columns, device=DEVICE)
        token_mask = None if mask is None else mask.to(DEVICE)
        accumulate_sq_norm_(sums, x.to(DEVICE), token_mask, backend="cuda")
        root = torch.from_numpy(np.sqrt(sums.cpu().numpy()))  # torch's own is not always rounded
        assert oracle.same_bits(root, norm.cpu())
        expected, expected_mask = prune_(
            weight.clone(),
            norm.cpu(),
            selection,
            preserve_norm=preserve,
            base_weight=base,
            return_mask=True,
            backend="reference",
        )
        assert found.to("cpu") == expected_mask
        assert oracle.same_bits(pruned.cpu(), expected)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("columns", [11008, 16384, 28672])
def test_a_wide_linear_layer(columns, dtype):
    """A launch of its own for up to 512 threads a row, several behind each other beyond."""
    generator = torch.Generator().manual_seed(columns)
    weight = oracle.make_weight("gauss", (2, columns), oracle.DTYPES[dtype], generator)
    x = torch.randn(3, columns, generator=generator).to(weight.dtype)
    pruned, found, norm = prune_linear_(
        parity.copied(weight, DEVICE),
        x.to(DEVICE),
        Selection(0.2),
        return_mask=True,
        return_norm=True,
        backend="cuda",
    )
    expected, expected_mask = prune_(
        weight, norm.cpu(), Selection(0.2), return_mask=True, backend="reference"
    )
    assert found.to("cpu") == expected_mask
    assert oracle.same_bits(pruned.cpu(), expected)


def test_inputs_are_left_alone():
    generator = torch.Generator().manual_seed(11)
    for columns in (16, 100, 3000):
        weight = torch.randn(4, columns, generator=generator).to(DEVICE)
        norm = torch.rand(columns, generator=generator).to(DEVICE)
        before = weight.clone(), norm.clone()
        for scope in ("row", "tensor"):
            prune_mask(weight, norm, Selection(0.3, scope=scope), backend="cuda")
        assert oracle.same_bits(weight, before[0])
        assert oracle.same_bits(norm, before[1])


def test_lists_give_what_single_calls_give():
    generator = torch.Generator().manual_seed(14)
    weights = [torch.randn(9, 50, generator=generator).to(DEVICE) for _ in range(3)]
    norms = [torch.rand(50, generator=generator).to(DEVICE) for _ in range(3)]
    options = {"backend": "cuda"}
    singles = [
        prune_(w.clone(), n, Selection(0.2), **options) for w, n in zip(weights, norms, strict=True)
    ]
    many = prune_many_([w.clone() for w in weights], norms, Selection(0.2), **options)
    assert all(oracle.same_bits(a, b) for a, b in zip(singles, many, strict=True))


@pytest.mark.skipif(cuda.EMULATED, reason="emulated threads capture no graphs")
@pytest.mark.parametrize("name", ["row-5%", "tensor", "2:4"])
def test_a_captured_graph(name):
    """Nothing waits, allocates outside torch or copies from the host: a replay prunes anew."""
    generator = torch.Generator().manual_seed(15)
    shapes = [(64, 16), (33, 1000), (8, 4096)]
    plain = [oracle.make_weight("gauss", s, torch.bfloat16, generator) for s in shapes]
    norms = [oracle.make_norm("uniform", s[1], generator) for s in shapes]
    weights, on_device = [w.to(DEVICE) for w in plain], [n.to(DEVICE) for n in norms]
    prune_many_([w.clone() for w in weights], on_device, SELECTIONS[name], backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prune_many_(weights, on_device, SELECTIONS[name], backend="cuda")
    for weight, original in zip(weights, plain, strict=True):
        weight.copy_(original.flip(0))
    graph.replay()
    expected = [w.flip(0).contiguous() for w in plain]
    prune_many_(expected, norms, SELECTIONS[name], backend="reference")
    assert all(oracle.same_bits(w.cpu(), e) for w, e in zip(weights, expected, strict=True))
