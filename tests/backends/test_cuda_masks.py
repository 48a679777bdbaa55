"""CUDA scores, masks and n of each m against the reference: on a GPU, else emulated."""

import itertools

import oracle
import parity
import pytest
import torch
from parity import SHAPES

from antidote_fast import PackedMask, Selection, apply_mask_, prune_, prune_mask, select_mask
from antidote_fast import score as score_op
from antidote_fast.backends import load

cuda, _why = load("cuda")
pytestmark = [
    pytest.mark.skipif(_why is not None, reason=f"cuda backend: {_why}"),
    pytest.mark.table,
    pytest.mark.thin,
]

EMULATED = cuda.EMULATED
DEVICE = "cpu" if EMULATED else "cuda"
MORE_SHAPES = [(5, 24), (3, 48), (40, 8), (2, 2048), (3, 1040), (1, 4100)]
SMALL_GROUPS = [(1, 1), (0, 1), (1, 2), (2, 4), (0, 4), (4, 4), (4, 8), (7, 8), (3, 16), (13, 16)]
OTHER_GROUPS = [(1, 3), (3, 7), (5, 9), (12, 24), (31, 32), (1, 33), (9, 70), (64, 64)]


def both(weights, norms, selection, bases=None):
    return parity.same("cuda", weights, norms, selection, None, bases, DEVICE)


