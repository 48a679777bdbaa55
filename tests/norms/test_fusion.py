"""Fused kernels against transformers' modules, and what a calibration with them leaves behind."""

import copy
import warnings

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

from antidote_fast import backends
from antidote_fast.errors import BackendUnavailable, UsageError
from antidote_fast.models.targets import find_targets
from antidote_fast.models.undo import undoing
from antidote_fast.norms import fusion
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.norms.collector import NormCollector

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_backend, _reason = backends.load("triton")
pytestmark = [
    pytest.mark.skipif(
        _reason is not None or DEVICE not in triton_backend.DEVICE_TYPES,
        reason=f"triton backend: {_reason or 'needs a GPU or TRITON_INTERPRET=1'}",
    ),
    # numpy's, of the interpreter: NaN and infinity are meant.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.thin(strength=2 if DEVICE == "cuda" else 1),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fused():
    from antidote_fast.backends.triton_kernels import fused

    return fused


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_output(found, expected):
    """Within what ``fusion.fuse`` promises."""
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30)
        return
    places = []
    for value in (found, expected):
        bits = value.view(torch.int16).int()
        places.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    distance = (places[0] - places[1]).abs()
    assert int(distance.max()) <= 2
    assert float((distance > 0).float().mean()) < 0.02


def check_sums(sums, y, mask):
    rows = y.reshape(-1, y.shape[-1]) if mask is None else y[mask]
    expected = rows.double().square().sum(dim=0)
    torch.testing.assert_close(sums.double(), expected, rtol=5e-7, atol=0)


def masks(*shape):
    return None, torch.arange(shape[0] * shape[1], device=DEVICE).reshape(shape) % 3 != 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "width"), [((1, 1), 8), ((2, 19), 40), ((2, 5), 896), ((1, 2), 16384)]
)
def test_rms_norm(shape, width, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(width, eps=1e-5).to(DEVICE, DTYPES[dtype])
    norm.weight.data.copy_(normal(width, seed=1) + 1)
    x = (normal(*shape, width) * 3).to(DEVICE, DTYPES[dtype])
    weight = norm.weight.detach()
    fits = (width, dtype) != (16384, "fp32")
    assert fused().fits_rms_norm(x, weight) == fits
    if not fits:
        return
    for mask in masks(*shape):
        y, sums = fused().rms_norm(x, weight, norm.variance_epsilon, mask)
        assert y.dtype == x.dtype
        check_output(y, norm(x).detach())
        check_sums(sums, y, mask)
        again = fused().rms_norm(x, weight, norm.variance_epsilon, mask)
        assert torch.equal(y, again[0])
        assert torch.equal(sums, again[1])


def test_rows_too_wide_for_compensated_sums(monkeypatch):
    x, ones = normal(2, 37, 2048).to(DEVICE, torch.float16), torch.ones(2048).to(DEVICE).half()
    mask = masks(2, 37)[1]
    expected, _ = fused().rms_norm(x, ones, 1e-6, mask)
    monkeypatch.setattr(fused(), "COMPENSATED_WIDTH", 1024)
    monkeypatch.setattr(fused(), "PLAIN_TOKENS", 5)
    y, sums = fused().rms_norm(x, ones, 1e-6, mask)
    assert torch.equal(y, expected)
    check_sums(sums, y, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "width"), [((1, 1), 8), ((2, 19), 48), ((2, 13), 264)])
def test_swiglu(shape, width, dtype):
    gate, up = (normal(*shape, width, seed=i).to(DEVICE, DTYPES[dtype]) * 4 for i in (0, 1))
    gate[0, 0, :3] = torch.tensor([-1e4, 1e4, 0.0])
    for mask in masks(*shape):
        y, sums = fused().swiglu(gate, up, mask)
        check_output(y, functional.silu(gate) * up)
        check_sums(sums, y, mask)
        again = fused().swiglu(gate, up, mask)
        assert torch.equal(y, again[0])
        assert torch.equal(sums, again[1])


def test_excluded_tokens_get_their_output_and_do_no_harm():
    x, ones = normal(1, 4, 16).to(DEVICE), torch.ones(16, device=DEVICE)
    x[0, 1], x[0, 2, 3] = torch.nan, torch.inf
    mask = torch.tensor([[True, False, False, True]], device=DEVICE)
    for y, sums in (fused().rms_norm(x, ones, 1e-5, mask), fused().swiglu(x, x, mask)):
        check_sums(sums, y, mask)
        assert bool(y[0, 1].isnan().all())
        assert bool(y[0, 2].isnan().any() or y[0, 2].isinf().any())
    sums = fused().rms_norm(x, ones, 1e-5, None)[1]
    assert not sums.isfinite().any()


def test_rounding_to_bf16_is_to_nearest_even():
    # silu(30) is 30 in bf16: the products below lie between two bf16 numbers.
    gate = torch.full((1, 8), 30.0, dtype=torch.bfloat16, device=DEVICE)
    up = torch.tensor([[1.0078125 * s for s in (1, 3, 5, 7)] + [1.015625, -1.0078125, 0.0, 3e38]])
    up = up.to(DEVICE, torch.bfloat16)
    y, _ = fused().swiglu(gate, up, None)
    assert torch.equal(y, gate * up)


