"""The CUDA sums of squares against float64: on a GPU, else emulated in the sanitizer build."""

import itertools

import oracle
import pytest
import torch

from antidote_fast import accumulate_sq_norm_
from antidote_fast.backends import load

cuda, _why = load("cuda")
pytestmark = [
    pytest.mark.skipif(_why is not None, reason=f"cuda backend: {_why}"),
    pytest.mark.table,
    pytest.mark.thin,
]

EMULATED = cuda.EMULATED
DEVICE = "cpu" if EMULATED else "cuda"
SCHEDULES = range(4) if EMULATED else range(2)  # on a GPU: two runs


def sums_of(x, token_mask=None, before=0.0):
    """What is added to sums of ``before``: the same bits in every run, in any order of threads."""
    runs = []
    for seed in SCHEDULES:
        if EMULATED:
            cuda._cuda.schedule(seed)
        sums = torch.full((x.shape[-1],), before, device=DEVICE)
        accumulate_sq_norm_(sums, x, token_mask, backend="cuda")
        runs.append(sums)
    assert all(oracle.same_bits(runs[0], other) for other in runs[1:])
    return runs[0]


def check(x, token_mask=None, before=0.0, rtol=1.5e-7):
    rows = x.reshape(-1, x.shape[-1]) if token_mask is None else x[token_mask]
    expected = before + rows.double().square().sum(dim=0)
    found = sums_of(x, token_mask, before)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width"),
    [
        (1, 1),
        (3, 7),
        (37, 8),
        (70, 24),
        (70, 33),
        (129, 64),
        (300, 100),
        (1100, 16),
        (65, 256),
        (200, 257),
        (40, 520),
        (0, 8),
    ],
    ids=lambda n: str(n),
)
def test_every_shape(tokens, width, dtype):
    x = normal(tokens, width, dtype=oracle.DTYPES[dtype])
    check(x)
    check(x, torch.arange(tokens, device=DEVICE) % 3 != 1, before=2.5)


def test_long_sums():
    """Rounded once: fp32 sums over so many tokens would be wrong in the fourth digit."""
    x = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 1
    check(x, rtol=1e-7)
    check(x.bfloat16(), before=1e6, rtol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("width", [40, 37])
def test_what_is_excluded_is_not_read(bad, width):
    x = normal(2, 39, width)
    mask = torch.ones(2, 39, dtype=torch.bool, device=DEVICE)
    mask[0, 2:35] = mask[1, 38] = False
    x[~mask] = bad
    check(x, mask)
    assert bool((sums_of(x, torch.zeros_like(mask), before=3.0) == 3).all())
    x[0, 0, 7] = bad
    assert sums_of(x, mask).isfinite().logical_not().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_strided_activations(dtype):
    x = normal(6, 15, 48, dtype=oracle.DTYPES[dtype], seed=9)
    views = [
        x[::2, 1:4, 3:36],
        x[:, 1:4],  # two dimensions, vectors
        x.transpose(0, 1)[:, :, :31],
        x[:, ::2, 8:24],
        x[:, :, 1:41],  # aligned strides, unaligned address
        x[:, :1],
        x.reshape(3, 2, 15, 48).transpose(0, 2),
        x.reshape(3, 2, 5, 3, 48)[:, :, ::2, :2].permute(3, 0, 2, 1, 4),
        x.reshape(2, 3, 15, 48)[:1],
        x[0, 0],
    ]
    for view in views:
        mask = torch.ones(view.shape[:-1], dtype=torch.bool, device=DEVICE)
        if mask.dim():
            mask.view(-1)[1:3] = False
        check(view, mask)
        check(view)


def test_runs_that_cross_a_boundary():
    """Of two dimensions, most runs of tokens stay inside the inner one, some do not."""
    x = normal(3, 70, 264, dtype=torch.bfloat16)
    for view in (x[:, :67, :256], x[:, 1:, :257], x[:, ::2, :8], x.transpose(0, 1)[::3]):
        check(view)
        mask = torch.arange(view[..., 0].numel(), device=DEVICE).view(view.shape[:2]) % 5 != 2
        check(view, mask)


def test_what_lies_between_the_rows_is_not_read():
    x = torch.full((50, 3, 40), torch.nan, device=DEVICE)
    for part in (x[:, :2, 4:36], x[::2, :1, :33]):
        part.copy_(normal(*part.shape))
        check(part)


def test_a_strided_view_and_its_copy_give_the_same_bits():
    """The order of a sum depends on sizes alone: not on strides, alignment or a mask of ones."""
    x = normal(200, 3, 80, dtype=torch.bfloat16)
    for view in (x[:, :2, :64], x[:, 1, 3:67], x.transpose(0, 1)[:, ::3, 16:80]):
        ones = torch.ones(view.shape[:-1], dtype=torch.bool, device=DEVICE)
        sums = sums_of(view.contiguous())
        assert oracle.same_bits(sums_of(view), sums)
        assert oracle.same_bits(sums_of(view, ones), sums)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_values_past_fp32_and_negative_zero(dtype):
    if dtype == "fp16":
        pytest.skip("its squares stay far inside fp32")
    x = torch.zeros(3, 8, device=DEVICE, dtype=oracle.DTYPES[dtype])
    x[1, 0], x[2, 1], x[0, 2], x[1, 3] = 1e30, -0.0, -3.0, -torch.inf
    inf = torch.inf
    assert sums_of(x).tolist() == [inf, 0.0, 9.0, inf, 0.0, 0.0, 0.0, 0.0]


def test_fp16_of_every_pattern():
    """All 65536 of them, a column each 256: denormals exactly, infinities, NaN."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(256, 256)
    sums, exact = sums_of(x.to(DEVICE)).cpu(), x.double().square().sum(dim=0)
    assert torch.equal(sums.isnan(), exact.isnan())
    x = x[:, ~exact.isnan()].contiguous()
    if x.numel():
        check(x.to(DEVICE))


def test_many_dimensions():
    x = normal(2, 3, 2, 3, 2, 3, 2, 3, 4)
    order = (0, 7, 1, 6, 2, 5, 3, 4, 8)
    check(x.permute(order))
    wide = x.unsqueeze(0).expand(1, *x.shape)  # a dimension of size 1 has any stride
    check(wide)
    for step in itertools.product((1, 2), repeat=2):
        check(x[:: step[0], :, :, :: step[1]])
