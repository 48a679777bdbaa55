"""Norms against a float64 oracle with hooks of its own, and what is refused."""

import copy

import peft
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional

from antidote_fast import backends
from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.models.targets import Target, find_targets
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.norms.collector import NormCollector


def counted(batch, response_only):
    mask = batch["attention_mask"].bool()
    return mask & (batch["labels"] != -100) if response_only else mask


def oracle(model, batches, *, response_only=False):
    """{key: (sq_sum, norm_sum)} in float64, from every target module's own input."""
    targets = find_targets(model, "all-linear")
    sums = {t.key: [0.0, 0.0] for t in targets}
    mask = None

    def hook_for(target):
        def hook(module, args):
            x = args[0].detach().double()
            if target.first_factor is not None:
                x = functional.linear(args[0], target.first_factor.weight).detach().double()
            x = x.reshape(*mask.shape, -1)
            squares = torch.where(mask[..., None], x.square(), 0.0).sum(dim=1)
            sums[target.key][0] += squares.sum(dim=0)
            sums[target.key][1] += squares.sqrt().sum(dim=0)

        return hook

    owners = [t.input_module if t.first_factor is not None else t.module for t in targets]
    dora = any(t.first_factor is not None for t in targets)
    if dora:  # its factors are also called on an identity matrix
        owners = [t.input_module for t in targets]
    handles = [
        o.register_forward_pre_hook(hook_for(t)) for o, t in zip(owners, targets, strict=True)
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            mask = counted(batch, response_only)
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return sums


def check(norms, expected, rtol=1e-6):
    for key, value in norms.sq_sum.items():
        torch.testing.assert_close(value.double(), expected[key][0], rtol=rtol, atol=0)
    for key, value in (norms.norm_sum or {}).items():
        torch.testing.assert_close(value.double(), expected[key][1], rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("response_only", [False, True])
@pytest.mark.parametrize("aggregation", ["rms", "mean"])
def test_full_model(kind, response_only, aggregation):
    model = tiny.build(kind)
    batches = tiny.batches()
    norms = ActivationNorms.collect(
        model,
        batches,
        targets="all-linear",
        response_only=response_only,
        aggregation=aggregation,
    )
    check(norms, oracle(model, batches, response_only=response_only))
    masks = [counted(b, response_only) for b in batches]
    assert norms.num_tokens == sum(int(m.sum()) for m in masks)
    assert norms.num_sequences == sum(int(m.any(dim=1).sum()) for m in masks)
    assert norms.aggregation == aggregation
    assert norms.response_only == response_only
    assert norms.keys == [t.key for t in find_targets(model, "all-linear")]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("aggregation", ["rms", "mean"])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),  # PEFT narrows x then
    ],
)
def test_adapter(kind, aggregation, base, adapter):
    model = tiny.add_lora(tiny.build(kind, dtype=base), dtype=adapter)
    batches = tiny.batches()
    norms = ActivationNorms.collect(model, batches, aggregation=aggregation)
    check(norms, oracle(model, batches))


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}]
)
def test_adapter_variants(options):
    model = tiny.add_lora(tiny.build(), **options)
    batches = tiny.batches()
    for aggregation in ("rms", "mean"):
        norms = ActivationNorms.collect(model, batches, aggregation=aggregation)
        check(norms, oracle(model, batches))


def test_dora_with_as_many_tokens_as_channels():
    # The identity that DoRA sends through its factors has 32 rows; so has this batch.
    model = tiny.add_lora(tiny.build(), use_dora=True)
    batches = tiny.batches(size=4, length=8, pads=False)
    check(ActivationNorms.collect(model, batches), oracle(model, batches))


def test_only_the_active_adapter():
    model = tiny.add_lora(tiny.build())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    batches = tiny.batches()
    norms = ActivationNorms.collect(model, batches)
    assert [len(v) for v in norms.sq_sum.values()] == [32, 2, 32, 2]
    check(norms, oracle(model, batches))


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (lambda: tiny.build(), 4),  # q/k/v, o, gate/up, down
        (lambda: tiny.build("gpt2"), 4),
        (lambda: tiny.add_lora(tiny.build(), target_modules=["q_proj", "k_proj", "v_proj"]), 4),
        (lambda: tiny.add_lora(tiny.build(dtype=torch.bfloat16), dtype=torch.float32), 4),
        (lambda: tiny.add_lora(tiny.build(), target_modules="all-linear"), 4 + 7),
    ],
)
def test_a_shared_input_is_reduced_once(make, calls, monkeypatch):
    made = []
    module = backends.select(None, "cpu")
    real = module.accumulate_sq_norm_
    monkeypatch.setattr(module, "accumulate_sq_norm_", lambda *a: made.append(1) or real(*a))
    ActivationNorms.collect(make(), tiny.batches(count=1), targets="all-linear")
    assert len(made) == 2 * calls