def test_what_the_kernels_do_not_take():
    x, weight = torch.ones(2, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    assert fused().fits_rms_norm(x, weight)
    for other in (x.half(), x[:, :12], x[:0], x.T, torch.ones(33, device=DEVICE)[1:].view(2, 16)):
        assert not fused().fits_rms_norm(other, weight[: other.shape[-1]])
        assert not fused().fits_swiglu(x, other)


def run(model, batches, fuse, **options):
    """(norms, outputs) of a collection whose model's last hidden states are kept."""
    outputs = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = inner.model.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    try:
        norms = ActivationNorms.collect(model, batches, fuse=fuse, **options)
    finally:
        handle.remove()
    return norms, outputs


def check_like_unfused(model, batches, rtol, **options):
    before = [set(m.__dict__) for m in model.modules()]
    plain, expected = run(model, batches, False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        norms, outputs = run(model, batches, True, **options)
    assert [set(m.__dict__) for m in model.modules()] == before
    assert norms.keys == plain.keys
    assert (norms.num_tokens, norms.num_sequences) == (plain.num_tokens, plain.num_sequences)
    for key in plain.keys:
        torch.testing.assert_close(norms.sq_sum[key], plain.sq_sum[key], rtol=rtol, atol=1e-6)
    for found, value in zip(outputs, expected, strict=True):
        scale = float(value.float().abs().max())
        torch.testing.assert_close(found.float(), value.float(), rtol=rtol, atol=rtol * scale)


@pytest.fixture
def kernels(monkeypatch):
    """What was launched: names of the fused kernels, and reductions apart from them."""
    made = []
    for name in ("rms_norm", "swiglu"):
        real = getattr(fused(), name)

        def call(*args, name=name, real=real):
            made.append(name)
            return real(*args)

        monkeypatch.setattr(fused(), name, call)
    for backend in ("cpu", "triton"):
        module = backends.load(backend)[0]
        real = module.accumulate_sq_norm_
        monkeypatch.setattr(
            module, "accumulate_sq_norm_", lambda *a, r=real: made.append("reduce") or r(*a)
        )
    return made


# Of a model of two layers: names of the targets, and what is launched a layer.
TARGETS = {
    "qkv": (None, ["rms_norm"]),
    "all": ("all-linear", ["rms_norm", "reduce", "rms_norm", "swiglu"]),
    "down": (["down_proj"], ["swiglu"]),
    "up": (["up_proj"], ["rms_norm"]),
}


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_models(kind, dtype, kernels):
    model = tiny.build(kind, dtype=DTYPES[dtype]).to(DEVICE)
    check_like_unfused(model, tiny.batches(count=2), {"bf16": 2e-2, "fp32": 1e-5}[dtype])
    assert kernels.count("rms_norm") == 2 * 2
    assert kernels.count("swiglu") == 0


@pytest.mark.parametrize("case", TARGETS)
def test_only_what_feeds_a_target_is_fused_and_not_reduced_again(case, kernels):
    targets, launched = TARGETS[case]
    model = tiny.build().to(DEVICE)
    batches = tiny.batches(count=1)
    ActivationNorms.collect(model, batches, targets=targets, fuse=True)
    assert kernels == launched * 2
    check_like_unfused(model, batches, 1e-5, targets=targets)


@pytest.mark.parametrize("response_only", [False, True])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_padding_and_prompts_do_not_count(response_only, backend):
    model = tiny.build(dtype=torch.bfloat16).to(DEVICE)
    options = {"targets": "all-linear", "response_only": response_only, "backend": backend}
    check_like_unfused(model, tiny.batches(count=2), 2e-2, **options)


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}, {"use_dora": True}])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, None)],
)
def test_adapters(options, base, adapter, kernels):
    model = tiny.add_lora(tiny.build(dtype=base), dtype=adapter, **options).to(DEVICE)
    check_like_unfused(model, tiny.batches(count=1), 1e-5 if base == torch.float32 else 2e-2)
    assert kernels.count("rms_norm") == (4 if "target_modules" in options else 2)
    assert kernels.count("swiglu") == (2 if "target_modules" in options else 0)


