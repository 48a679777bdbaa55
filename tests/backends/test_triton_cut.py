"""Tensor and global scope in Triton against the reference: every bit of every output.

Without a GPU the kernels are interpreted: small tensors, in tiles and samples small enough that
several programs take part and that the sample is not everything.
"""

import os
import zlib

import oracle
import pytest
import sampling
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidote_fast import Selection
from antidote_fast.backends import reference, triton
from antidote_fast.backends.operand import Operand

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
    pytest.skip("no GPU, and TRITON_INTERPRET is not set", allow_module_level=True)

from antidote_fast.backends.triton_kernels import (  # noqa: E402
    cut,
    cut_search,
    cut_table,
    launch,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of NaN and overflow
    pytest.mark.thin(strength=2 if DEVICE.type == "cuda" else 1),
]

SHAPES = [(1, 1), (7, 2), (5, 8), (9, 15), (4, 16), (6, 33), (3, 257), (33, 64), (2, 1000)]
LISTS = {
    "equal shapes": [(6, 40), (6, 40)],
    "mixed": [(5, 8), (1, 1), (3, 65), (16, 2), (2, 200)],
    "empties": [(0, 8), (4, 24), (3, 0), (0, 0), (2, 16), (5, 0)],
    "lora": [(8, 64), (64, 8), (8, 32), (48, 8)],
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles and samples for tensors of a thousand weights."""
    monkeypatch.setattr(cut, "GROUPS", 32)
    monkeypatch.setattr(cut, "SAMPLE", 128)
    monkeypatch.setattr(cut, "SAMPLE_BLOCK", 128)
    monkeypatch.setattr(cut, "MARGIN", cut.MARGIN)  # which a test may change


def generator(*seed):
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def copied(weight):
    """A copy on the device, of the same strides, with what lies between its rows."""
    rows, columns = weight.shape
    if not weight.numel() or weight.is_contiguous():
        return weight.clone().to(DEVICE)
    wide = weight.as_strided((rows, weight.stride(0)), (weight.stride(0), 1)).clone()
    return wide.to(DEVICE)[:, :columns]


def on_device(tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def operands_of(weights, *lists):
    """What is to be pruned, with everything to fill."""
    operands = [Operand(*each) for each in zip(weights, *lists, strict=True)]
    for o in operands:
        rows, columns = o.weight.shape
        o.bits = torch.zeros((rows, -(-columns // 8)), dtype=torch.uint8, device=o.weight.device)
        o.thresholds = torch.full((rows,), torch.nan, device=o.weight.device)
    return operands


def both(weights, norms, selection, preserve=None, bases=None, *, write=True):
    """Prune copies either way and compare weights, masks and thresholds; returns the masks."""
    preserve = preserve or [None] * len(weights)
    bases = bases or [None] * len(weights)
    expected = operands_of([w.clone() for w in weights], norms, preserve, bases)
    reference.prune(expected, selection, write=write)
    parts = on_device(norms), on_device(preserve), on_device(bases)
    pruned = operands_of([copied(w) for w in weights], *parts)
    triton.prune(pruned, selection, write=write)
    for i, weight in enumerate(weights):
        mine, other = pruned[i], expected[i]
        assert oracle.same_bits(mine.weight.cpu(), other.weight), f"weight {i}"
        assert torch.equal(mine.bits.cpu(), other.bits), f"mask {i}"
        assert oracle.same_bits(mine.thresholds.cpu(), other.thresholds), f"thresholds {i}"
        if weight.numel() and not weight.is_contiguous():
            between = mine.weight.as_strided(
                (len(weight) - 1, weight.stride(0) - weight.shape[1]),
                (weight.stride(0), 1),
                mine.weight.storage_offset() + weight.shape[1],
            )
            assert (between == 7).all()
    return [o.bits for o in pruned]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    g = generator(shape)
    largest = sum(shape) % 2 == 0
    weight = oracle.make_weight("gauss", shape, FP32 if largest else BF16, g)
    norm = oracle.make_norm("uniform", shape[1], g)
    both([weight], [norm], Selection(0.2, scope="tensor", largest=largest))


@pytest.mark.parametrize("kind", oracle.WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES.values(), ids=oracle.DTYPES)
def test_weight_kinds(kind, dtype):
    g = generator(kind)
    weight = oracle.make_weight(kind, (9, 72), dtype, g)
    norm = oracle.make_norm("uniform" if dtype == FP16 else "none", 72, g)
    both([weight], [norm], Selection(0.3, scope="tensor", largest=dtype != FP32))


@pytest.mark.parametrize("kind", oracle.NORM_KINDS)
def test_norm_kinds(kind):
    g = generator(kind)
    weight = oracle.make_weight("bits", (7, 65), BF16, g)
    norm = oracle.make_norm(kind, 65, g)
    both([weight], [norm], Selection(0.4, scope="tensor"))


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("ratio", [0.0, 1e-6, 0.001, 0.999, 1.0])
def test_extreme_ratios(ratio, largest):
    g = generator(ratio)
    weights = [oracle.make_weight("gauss", (5, 48), BF16, g) for _ in range(2)]
    norms = [oracle.make_norm("uniform", 48, g), None]
    both(weights, norms, Selection(ratio, scope="global", largest=largest))


@pytest.mark.parametrize("padding", [1, 8])
@pytest.mark.parametrize("columns", [40, 33])
def test_strides(columns, padding):
    g = generator(columns, padding)
    weight = oracle.make_weight("gauss", (9, columns), FP16, g, padding)
    base = oracle.make_weight("gauss", (9, columns), FP16, g, padding)
    norm = oracle.make_norm("uniform", columns, g)
    both([weight], [norm], Selection(0.3, scope="tensor"), None, [base])
    one_row = weight[2:3]
    both([one_row], [norm], Selection(0.3, scope="tensor", largest=False))


def test_rows_longer_than_a_tile():
    g = generator(0)
    weight = oracle.make_weight("ties", (2, 9000), BF16, g)
    cut.GROUPS = 512
    both([weight], [oracle.make_norm("dead", 9000, g)], Selection(0.6, scope="tensor"))


def test_production_sizes(monkeypatch):
    monkeypatch.undo()
    g = generator(0)
    weight = oracle.make_weight("gauss", (33, 1024), BF16, g)
    both([weight], [oracle.make_norm("uniform", 1024, g)], Selection(0.05, scope="tensor"))


@pytest.mark.parametrize("shapes", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_lists(shapes, largest):
    g = generator(len(shapes), largest)
    dtypes = (BF16, BF16, BF16) if largest else (FP32, BF16, FP16)
    kinds = ("uniform", "none", "dead")
    weights = [oracle.make_weight("gauss", s, dtypes[i % 3], g) for i, s in enumerate(shapes)]
    norms = [oracle.make_norm(kinds[i % 3], s[1], g) for i, s in enumerate(shapes)]
    both(weights, norms, Selection(0.3, scope="global", largest=largest))


@pytest.mark.parametrize("shapes", [[(0, 8)], [(3, 0), (0, 0)]], ids=str)
def test_nothing_but_empties(shapes):
    weights = [torch.zeros(s) for s in shapes]
    both(weights, [None] * len(shapes), Selection(0.5, scope="global"))


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("who", ["all", "some", "none of the last"])
def test_preserve(who, largest):
    g = generator(who, largest)
    shapes = [(6, 40), (3, 65), (4, 16), (5, 8)]
    weights = [oracle.make_weight("ties", s, BF16, g) for s in shapes]
    norms = [oracle.make_norm("uniform", s[1], g) for s in shapes]
    preserve = [oracle.make_norm("dead", s[1], g) for s in shapes]
    absent = {"all": (), "some": (0, 2), "none of the last": (2, 3)}[who]
    preserve = [None if i in absent else n for i, n in enumerate(preserve)]
    selection = Selection(0.5, scope="global", largest=largest, preserve_ratio=0.4)
    both(weights, norms, selection, preserve)


@pytest.mark.parametrize("ratios", [(1.0, 1.0), (1.0, 0.3), (0.2, 0.0), (0.0, 0.5)], ids=str)
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_preserve_at_the_extremes(ratios, largest):
    g = generator(ratios)
    weights = [oracle.make_weight("gauss", (4, 40), BF16, g) for _ in range(2)]
    norm = oracle.make_norm("uniform", 40, g)
    selection = Selection(ratios[0], scope="global", largest=largest, preserve_ratio=ratios[1])
    both(weights, [norm, None], selection, [None, norm])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("preserve", [False, True], ids=["", "preserve"])
def test_base_weights(dtype, preserve):
    g = generator(preserve)
    shapes = [(6, 40), (3, 24), (4, 16)]
    weights = [oracle.make_weight("bits", s, dtype, g) for s in shapes]
    bases = [oracle.make_weight("bits", s, dtype, g) for s in shapes]
    norms = [oracle.make_norm("uniform", s[1], g) for s in shapes]
    kept = [norms[0], None, norms[2]] if preserve else None
    delta = Selection(0.3, scope="global", score_delta=True, preserve_ratio=0.5)
    both(weights, norms, delta, kept, bases)
    both(weights, norms, Selection(0.3, scope="global"), kept, [bases[0], None, bases[2]])


def test_delta_of_mixed_dtypes():
    g = generator(0)
    shapes = [(6, 40), (3, 33), (4, 16)]
    cases = list(zip(shapes, (FP16, FP32, BF16), strict=True))
    weights, bases = ([oracle.make_weight("ties", s, t, g) for s, t in cases] for _ in range(2))
    norms = [oracle.make_norm("uniform", s[1], g) for s in shapes]
    selection = Selection(0.3, scope="global", score_delta=True, largest=False)
    both(weights, norms, selection, [None, norms[1], norms[2]], bases)


def test_mask_only():
    g = generator(0)
    weight = oracle.make_weight("bits", (6, 40), BF16, g)
    masks = both([weight], [None], Selection(0.3, scope="tensor"), write=False)
    assert masks[0].any()


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("columns", [40, 33])
def test_signed_scores(columns, largest):
    g = generator(columns)
    for kind in ("bits", "zeros") if largest else ("gauss",):
        scores = oracle.make_weight(kind, (9, columns), FP32, g)
        selection = Selection(0.55, scope="tensor", largest=largest)
        expected = torch.zeros((9, -(-columns // 8)), dtype=torch.uint8)
        reference.select_mask(scores, selection, expected)
        bits, given_scores = torch.zeros_like(expected).to(DEVICE), scores.clone().to(DEVICE)
        triton.select_mask(given_scores, selection, bits)
        assert torch.equal(bits.cpu(), expected)
        assert oracle.same_bits(given_scores.cpu(), scores)


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("removed", [1, 127, 128, 511])
def test_ties_over_programs(removed, largest):
    """All keys are equal, so that the flat index alone decides, in whichever program it lies."""
    weights = [torch.full(s, -0.5, dtype=BF16) for s in ((16, 8), (4, 32), (8, 32))]
    total = sum(w.numel() for w in weights)
    ratio = removed / total
    selection = Selection(ratio, scope="global", largest=largest)
    both(weights, [None] * 3, selection)


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_rank_at_the_boundary_of_zeros(beyond, largest):
    """Half of the weights are zeros of both signs, and the cut lies among them, or beside."""
    g = generator(beyond)
    weight = torch.rand((16, 32), generator=g) + 0.5
    zero = torch.randperm(512, generator=g)[:256]
    weight.view(-1)[zero] = torch.where(torch.arange(256) % 2 == 0, 0.0, -0.0)
    both([weight], [None], Selection((256 + beyond) / 512, scope="tensor", largest=largest))


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("bins", [1, 3])
def test_bracket_that_begins_and_ends_within_bins(bins, largest):
    """Keys next to each other: some of a bin lie above the bracket, some below."""
    g = generator(bins)
    raw = torch.randint(bins * 4096, (12, 64), generator=g) + 0x3F800000
    weight = raw.to(torch.int32).view(FP32)
    for ratio in (0.1, 0.45):
        both([weight], [None], Selection(ratio, scope="tensor", largest=largest))


class Spy:
    """Keeps the arguments of the last launch of each kernel."""

    def __init__(self, monkeypatch):
        self.args = {}
        self.usual = launch.run
        monkeypatch.setattr(launch, "run", self.run)

    def run(self, kernel, grid, *args, **options):
        self.args[kernel.fn.__name__] = args
        self.usual(kernel, grid, *args, **options)

    def missed(self, which=0):
        """Whether the sample's bracket missed the rank, by the counts that the kernels left."""
        table, state = self.args["cut_apply_kernel"][:2]
        state = state[which * cut_search.STATE.value :]
        taken = int(table[cut_table.TAKEN.value + which])
        above = int(state[cut_search.ABOVE.value])
        return not above < taken <= int(state[cut_search.AT_LEAST.value])


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("kind", ["gauss", "zeros"])
def test_sample_that_misses(kind, largest, monkeypatch):
    """A bracket of one key, without a margin, is beside the rank; the answer is the same."""
    spy = Spy(monkeypatch)
    g = generator(kind)
    weight = oracle.make_weight(kind, (12, 64), FP32, g) + 0.0
    norm = oracle.make_norm("uniform", 64, g)
    selection = Selection(0.3 if largest else 0.9, scope="tensor", largest=largest)
    both([weight], [norm], selection)
    assert not spy.missed()
    monkeypatch.setattr(cut, "MARGIN", -100.0)
    both([weight], [norm], selection)
    assert spy.missed()


def test_only_one_of_two_samples_misses(monkeypatch):
    spy = Spy(monkeypatch)
    monkeypatch.setattr(cut, "MARGIN", -100.0)
    g = generator(0)
    weights = [oracle.make_weight("gauss", (12, 64), FP32, g), torch.full((4, 64), 0.001)]
    norms = [oracle.make_norm("uniform", 64, g), None]
    preserve = [None, torch.ones(64)]  # of equal keys, which a sample of one key brackets
    both(weights, norms, Selection(0.31, scope="global"), preserve)
    assert spy.missed(0)
    assert not spy.missed(1)


def test_scratch_does_not_grow_with_the_weights(monkeypatch):
    spy = Spy(monkeypatch)
    spy.usual = lambda *args, **options: None
    weight = torch.empty((4096, 4096), dtype=BF16, device=DEVICE)
    monkeypatch.setattr(launch, "num_programs", lambda *_: 528)
    monkeypatch.setattr(cut, "GROUPS", 256)
    triton.prune([Operand(weight)], Selection(1e-6, scope="tensor"), write=True)
    scratch = spy.args["cut_apply_kernel"][1]
    assert scratch.untyped_storage().nbytes() < 20e6


@settings(max_examples=sampling.examples(60, 15), deadline=None)
@given(st.data())
def test_anything(data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    shapes = data.draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=3)
    )
    one_dtype = data.draw(st.booleans())
    kinds = st.sampled_from(oracle.WEIGHT_KINDS)
    dtypes = [data.draw(st.sampled_from([BF16, FP16, FP32])) for _ in shapes]
    if one_dtype:
        dtypes = dtypes[:1] * len(shapes)
    padding = data.draw(st.sampled_from([0, 0, 3, 8]))
    weights = [
        oracle.make_weight(data.draw(kinds), s, t, g, padding)
        for s, t in zip(shapes, dtypes, strict=True)
    ]
    norm_kinds = st.sampled_from(oracle.NORM_KINDS)
    norms = [oracle.make_norm(data.draw(norm_kinds), s[1], g) for s in shapes]
    preserve = None
    if data.draw(st.booleans()):
        preserve = [oracle.make_norm(data.draw(norm_kinds), s[1], g) for s in shapes]
    delta = data.draw(st.booleans())
    bases = None
    if delta or data.draw(st.booleans()):
        bases = [oracle.make_weight("bits", s, t, g) for s, t in zip(shapes, dtypes, strict=True)]
    ratios = st.one_of(st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.floats(0, 1))
    selection = Selection(
        data.draw(ratios),
        scope="global",
        largest=data.draw(st.booleans()),
        score_delta=delta,
        preserve_ratio=data.draw(ratios),
    )
    cut.MARGIN = data.draw(st.sampled_from([4.5, 4.5, -100.0]))
    both(weights, norms, selection, preserve, bases)
