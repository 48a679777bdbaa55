"""Tensor and global scope in CUDA against the reference: every bit of every output.

Without a GPU the kernels run as ``csrc/simt`` compiles them, where a sample of 512 weights and
tables of a few matrices make every path one of small inputs.
"""

import itertools
import zlib

import oracle
import parity
import pytest
import sampling
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidote_fast import Selection, prune_, prune_many_, select_mask
from antidote_fast.backends import cuda, load
from antidote_fast.backends.operand import Operand
from antidote_fast.selection import num_pruned

if load("cuda")[1] is not None:
    pytest.skip(f"cuda backend: {load('cuda')[1]}", allow_module_level=True)

pytestmark = [pytest.mark.table, pytest.mark.thin]

DEVICE = "cpu" if cuda.EMULATED else "cuda"
SAMPLE = 512 if cuda.EMULATED else 8192
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LARGEST = pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
# More weights than a sample: so many rows of 512.
ROWS = 24 if cuda.EMULATED else 256

SHAPES = [(1, 1), (7, 2), (5, 8), (9, 15), (6, 33), (3, 257), (33, 64), (2, 1000), (1000, 3)]
LISTS = {
    "equal shapes": [(6, 40), (6, 40)],
    "mixed": [(5, 8), (1, 1), (3, 65), (16, 2), (2, 200)],
    "empties": [(0, 8), (4, 24), (3, 0), (0, 0), (2, 16), (5, 0)],
    "lora": [(8, 512), (512, 8), (8, 320), (480, 8)],
    "many": [(3, 40 + i % 3) for i in range(40)],
}


def generator(*seed):
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def both(weights, norms, selection, preserve=None, bases=None):
    return parity.same("cuda", weights, norms, selection, preserve, bases, DEVICE)