def test_an_adapter_that_narrows_its_input_is_reduced_as_it_reads(kernels):
    model = tiny.add_lora(tiny.build(), dtype=torch.bfloat16).to(DEVICE)
    batches = tiny.batches(count=1)
    check_like_unfused(model, batches, 1e-2)
    kernels.clear()
    ActivationNorms.collect(model, batches, fuse=True)
    assert kernels == ["rms_norm", "reduce", "reduce", "reduce", "reduce"] * 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(error):
    model = tiny.build().to(DEVICE).train()
    before = [dict(m.__dict__) for m in model.modules()]

    def fail(module, args):
        raise error("stop")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        ActivationNorms.collect(model, tiny.batches(), targets="all-linear", fuse=True)
    handle.remove()
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert [set(m.__dict__) for m in model.modules()] == [set(d) for d in before]
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_inside_an_own_loop():
    model = tiny.build().to(DEVICE)
    batch = {k: v.to(DEVICE) for k, v in tiny.batches(count=1)[0].items()}
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    expected = model(**inputs).logits.detach()
    with (
        NormCollector(find_targets(model, ["down_proj"])) as collector,
        undoing() as undo,
    ):
        assert fusion.fuse(model, collector, undo) == 2
        collector.start(batch)
        trained = model(**inputs).logits  # with gradients: the model's own forwards
        assert torch.equal(trained, expected)
        trained.sum().backward()
        collector.finish()
        norms = ActivationNorms.of(collector)
        with torch.inference_mode():
            collector.start(batch)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
            collector.finish()
    for key, value in ActivationNorms.of(collector).sq_sum.items():
        torch.testing.assert_close(value, 2 * norms.sq_sum[key], rtol=1e-5, atol=0)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_deposit_is_for_that_very_tensor():
    layer = nn.Linear(8, 4)
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.int64)}
    targets = find_targets(nn.ModuleDict({"q_proj": layer}))
    x, sums = torch.ones(1, 2, 8), torch.full((8,), 100.0)
    for change, expected in ((lambda: x, 100), (lambda: x.clone(), 2), (lambda: x.mul_(3), 18)):
        with NormCollector(targets) as collector, torch.no_grad():
            assert collector.tokens_counted(x) == (False, None)
            collector.start(batch)
            assert collector.tokens_counted(x) == (True, None)
            assert collector.tokens_counted(x[:, :1]) == (False, None)
            collector.deposit(x, sums)
            layer(change())
            collector.finish()
        assert ActivationNorms.of(collector).sq_sum["q_proj.weight"].tolist() == [expected] * 8


class OtherRMSNorm(nn.Module):
    """Has the attributes and another formula: Gemma's."""

    def __init__(self, like):
        super().__init__()
        self.weight, self.variance_epsilon = like.weight, like.variance_epsilon

    def forward(self, x):
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (scaled * (1 + self.weight.float())).type_as(x)


def _other_norms(model):
    for layer in model.model.layers:
        layer.input_layernorm = OtherRMSNorm(layer.input_layernorm)


def _own_forwards(model):
    for layer in model.model.layers:
        norm = layer.input_layernorm
        norm.forward = lambda x, norm=norm: type(norm).forward(norm, x)


@pytest.mark.parametrize(
    ("kind", "change", "targets"),
    [
        ("gemma", None, "all-linear"),
        ("gpt2", None, None),
        ("opt", None, None),
        ("llama", None, ["o_proj"]),
        ("llama", _other_norms, None),
        ("llama", _own_forwards, None),
    ],
    ids=["gemma", "gpt2", "opt", "o_proj", "formula", "patched"],
)
def test_what_cannot_be_fused_runs_unfused(kind, change, targets, kernels):
    model = tiny.build(kind).to(DEVICE)
    if change is not None:
        change(model)
    own = [m.__dict__.get("forward") for m in model.modules()]
    plain = ActivationNorms.collect(model, tiny.batches(count=1), targets=targets)
    with pytest.warns(UserWarning, match="fuse=True: no RMSNorm or SwiGLU"):
        norms = ActivationNorms.collect(model, tiny.batches(count=1), targets=targets, fuse=True)
    assert all(torch.equal(norms.sq_sum[k], plain.sq_sum[k]) for k in plain.keys)
    assert not {"rms_norm", "swiglu"} & set(kernels)
    assert [m.__dict__.get("forward") for m in model.modules()] == own


def test_a_gelu_mlp_is_left_alone(kernels):
    model = tiny.build().to(DEVICE)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    ActivationNorms.collect(model, tiny.batches(count=1), targets="all-linear", fuse=True)
    assert kernels == ["rms_norm", "reduce", "rms_norm", "reduce"] * 2
    found = fusion.find_fusable(torch.compile(model), find_targets(model))
    assert found == []


def test_out_of_memory_halves_the_batch():
    model = tiny.build().to(DEVICE)
    batches = tiny.batches(count=1, size=4)
    whole = ActivationNorms.collect(model, batches, targets="all-linear", fuse=True)

    def fail(module, args, kwargs, output):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no memory")

    handle = model.register_forward_hook(fail, with_kwargs=True)
    halved = ActivationNorms.collect(model, batches, targets="all-linear", fuse=True)
    handle.remove()
    assert halved.num_tokens == whole.num_tokens
    for key in whole.keys:
        torch.testing.assert_close(halved.sq_sum[key], whole.sq_sum[key], rtol=1e-5, atol=1e-7)


def test_refusals(monkeypatch):
    model = tiny.build().to(DEVICE)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="fuse=True: aggregation='mean': must be 'rms'"):
        ActivationNorms.collect(model, tiny.batches(), fuse=True, aggregation="mean")
    monkeypatch.setattr(triton_backend, "DEVICE_TYPES", ("xpu",))
    with pytest.raises(BackendUnavailable, match=f"fuse=True: .*takes xpu tensors, not {DEVICE}"):
        ActivationNorms.collect(model, tiny.batches(), fuse=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