def test_thousands_of_batches_stay_exact():
    layer = nn.Linear(16, 2)
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(4000, 1, 3, 16, generator=generator) * 10
    ids = torch.ones(1, 3, dtype=torch.int64)
    with NormCollector([target_of(layer)], aggregation="mean") as collector, torch.no_grad():
        for x in xs:
            assert collector.start({"input_ids": ids})
            layer(x)
            collector.finish()
    norms = ActivationNorms.of(collector)
    squares = xs.double().square().sum(dim=(1, 2))
    check(norms, {"w": (squares.sum(dim=0), squares.sqrt().sum(dim=0))}, rtol=1.2e-7)
    assert (norms.num_sequences, norms.num_tokens) == (4000, 12000)


def target_of(layer, key="w", routed=False):
    return Target(key, layer, layer.weight, False, layer, routed)


def test_modes_caches_hooks_and_gradients_are_as_before():
    model = tiny.add_lora(tiny.build())
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    seen = []

    def watch(module, args, kwargs):
        seen.append((module.training, torch.is_grad_enabled(), kwargs.get("use_cache")))

    inner = model.base_model.model
    handle = inner.register_forward_pre_hook(watch, with_kwargs=True)
    first = ActivationNorms.collect(model, tiny.batches())
    assert seen == [(False, False, False)] * 3
    handle.remove()
    assert not inner.get_output_embeddings()._forward_pre_hooks
    assert modes == [m.training for m in model.modules()]
    assert hooks == sum(len(m._forward_pre_hooks) for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    # Dropout (0.5 here) was off: the same norms again.
    again = ActivationNorms.collect(model, tiny.batches())
    assert all(torch.equal(first.sq_sum[k], again.sq_sum[k]) for k in first.keys)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_hook(error, monkeypatch):
    model = tiny.build().train()

    def fail(*args, **kwargs):
        raise error("stop")

    monkeypatch.setattr(backends.select(None, "cpu"), "accumulate_sq_norm_", fail)
    with pytest.raises(error, match="stop"):
        ActivationNorms.collect(model, tiny.batches())
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_without_attention_mask_every_token_counts():
    model = tiny.build()
    batches = tiny.batches(pads=False)
    bare = [{"input_ids": b["input_ids"]} for b in batches]
    norms = ActivationNorms.collect(model, bare)
    assert norms.num_tokens == sum(b["input_ids"].numel() for b in batches)
    check(norms, oracle(model, batches))


def test_pad_side_and_pad_tokens_do_not_matter():
    model = tiny.build()
    ids = torch.randint(4, 99, (1, 6), generator=torch.Generator().manual_seed(0))
    bare = ActivationNorms.collect(model, [{"input_ids": ids}])
    for pad in (2, 7):  # 2 is also the end-of-text token
        row = torch.full((1, 3), pad)
        padded = {
            "input_ids": torch.cat([ids, row], dim=1),
            "attention_mask": torch.tensor([[1] * 6 + [0] * 3]),
        }
        norms = ActivationNorms.collect(model, [padded])
        assert norms.num_tokens == 6
        for key in bare.keys:
            torch.testing.assert_close(norms.sq_sum[key], bare.sq_sum[key], rtol=1e-5, atol=1e-7)


def test_pads_and_prompt_of_nan_do_no_harm():
    layer = nn.Linear(4, 2)
    x = torch.tensor([[[1.0, 2, 3, 4], [torch.nan] * 4, [torch.inf] * 4]])
    batch = {
        "input_ids": torch.zeros(1, 3, dtype=torch.int64),
        "attention_mask": torch.tensor([[1, 0, 1]]),
        "labels": torch.tensor([[5, 5, -100]]),
    }
    with NormCollector([target_of(layer)], response_only=True) as collector:
        collector.start(batch)
        layer(x)
        collector.finish()
    assert ActivationNorms.of(collector).sq_sum["w"].tolist() == [1.0, 4.0, 9.0, 16.0]


def test_flattened_tokens_take_the_flattened_mask():
    layer = nn.Linear(4, 2)
    x = torch.randn(2, 3, 4)
    batch = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
    }
    results = []
    for aggregation in ("rms", "mean"):
        for shape in ((2, 3, 4), (6, 4)):
            with NormCollector([target_of(layer)], aggregation=aggregation) as collector:
                collector.start(batch)
                layer(x.reshape(shape))
                collector.finish()
            results.append(ActivationNorms.of(collector))
    assert torch.equal(results[0].sq_sum["w"], results[1].sq_sum["w"])
    assert torch.equal(results[2].norm_sum["w"], results[3].norm_sum["w"])
    with NormCollector([target_of(layer, "some.layer.weight")]) as collector:
        collector.start(batch)
        with pytest.raises(DataError, match=r"some\.layer\.weight: got \(5,\) tokens.*\(2, 3\)"):
            layer(x.reshape(6, 4)[:5])