def sampled_places(total):
    """Where the kernels sample a selection over so many weights."""
    size = min(total, max(SAMPLE, min(32 * SAMPLE, total // 16384)))
    places = []
    for number in range(size):
        begin, end = number * total // size, (number + 1) * total // size
        mixed = number * 2654435761 & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 15) * 2246822519 & 0xFFFFFFFF
        mixed = ((mixed ^ mixed >> 13) * 3266489917 & 0xFFFFFFFF) >> 1
        places.append(begin + mixed % (end - begin))
    return torch.tensor(places)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@LARGEST
def test_shapes(shape, largest):
    g = generator(shape)
    for dtype in (BF16, FP32):
        weight = oracle.make_weight("gauss", shape, dtype, g)
        norm = oracle.make_norm("uniform", shape[1], g)
        both([weight], [norm], Selection(0.2, scope="tensor", largest=largest))


@pytest.mark.parametrize("kind", oracle.WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES.values(), ids=oracle.DTYPES)
def test_weight_kinds(kind, dtype):
    g = generator(kind)
    weight = oracle.make_weight(kind, (20, 72), dtype, g)
    for norm, largest in (("none", True), ("uniform", False)):
        selection = Selection(0.3, scope="tensor", largest=largest)
        both([weight], [oracle.make_norm(norm, 72, g)], selection)


@pytest.mark.parametrize("kind", oracle.NORM_KINDS)
def test_norm_kinds(kind):
    g = generator(kind)
    for columns, weights in ((65, "bits"), (64, "gauss")):
        weight = oracle.make_weight(weights, (17, columns), BF16, g)
        norm = oracle.make_norm(kind, columns, g)
        both([weight], [norm], Selection(0.4, scope="tensor"))


@LARGEST
@pytest.mark.parametrize("number", [0, 1, 2, -2, -1, None])
def test_extreme_counts(number, largest):
    """None, one, all but one, all."""
    g = generator(number)
    weights = [oracle.make_weight("gauss", (9, 64), BF16, g) for _ in range(2)]
    norms = [oracle.make_norm("uniform", 64, g), None]
    total = 2 * 9 * 64
    ratio = 1.0 if number is None else (number % total + 0.25) / total
    selection = Selection(ratio if number != 0 else 0.0, scope="global", largest=largest)
    both(weights, norms, selection)
    both(weights, norms, selection, [None, norms[0]])


def test_nothing_selected_still_fills_the_masks():
    weight = torch.ones((3, 12), dtype=BF16, device=DEVICE)
    bits = torch.full((3, 2), 255, dtype=torch.uint8, device=DEVICE)
    selection = Selection(0.0, scope="tensor")
    cuda.prune([Operand(weight, bits=bits)], selection, write=True)
    assert not bits.any()
    assert (weight == 1).all()


@pytest.mark.parametrize("padding", [1, 8])
@pytest.mark.parametrize("columns", [40, 33])
def test_strides(columns, padding):
    g = generator(columns, padding)
    for dtype in (FP16, FP32):
        weight = oracle.make_weight("gauss", (19, columns), dtype, g, padding)
        base = oracle.make_weight("gauss", (19, columns), dtype, g, padding)
        norm = oracle.make_norm("uniform", columns, g)
        both([weight], [norm], Selection(0.3, scope="tensor"), None, [base])
        both([weight[2:3]], [norm], Selection(0.3, scope="tensor", largest=False))


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_addresses_between_vectors(offset):
    """Weights and norms that begin anywhere: an element's alignment is all that is promised."""
    g = generator(offset)
    flat = torch.randn(10 * 64 + offset, generator=g).to(BF16)
    norms = torch.rand(64 + offset, generator=g)
    weight, norm = flat[offset:].view(10, 64), norms[offset:]
    selection = Selection(0.3, scope="tensor")
    expected = prune_(weight.clone(), norm, selection, backend="reference")
    there, there_norm = flat.clone().to(DEVICE), norms.clone().to(DEVICE)
    prune_(there[offset:].view(10, 64), there_norm[offset:], selection, backend="cuda")
    assert oracle.same_bits(there[offset:].view(10, 64).cpu(), expected)
    assert oracle.same_bits(there[:offset].cpu(), flat[:offset])


@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
@LARGEST
def test_lists(shapes, largest):
    g = generator(len(shapes), largest)
    for dtypes in ((BF16,), (FP16,), (FP32, BF16, FP16)):
        weights = [
            oracle.make_weight("gauss", s, dtypes[i % len(dtypes)], g) for i, s in enumerate(shapes)
        ]
        norms = [
            oracle.make_norm(("uniform", "none", "dead")[i % 3], s[1], g)
            for i, s in enumerate(shapes)
        ]
        both(weights, norms, Selection(0.3, scope="global", largest=largest))


@LARGEST
@pytest.mark.parametrize("who", ["all", "some", "none of the last"])
def test_preserve(who, largest):
    g = generator(who, largest)
    shapes = [(16, 40), (13, 65), (4, 16), (5, 8), (9, 64)]
    weights = [oracle.make_weight("ties", s, BF16, g) for s in shapes]
    norms = [oracle.make_norm("uniform", s[1], g) for s in shapes]
    preserve = [oracle.make_norm("dead", s[1], g) for s in shapes]
    absent = {"all": (), "some": (0, 2), "none of the last": (3, 4)}[who]
    preserve = [None if i in absent else n for i, n in enumerate(preserve)]
    for ratios in [(0.5, 0.4), (1.0, 1.0), (1.0, 0.3), (0.2, 0.0), (0.0, 0.5)]:
        selection = Selection(ratios[0], scope="global", largest=largest, preserve_ratio=ratios[1])
        both(weights, norms, selection, preserve)
        if who == "all":
            one = Selection(ratios[0], scope="tensor", largest=largest, preserve_ratio=ratios[1])
            both(weights[:1], norms[:1], one, preserve[:1])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("preserve", [False, True], ids=["", "preserve"])
def test_base_weights(dtype, preserve):
    g = generator(preserve)
    shapes = [(16, 40), (3, 24), (14, 16)]
    weights = [oracle.make_weight("bits", s, dtype, g) for s in shapes]
    bases = [oracle.make_weight("bits", s, dtype, g) for s in shapes]
    norms = [oracle.make_norm("uniform", s[1], g) for s in shapes]
    kept = [norms[0], None, norms[2]] if preserve else None
    delta = Selection(0.3, scope="global", score_delta=True, preserve_ratio=0.5)
    both(weights, norms, delta, kept, bases)
    both(weights, norms, Selection(0.3, scope="global"), kept, [bases[0], None, bases[2]])


def test_delta_of_mixed_dtypes():
    g = generator(0)
    cases = list(zip([(6, 40), (3, 33), (34, 16)], (FP16, FP32, BF16), strict=True))
    weights, bases = ([oracle.make_weight("ties", s, t, g) for s, t in cases] for _ in range(2))
    norms = [oracle.make_norm("uniform", s[1], g) for s, _ in cases]
    selection = Selection(0.3, scope="global", score_delta=True, largest=False)
    both(weights, norms, selection, [None, norms[1], norms[2]], bases)


@LARGEST
@pytest.mark.parametrize("columns", [40, 33])
def test_signed_scores(columns, largest):
    g = generator(columns)
    for kind, ratio in itertools.product(oracle.WEIGHT_KINDS, (0.0, 0.02, 0.55, 1.0)):
        scores = oracle.make_weight(kind, (23, columns), FP32, g, padding=2)
        selection = Selection(ratio, scope="tensor", largest=largest)
        expected = select_mask(scores, selection, backend="reference")
        there = parity.copied(scores, DEVICE)
        assert select_mask(there, selection, backend="cuda").to("cpu") == expected
        assert oracle.same_bits(there.cpu(), scores)


@LARGEST
@pytest.mark.parametrize("removed", [1, 1023, 1024, 4000, 8191])
def test_ties_over_blocks(removed, largest):
    """All keys are equal, so that the flat index alone decides, in whichever block it lies."""
    weights = [torch.full(s, -0.5, dtype=BF16) for s in ((256, 8), (64, 32), (8, 512))]
    selection = Selection((removed + 0.25) / 8192, scope="global", largest=largest)
    both(weights, [None] * 3, selection)
    both(weights, [None] * 3, selection, [torch.ones(8), None, torch.ones(512)])


@LARGEST
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_rank_at_the_boundary_of_zeros(beyond, largest):
    """Half of the weights are zeros of both signs, and the cut lies among them, or beside."""
    g = generator(beyond)
    total = ROWS * 512
    weight = torch.rand(total, generator=g) + 0.5
    zero = torch.randperm(total, generator=g)[: total // 2]
    weight[zero] = torch.where(torch.arange(total // 2) % 2 == 0, 0.0, -0.0)
    selection = Selection((total // 2 + beyond + 0.25) / total, scope="tensor", largest=largest)
    both([weight.view(ROWS, 512)], [None], selection)
    both([weight.view(ROWS, 512).to(BF16)], [None], selection)


@LARGEST
@pytest.mark.parametrize("ratio", [0.001, 0.05, 0.4, 0.99])
def test_rank_among_the_keys_kept(ratio, largest):
    """Few ties, in more weights than the sample: the usual case, in every order of the weights."""
    g = generator(ratio)
    weight = torch.randn((ROWS, 512), generator=g)
    norm = oracle.make_norm("uniform", 512, g)
    selection = Selection(ratio, scope="tensor", largest=largest)
    for dtype in (BF16, FP16, FP32):
        both([weight.to(dtype)], [norm], selection)
    ordered = weight.flatten().abs().sort().values.view(ROWS, 512)
    both([ordered.to(BF16)], [None], selection)
    both([ordered.flip(0, 1)], [None], selection)


@LARGEST
def test_ties_among_the_keys_kept(largest):
    """A dozen keys a bracket, of which the cut splits one: its ties lie in several blocks."""
    g = generator(0)
    weight = torch.randint(1, 400, (ROWS, 512), generator=g).to(FP32)
    for number in range(0, 40, 7):
        ratio = 0.2 + number / 4000
        both([weight], [None], Selection(ratio, scope="tensor", largest=largest))


def planted(values, others):
    """A weight with these values where the kernels sample it, and others elsewhere."""
    weight = others.clone()
    places = sampled_places(weight.numel())
    weight[places] = values(len(places))
    return weight.view(-1, 512)


@LARGEST
@pytest.mark.parametrize("where", ["above", "below"])
def test_sample_that_misses(where, largest):
    """The sample sees none of what the others are, so that its bracket is beside the rank."""
    g = generator(where)
    others = torch.rand(ROWS * 512, generator=g) + (5 if where == "above" else 1)
    offset = 1 if where == "above" else 5
    for other in (others, (others * 8).round() / 8):
        weight = planted(lambda n: torch.rand(n, generator=g) + offset, other)
        for ratio in (0.1, 0.5):
            both([weight], [None], Selection(ratio, scope="tensor", largest=largest))
    # Only one of two selections misses.
    norm = torch.zeros(512)
    norm[:300] = 1.0
    both([weight], [None], Selection(0.3, scope="tensor", largest=largest), [norm])


@LARGEST
def test_more_keys_near_than_can_be_kept(largest):
    """The bracket holds the rank, and nearly all of the weights, which the sample does not show."""
    g = generator(0)
    total = 512 * (128 if cuda.EMULATED else 16384)  # a chunk of each warp is not enough
    values = torch.linspace(1, 2, SAMPLE)
    ratio = 0.4
    near = float(values[int(SAMPLE * (1 - ratio if largest else ratio))])
    for spread in (0.0, 0.02):
        others = near + spread * (torch.rand(total, generator=g) - 0.5)
        weight = planted(lambda n: values[torch.randperm(n, generator=g)], others)
        both([weight], [None], Selection(ratio, scope="tensor", largest=largest))


def test_neighbours_of_the_largest_and_smallest_keys():
    """NaN, infinities, zeros and denormals, each of them more than the sample's margin."""
    g = generator(0)
    kinds = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1e-45, 1.0])
    weight = kinds[torch.randint(6, (ROWS, 512), generator=g)]
    for ratio in (0.0, 0.1, 0.17, 0.3, 0.5, 0.7, 0.9, 1.0):
        for largest in (True, False):
            both([weight], [None], Selection(ratio, scope="tensor", largest=largest))
            scores = weight * torch.where(torch.rand(weight.shape, generator=g) < 0.5, -1.0, 1.0)
            selection = Selection(ratio, scope="tensor", largest=largest)
            expected = select_mask(scores, selection, backend="reference")
            assert select_mask(scores.to(DEVICE), selection, backend="cuda").to("cpu") == expected


def test_layers_of_different_scales():
    """All of what is near the cut lies in one matrix of several: in the stretch of few blocks."""
    g = generator(0)
    weights = [torch.randn((ROWS, 256), generator=g) * 10.0**i for i in (-9, 0, 9)]
    for ratio in (0.1, 0.5, 0.9):
        both(weights, [None] * 3, Selection(ratio, scope="global"))
        both([w.to(BF16) for w in weights], [None] * 3, Selection(ratio, scope="global"))


@pytest.mark.skipif(not cuda.EMULATED, reason="the order of threads cannot be chosen on a GPU")
def test_any_order_of_threads():
    """Also that of atomic additions: nothing but counts is added."""
    g = generator(0)
    weight = oracle.make_weight("ties", (ROWS, 512), BF16, g)
    norm = oracle.make_norm("uniform", 512, g)
    other = torch.randn((ROWS, 512), generator=g)
    try:
        for seed in range(1, 7):
            cuda._cuda.schedule(seed)
            selection = Selection(0.3, scope="global", largest=seed % 2 == 0, preserve_ratio=0.1)
            both([weight, weight], [norm, None], selection, [None, norm])
            both([other], [norm], selection)
    finally:
        cuda._cuda.schedule(0)


def test_lists_are_one_selection():
    g = generator(0)
    weights = [torch.randn((9, 48), generator=g) for _ in range(3)]
    selection = Selection(0.25, scope="global")
    copies = [w.clone().to(DEVICE) for w in weights]
    prune_many_(copies, [None] * 3, selection, backend="cuda")
    assert sum(int((c == 0).sum()) for c in copies) == num_pruned(3 * 9 * 48, selection)


@settings(max_examples=sampling.examples(100, 25), deadline=None)
@given(st.data())
def test_any_call(data):
    weights, norms, selection, preserve, bases = parity.draw_call(
        data, st.integers(0, 140) | st.sampled_from([512, 520, 1024])
    )
    ratio = selection.ratio if selection.n_m is None else 0.3
    changed = Selection(
        ratio,
        scope=data.draw(st.sampled_from(["tensor", "global"])),
        largest=selection.largest,
        score_delta=selection.score_delta,
        preserve_ratio=data.draw(st.none() | st.floats(0, 1)),
    )
    both(weights, norms, changed, preserve, bases)
