"""The Triton sums of squares against float64."""

import oracle
import pytest
import torch

triton = pytest.importorskip("triton")

from antidote_fast.backends.triton_kernels import (  # noqa: E402
    launch,
    norms,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and isinstance(norms.sq_norm_kernel, triton.JITFunction),
        reason="needs a GPU or TRITON_INTERPRET=1",
    ),
    pytest.mark.thin(strength=2 if DEVICE == "cuda" else 1),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def sums_of(x, token_mask=None, before=0.0):
    """What the kernel adds to sums of ``before``; the same bits in a second run."""
    runs = []
    for _ in range(2):
        sums = torch.full((x.shape[-1],), before, device=x.device)
        norms.accumulate_sq_norm_(sums, x, token_mask)
        runs.append(sums)
    assert oracle.same_bits(*runs)
    return runs[0]


def check(x, token_mask=None, before=0.0, rtol=1.5e-7):
    rows = x.reshape(-1, x.shape[-1]) if token_mask is None else x[token_mask]
    expected = before + rows.double().square().sum(dim=0)
    found = sums_of(x, token_mask, before)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0)


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width"),
    [(1, 1), (3, 7), (37, 8), (1, 24), (70, 33), (300, 100), (1100, 16), (40, 520), (0, 8)],
    ids=lambda n: str(n),
)
def test_every_shape(tokens, width, dtype):
    x = normal(tokens, width, dtype=DTYPES[dtype])
    check(x)
    mask = torch.arange(tokens, device=DEVICE) % 3 != 1
    check(x, mask, before=2.5)


def test_long_sums():
    x = torch.rand(20_000, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 1
    check(x, rtol=1e-7)
    check(x[:300].repeat(1, 1).bfloat16(), rtol=1e-7)


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_splits_and_blocks(programs, monkeypatch):
    monkeypatch.setattr(launch, "num_programs", lambda device, per_processor: programs)
    monkeypatch.setattr(norms, "STEPS", 2)
    x = normal(250, 270, dtype=torch.bfloat16)
    mask = torch.arange(250, device=DEVICE) % 2 == 0
    splits, per_split = norms.split_tokens(250, 2, 32, x.device)
    assert splits == {1: 1, 7: 3, 1000: 4}[programs]
    assert (splits - 1) * per_split < 250 <= splits * per_split
    check(x, mask, before=1.0)


def test_at_most_two_launches(monkeypatch):
    made = []
    real = launch.run
    monkeypatch.setattr(launch, "run", lambda *a, **k: made.append(1) or real(*a, **k))
    for shape, launches in (((100, 256), 1), ((600, 256), 2)):
        made.clear()
        norms.accumulate_sq_norm_(torch.zeros(256, device=DEVICE), normal(*shape), None)
        assert len(made) == launches


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_excluded_is_not_read(bad):
    x = normal(2, 9, 40)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0, 2:5] = mask[1, 8] = False
    x[~mask] = bad
    check(x, mask)
    assert bool((sums_of(x, torch.zeros_like(mask), before=3.0) == 3).all())
    x[0, 0, 7] = bad
    assert sums_of(x, mask).isfinite().logical_not().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_activations(dtype):
    x = normal(6, 5, 48, dtype=DTYPES[dtype], seed=9)
    views = [
        x[::2, 1:4, 3:36],
        x[:, 1:4],
        x.transpose(0, 1)[:, :, :31],
        x[:, ::2, 8:24],
        x[:, :1],
        x.reshape(3, 2, 5, 48).transpose(0, 2),  # three dimensions that do not merge: copied
        x.reshape(2, 3, 5, 48)[:1],
    ]
    for view in views:
        mask = torch.ones(view.shape[:-1], dtype=torch.bool, device=DEVICE)
        mask.view(-1)[1:3] = False
        check(view, mask)
        check(view)
    check(x[0, 0])
    check(x[0, 0], torch.tensor(True, device=DEVICE))


def test_which_dimensions_merge():
    x = torch.empty(4, 6, 16)
    assert norms.token_dims(x) == [(24, 16)]
    assert norms.token_dims(x[:, :3]) == [(4, 96), (3, 16)]
    assert norms.token_dims(x[:, ::2]) == [(12, 32)]
    assert norms.token_dims(x[:1]) == [(6, 16)]
    assert norms.token_dims(x[0, 0]) == []
    assert norms.token_dims(x.transpose(0, 1)) == [(6, 16), (4, 96)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_values_past_fp32_and_negative_zero():
    x = torch.zeros(3, 8, device=DEVICE)
    x[1, 0], x[2, 1], x[0, 2] = 1e30, -0.0, -3.0
    assert sums_of(x).tolist() == [torch.inf, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0]