def unaligned(tensor):
    """A copy on the device whose first row begins 2 or 4 bytes past a multiple of 16."""
    flat = torch.full((tensor.numel() + 9,), 7.0, dtype=tensor.dtype, device=DEVICE)
    flat = flat[1:] if flat.data_ptr() % 16 == 0 else flat
    copy = flat[: tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    assert copy.data_ptr() % 16 != 0 or not tensor.numel()
    return copy


@pytest.fixture(autouse=True)
def order(request):
    """Threads of a block run in another order in each test."""
    if EMULATED:
        cuda._cuda.schedule(len(request.node.name) % 4)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_scores_and_masks(dtype):
    generator = torch.Generator().manual_seed(11)
    cases = itertools.product(SHAPES + MORE_SHAPES, (0, 3, 8), (False, True))
    for shape, padding, base_too in cases:
        weight = oracle.make_weight("bits", shape, oracle.DTYPES[dtype], generator, padding)
        base = oracle.make_weight("bits", shape, oracle.DTYPES[dtype], generator)
        norm = oracle.make_norm("nan" if base_too else "none", shape[1], generator)
        mask = prune_mask(weight, None, Selection(0.3), backend="reference")
        there, there_base, there_norm = parity.moved([weight, base, norm], DEVICE)
        bases = (base, there_base) if base_too else (None, None)
        assert oracle.same_bits(
            score_op(there, there_norm, base_weight=bases[1], backend="cuda").cpu(),
            score_op(weight, norm, base_weight=bases[0], backend="reference"),
        )
        expected = apply_mask_(
            parity.copied(weight), mask, base_weight=bases[0], backend="reference"
        )
        applied = parity.copied(weight, DEVICE)
        apply_mask_(applied, mask.to(DEVICE), base_weight=bases[1], backend="cuda")
        assert oracle.same_bits(applied.cpu(), expected)
        parity.check_padding(applied)


@pytest.mark.parametrize("kind", oracle.WEIGHT_KINDS)
def test_scores_of_every_kind(kind):
    generator = torch.Generator().manual_seed(12)
    for dtype, norm_kind in itertools.product(oracle.DTYPES.values(), oracle.NORM_KINDS):
        weight = oracle.make_weight(kind, (3, 40), dtype, generator)
        norm = oracle.make_norm(norm_kind, 40, generator)
        there, there_norm = parity.moved([weight, norm], DEVICE)
        found = score_op(there, there_norm, backend="cuda").cpu()
        assert oracle.same_bits(found, score_op(weight, norm, backend="reference"))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_unaligned_operands(dtype):
    """Each of weight, base and norm in turn begins off a vector's boundary."""
    generator = torch.Generator().manual_seed(13)
    weight = oracle.make_weight("bits", (3, 64), oracle.DTYPES[dtype], generator)
    base = oracle.make_weight("ties", (3, 64), oracle.DTYPES[dtype], generator)
    norm = oracle.make_norm("uniform", 64, generator)
    selection = Selection(n_m=(2, 4), score_delta=True)
    expected_score = score_op(weight, norm, base_weight=base, backend="reference")
    expected = prune_(weight.clone(), norm, selection, base_weight=base, backend="reference")
    mask = prune_mask(weight, norm, selection, base_weight=base, backend="reference")
    for off in range(3):
        moved = [
            unaligned(t) if i == off else t.to(DEVICE, copy=True)
            for i, t in enumerate((weight, base, norm, weight))
        ]
        w, b, n, again = moved
        scores = score_op(w, n, base_weight=b, backend="cuda")
        assert oracle.same_bits(scores.cpu(), expected_score)
        _, own_mask = prune_(w, n, selection, base_weight=b, return_mask=True, backend="cuda")
        assert own_mask.to("cpu") == mask
        assert oracle.same_bits(w.cpu(), expected)
        again = unaligned(weight) if off == 0 else again
        apply_mask_(again, mask.to(DEVICE), base_weight=b, backend="cuda")
        assert oracle.same_bits(again.cpu(), expected)


def test_unaligned_weights_in_place():
    generator = torch.Generator().manual_seed(14)
    for dtype, n_m in itertools.product(oracle.DTYPES.values(), [(2, 4), (3, 16), (1, 5)]):
        weight = oracle.make_weight("ties", (4, 48), dtype, generator)
        there = unaligned(weight)
        prune_(there, None, Selection(n_m=n_m), backend="cuda")
        expected = prune_(weight.clone(), None, Selection(n_m=n_m), backend="reference")
        assert oracle.same_bits(there.cpu(), expected)
        begin = there.storage_offset()
        around = torch.cat([there._base[:begin], there._base[begin + there.numel() :]])
        assert len(around) == 9
        assert bool((around == 7).all())


def test_pad_bits_of_a_mask_are_not_read():
    """A mask made elsewhere may have them set; no column past the end is touched."""
    for dtype in oracle.DTYPES.values():
        weight = torch.ones(2, 16, device=DEVICE, dtype=dtype)[:, :9]
        mask = PackedMask(torch.full((2, 2), 255, dtype=torch.uint8, device=DEVICE), (2, 9))
        apply_mask_(weight, mask, backend="cuda")
        assert weight._base.float().sum(dim=1).tolist() == [7.0, 7.0]


@pytest.mark.parametrize("n_m", SMALL_GROUPS + OTHER_GROUPS, ids=lambda n_m: f"{n_m[0]}:{n_m[1]}")
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_groups(n_m, largest):
    generator = torch.Generator().manual_seed(6)
    selection = Selection(n_m=n_m, largest=largest, score_delta=largest)
    shapes = [(3, 64), (2, 257), (4, 96), (1, 5), (2, 40), (9, 23), (0, 8), (3, 0)]
    for shape, dtype in itertools.product(shapes, oracle.DTYPES.values()):
        kinds = ("gauss", "equal", "bits") if sum(shape) < 70 else ("bits",)
        for kind in kinds:
            padding = {"gauss": 0, "equal": 8, "bits": 1}[kind]
            weight = oracle.make_weight(kind, shape, dtype, generator, padding)
            base = oracle.make_weight("ties", shape, dtype, generator, padding)
            norm = oracle.make_norm("dead" if padding else "uniform", shape[1], generator)
            both([weight], [norm], selection, [base])


@pytest.mark.parametrize("kind", oracle.WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_groups_of_every_kind(kind, dtype):
    generator = torch.Generator().manual_seed(7)
    norm_kinds = itertools.cycle(oracle.NORM_KINDS)
    for n_m, columns in itertools.product([(2, 4), (1, 8), (5, 16), (2, 7)], (48, 50)):
        for _ in range(3):
            weight = oracle.make_weight(kind, (3, columns), oracle.DTYPES[dtype], generator)
            norm = oracle.make_norm(next(norm_kinds), columns, generator)
            both([weight], [norm], Selection(n_m=n_m))
            both([weight], [norm], Selection(n_m=n_m, largest=False))


def test_groups_as_long_as_a_row():
    generator = torch.Generator().manual_seed(8)
    for shape, n_m in [((2, 5100), (100, 5000)), ((1, 900), (899, 900)), ((3, 40), (90, 100))]:
        for kind in ("gauss", "zeros"):
            weight = oracle.make_weight(kind, shape, torch.bfloat16, generator)
            both([weight], [oracle.make_norm("uniform", shape[1], generator)], Selection(n_m=n_m))


@pytest.mark.parametrize("largest", [True, False])
def test_groups_of_signed_scores(largest):
    generator = torch.Generator().manual_seed(4)
    for shape, kind in itertools.product([(5, 64), (3, 37), (2, 130)], oracle.WEIGHT_KINDS):
        scores = oracle.make_weight(kind, shape, torch.float32, generator, padding=2)
        for n_m in ((1, 2), (1, 4), (3, 8), (11, 16), (5, 9), (20, 33)):
            selection = Selection(n_m=n_m, largest=largest)
            there = parity.copied(scores, DEVICE)
            found = select_mask(there, selection, backend="cuda").to("cpu")
            assert found == select_mask(scores, selection, backend="reference")


def test_a_mask_alone_leaves_the_weight():
    generator = torch.Generator().manual_seed(5)
    for n_m in ((2, 4), (3, 7)):
        weight = oracle.make_weight("gauss", (3, 72), torch.float16, generator)
        there = parity.copied(weight, DEVICE)
        mask = prune_mask(there, None, Selection(n_m=n_m), backend="cuda").to("cpu")
        assert mask == prune_mask(weight, None, Selection(n_m=n_m), backend="reference")
        assert oracle.same_bits(there.cpu(), weight)
        pruned = prune_(there, None, Selection(n_m=n_m), backend="cuda").cpu()
        assert torch.equal(pruned == 0, mask.to_bool())