def test_a_strided_or_transposed_input():
    layer = nn.Linear(4, 2)
    x = torch.randn(4, 3, 2).permute(2, 1, 0)
    with NormCollector([target_of(layer)]) as collector:
        collector.start({"input_ids": torch.zeros(2, 3, dtype=torch.int64)})
        layer(x)
        collector.finish()
    torch.testing.assert_close(
        ActivationNorms.of(collector).sq_sum["w"], x.square().sum(dim=(0, 1))
    )


def test_an_input_changed_in_place_is_not_taken_for_shared():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.ones(1, 2, 4)
    targets = [target_of(first, "a"), target_of(second, "b")]
    with NormCollector(targets) as collector, torch.no_grad():
        collector.start({"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
        first(x)
        second(x.mul_(2))
        collector.finish()
    norms = ActivationNorms.of(collector)
    assert norms.sq_sum["a"].tolist() == [2.0] * 4
    assert norms.sq_sum["b"].tolist() == [8.0] * 4


def test_inference_mode_and_keyword_input():
    layer = nn.Linear(4, 4)
    with torch.inference_mode(), NormCollector([target_of(layer)]) as collector:
        collector.start({"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
        layer(input=torch.ones(1, 2, 4))
        collector.finish()
    assert ActivationNorms.of(collector).sq_sum["w"].tolist() == [2.0] * 4


class Routed(nn.Module):
    """A mixture of linear experts, tokens picked by their id."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids).reshape(-1, 4)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            index = (input_ids.reshape(-1) % 4 == number).nonzero()[:, 0]
            if len(index):
                out[index] = expert(x[index])
        return out


def test_routed_experts():
    model = Routed()
    ids = torch.tensor([[0, 1, 4, 5]])  # none for the third expert
    norms = ActivationNorms.collect(model, [{"input_ids": ids}], targets="all-linear")
    embedded = model.embed.weight.detach().double()
    for number, rows in enumerate(([0, 4], [1, 5], [])):
        expected = embedded[rows].square().sum(dim=0).float()
        torch.testing.assert_close(norms.sq_sum[f"experts.{number}.weight"], expected)
    assert len(norms.routed) == 3
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    with pytest.raises(DataError, match=r"experts\.0\.weight: a routed expert .*batch_size 1"):
        ActivationNorms.collect(model, [padded], targets="all-linear")
    with pytest.raises(DataError, match="routed expert"):
        ActivationNorms.collect(
            model, [{"input_ids": ids}], targets="all-linear", aggregation="mean"
        )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_bad_activations_name_the_layer(bad):
    model = tiny.build()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = bad
    with pytest.raises(DataError, match=r"layers\.1\.self_attn\.k_proj\.weight: .*NaN.*batch 1"):
        ActivationNorms.collect(model, tiny.batches())


def test_no_data():
    model = tiny.build()
    with pytest.raises(DataError, match="0 batches with 0 sequences"):
        ActivationNorms.collect(model, [])
    batches = tiny.batches(pads=False)
    for batch in batches:
        batch["attention_mask"].zero_()
    with pytest.raises(DataError, match="3 batches with 6 sequences hold 0 tokens"):
        ActivationNorms.collect(model, batches)
    batches = tiny.batches(pads=False)
    for batch in batches:
        batch["labels"].fill_(-100)
    with pytest.raises(DataError, match="neither padding nor prompt"):
        ActivationNorms.collect(model, batches, response_only=True)


def test_a_batch_of_pads_among_others_is_passed_over():
    model = tiny.build()
    batches = tiny.batches()
    pads = {k: v.clone() for k, v in batches[0].items()}
    pads["attention_mask"].zero_()
    norms = ActivationNorms.collect(model, [pads, *batches])
    plain = ActivationNorms.collect(model, batches)
    assert norms.num_sequences == plain.num_sequences
    assert all(torch.equal(norms.sq_sum[k], plain.sq_sum[k]) for k in plain.keys)


@pytest.mark.parametrize(
    ("change", "options", "error", "match"),
    [
        ({}, {"aggregation": "max"}, UsageError, "aggregation='max'"),
        ({"labels": None}, {"response_only": True}, UsageError, "must have labels"),
        ({"labels": torch.zeros(2, 3)}, {"response_only": True}, DataError, r"labels .*\(2, 3\)"),
        ({"attention_mask": torch.ones(2, 1, 7, 7)}, {}, DataError, "attention_mask has shape"),
        ({"input_ids": None}, {}, DataError, "must be a dict with input_ids"),
        ({}, {"backend": "nonesuch"}, ValueError, "nonesuch"),
    ],
)
def test_bad_arguments(change, options, error, match):
    batch = {k: v for k, v in (tiny.batches()[0] | change).items() if v is not None}
    model = tiny.build()
    with pytest.raises(error, match=match):
        ActivationNorms.collect(model, [batch], **options)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_own_loop_must_say_when_a_batch_starts():
    layer = nn.Linear(4, 4)
    with NormCollector([target_of(layer)]) as collector:
        with pytest.raises(UsageError, match=r"start\(batch\)"):
            layer(torch.ones(1, 4))
        with pytest.raises(UsageError, match="start"):
            collector.finish()
    layer(torch.ones(1, 4))  # the hook is gone


class Crowded(nn.Module):
    """Runs out of memory on more than one sequence at a time."""

    def __init__(self, model, limit):
        super().__init__()
        self.model, self.limit = model, limit
        self.config = model.config

    def forward(self, input_ids, attention_mask):
        result = self.model(input_ids=input_ids, attention_mask=attention_mask)
        if len(input_ids) > self.limit:  # late: sums of this batch have been added already
            raise torch.OutOfMemoryError("no memory")
        return result


def test_out_of_memory_halves_the_batch():
    model = tiny.build()
    batches = tiny.batches(size=5)
    whole = ActivationNorms.collect(model, batches)
    halved = ActivationNorms.collect(Crowded(model, 1), batches)
    assert (halved.num_tokens, halved.num_sequences) == (whole.num_tokens, whole.num_sequences)
    for key in whole.keys:
        torch.testing.assert_close(
            halved.sq_sum[f"model.{key}"], whole.sq_sum[key], rtol=1e-5, atol=1e-7
        )
    with pytest.raises(AntidoteError, match="out of memory at one sequence"):
        ActivationNorms.collect(Crowded(model, 0), batches)


def test_inputs_that_cannot_be_summed():
    layer = nn.Linear(4, 4).double()
    with NormCollector([target_of(layer)]) as collector:
        collector.start({"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
        with pytest.raises(DataError, match=r"w: got torch\.float64"):
            layer(torch.ones(1, 2, 4, dtype=torch.float64))
        with pytest.raises(DataError, match="w: got 3 channels, the weight takes 4"):
            layer(torch.ones(1, 2, 3))


def test_progress_bar(capsys):
    ActivationNorms.collect(tiny.build(), tiny.batches(), progress=True)
    assert capsys.readouterr().out == ""  # nothing where there is no terminal


def test_merge_is_one_run_over_both():
    model = tiny.build()
    batches = tiny.batches(count=4)
    for aggregation in ("rms", "mean"):
        parts = [
            ActivationNorms.collect(model, part, aggregation=aggregation)
            for part in (batches[:1], batches[1:])
        ]
        whole = ActivationNorms.collect(model, batches, aggregation=aggregation)
        merged = parts[0].merge(parts[1])
        assert merged.num_tokens == whole.num_tokens
        assert merged.num_sequences == whole.num_sequences
        for key in whole.keys:
            torch.testing.assert_close(merged.sq_sum[key], whole.sq_sum[key], rtol=1e-6, atol=0)
            for scope in ("row", "global"):
                torch.testing.assert_close(merged.act_norm(key, scope), whole.act_norm(key, scope))


def test_collect_does_not_change_the_model():
    model = tiny.add_lora(tiny.build())
    before = copy.deepcopy(model.state_dict())
    ActivationNorms.collect(model, tiny.batches())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
