"""Which weights are found in which model, and what is refused by name."""

import peft
import pytest
import tiny
import torch
from torch import nn

from antidote_fast.errors import DataError, NothingPruned, UsageError
from antidote_fast.models.targets import coverage, find_targets, natural_key, select_keys

SEPARATE = [f"self_attn.{name}_proj" for name in ("k", "q", "v")]
MLP = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
ATTENTION = [f"self_attn.{name}_proj" for name in ("k", "o", "q", "v")]
OPT_ATTENTION = ["self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj"]


def keys_of(prefix, leaves, layers=2):
    return [f"{prefix}.{i}.{leaf}.weight" for i in range(layers) for leaf in leaves]


@pytest.mark.parametrize(
    ("kind", "prefix", "default", "everything"),
    [
        *((k, "model.layers", SEPARATE, [*MLP, *ATTENTION]) for k in tiny.KINDS[:6]),
        (
            "gpt2",
            "transformer.h",
            ["attn.c_attn"],
            ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        ),
        ("opt", "model.decoder.layers", SEPARATE, ["fc1", "fc2", *OPT_ATTENTION]),
        ("mixtral", "model.layers", SEPARATE, ATTENTION),
        ("qwen3_moe", "model.layers", SEPARATE, ATTENTION),
    ],
)
def test_full_models(kind, prefix, default, everything):
    model = tiny.build(kind)
    found = find_targets(model)
    assert [t.key for t in found] == keys_of(prefix, default)
    for target in found:
        assert model.get_parameter(target.key) is target.weight
        assert target.transposed == (kind == "gpt2")
        assert target.in_features == 32
        assert target.input_module is target.module
    every = find_targets(model, "all-linear")
    assert [t.key for t in every] == keys_of(prefix, everything)
    seen = coverage(model, every)
    fused = kind in ("mixtral", "qwen3_moe")
    assert (seen.targeted < seen.total) == fused
    assert bool(seen.not_linear) == fused
    if fused:
        assert seen.not_linear[0] == "model.layers.0.mlp.experts.gate_up_proj"


def test_order_is_natural():
    found = find_targets(tiny.build(layers=11), ["q_proj"])
    assert [t.key.split(".")[2] for t in found] == [str(i) for i in range(11)]
    assert sorted(["a10", "a2", "b1", "a2.b"], key=natural_key) == ["a2", "a2.b", "a10", "b1"]


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "opt"])
def test_output_layer_never(kind):
    model = tiny.build(kind)
    output = model.get_output_embeddings().weight
    for targets in (
        "all-linear",
        ["re:.*"],
        ["Linear", "q_proj"] if kind != "gpt2" else ["Conv1D"],
    ):
        assert all(t.weight is not output for t in find_targets(model, targets))
    with pytest.raises((UsageError, NothingPruned)):
        find_targets(model, ["lm_head"])


@pytest.mark.parametrize(
    ("targets", "ignore", "leaves"),
    [
        (["q_proj"], (), ["self_attn.q_proj"]),
        ("q_proj", (), ["self_attn.q_proj"]),
        (["mlp.up_proj", "o_proj"], (), ["mlp.up_proj", "self_attn.o_proj"]),
        (["re:.*mlp.*"], (), MLP),
        (
            ["re:model.layers.*self_attn"],
            ["re:.*[kv]_proj"],
            ["self_attn.o_proj", "self_attn.q_proj"],
        ),
        (["Linear"], ["re:.*mlp", "o_proj"], SEPARATE),
        (None, ["v_proj"], SEPARATE[:2]),
        ("all-linear", [*MLP, "nonesuch"], ATTENTION),
    ],
)
def test_patterns(targets, ignore, leaves):
    keys = [t.key for t in find_targets(tiny.build(), targets, ignore)]
    assert keys == keys_of("model.layers", leaves)
    if targets != ["Linear"]:
        assert select_keys(list(tiny.build().state_dict()), targets, ignore) == keys


def test_patterns_match_from_the_start_of_the_name():
    with pytest.raises(NothingPruned):
        find_targets(tiny.build(), ["re:layers.0"])
    with pytest.raises(NothingPruned):
        find_targets(tiny.build(), ["proj"])  # not a whole part of a name


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        (["nonesuch"], NothingPruned, "nonesuch"),
        (["q_proj", "nonesuch"], UsageError, "'nonesuch' matches no module"),
        (["embed_tokens"], UsageError, r"embed_tokens \(Embedding\)"),
        (["self_attn"], UsageError, "LlamaAttention"),
        (["re:("], UsageError, "not a pattern"),
        ([], UsageError, "targets=\\[\\]"),
        ([3], UsageError, "3 must be a name"),
        ([""], UsageError, "must be a name"),
    ],
)
def test_bad_patterns(targets, error, match):
    with pytest.raises(error, match=match):
        find_targets(tiny.build(), targets)


def test_everything_ignored():
    with pytest.raises(NothingPruned, match="ignore"):
        find_targets(tiny.build(), None, ["re:.*"])


def test_model_without_qkv():
    with pytest.raises(NothingPruned, match="query, key or value"):
        find_targets(nn.Sequential(nn.Linear(2, 2)))


def test_fused_experts_are_refused_by_name():
    with pytest.raises(UsageError, match=r"experts.*MixtralExperts"):
        find_targets(tiny.build("mixtral"), ["re:.*experts$"])


@pytest.mark.parametrize(
    ("leaf", "is_qkv"),
    [
        *((n, True) for n in ("qkv_proj", "query_key_value", "query", "Wqkv", "kv_b_proj", "wq")),
        *((n, False) for n in ("o_proj", "dense", "c_proj", "gate", "key_norm", "out_proj")),
    ],
)
def test_fused_and_renamed_projections(leaf, is_qkv):
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({leaf: nn.Linear(4, 4)})])})
    if is_qkv:
        assert [t.key for t in find_targets(model)] == [f"h.0.{leaf}.weight"]
    else:
        with pytest.raises(NothingPruned):
            find_targets(model)


def test_routed_experts_are_marked():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)]), "gate": nn.Linear(4, 4)})
    found = find_targets(model, "all-linear")
    assert {t.key: t.routed for t in found} == {"experts.0.weight": True, "gate.weight": False}
    inner = nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])})
    assert find_targets(inner, "all-linear")[0].routed


def test_shared_weight():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})
    model["k_proj"].weight = model["q_proj"].weight
    with pytest.raises(DataError, match=r"q_proj.*k_proj.*share one weight|k_proj.*q_proj.*share"):
        find_targets(model)
    assert len(find_targets(model, None, ["k_proj"])) == 1


def test_compiled_model():
    model = tiny.build()
    assert [t.key for t in find_targets(torch.compile(model))] == [
        t.key for t in find_targets(model)
    ]


PREFIX = "base_model.model.model.layers"
FACTORS = [f"{leaf}.{f}" for leaf in SEPARATE for f in ("lora_A", "lora_B")]


def test_adapter_default_is_every_factor():
    model = tiny.add_lora(tiny.build())
    found = find_targets(model)
    assert [t.key for t in found] == keys_of(PREFIX, FACTORS)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    by_key = {t.key: t for t in found}
    first = by_key[f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"]
    second = by_key[f"{PREFIX}.0.self_attn.q_proj.lora_B.weight"]
    assert (first.input_module, first.in_features) == (layer, 32)
    assert (second.input_module, second.in_features) == (layer.lora_B["default"], 4)
    assert [t.key for t in find_targets(model, "all-linear")] == [t.key for t in found]
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(by_key) == set(saved)
    assert coverage(model, found).targeted == coverage(model, found).total


@pytest.mark.parametrize(
    ("targets", "ignore", "factors"),
    [
        (["q_proj"], (), FACTORS[2:4]),
        (["lora_A"], (), FACTORS[::2]),
        (["re:model.layers.*q_proj$"], (), FACTORS[2:4]),
        (["re:base_model.*lora_B"], (), FACTORS[1::2]),
        (["q_proj.lora_B"], (), FACTORS[3:4]),
        (None, ["re:.*[kv]_proj"], FACTORS[2:4]),
    ],
)
def test_adapter_patterns(targets, ignore, factors):
    model = tiny.add_lora(tiny.build())
    keys = [t.key for t in find_targets(model, targets, ignore)]
    assert keys == keys_of(PREFIX, factors)
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert select_keys(list(saved), targets, ignore) == keys


def test_adapter_variants_that_are_understood():
    for options in (
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"target_modules": "all-linear"},
    ):
        model = tiny.add_lora(tiny.build(), **options)
        found = find_targets(model)
        saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert {t.key for t in found} == {k for k in saved if "magnitude" not in k}
        assert all(
            (t.first_factor is not None) == ("use_dora" in options and "_B." in t.key)
            for t in found
        )


def test_modules_to_save_and_embeddings_are_left_alone():
    model = tiny.add_lora(
        tiny.build(), modules_to_save=["o_proj"], target_modules=["q_proj", "embed_tokens"]
    )
    keys = [t.key for t in find_targets(model)]
    assert keys == keys_of(PREFIX, FACTORS[2:4])


def test_adapter_name_is_not_in_the_key():
    model = tiny.add_lora(tiny.build())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    assert all(t.weight.shape[0] != 2 for t in find_targets(model))
    model.set_adapter("other")
    found = find_targets(model)
    assert [t.key for t in found] == keys_of(PREFIX, FACTORS[4:])
    assert found[0].weight.shape == (2, 32)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(DataError, match="2 are active"):
        find_targets(model)


def test_adapter_put_on_by_transformers_itself(monkeypatch):
    # transformers 5.24 asks for a PEFT that is not released yet, and works with the one that is.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = tiny.build()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert [t.key for t in find_targets(model)] == keys_of(PREFIX, FACTORS[2:4])


def test_merged_or_disabled_adapter():
    model = tiny.add_lora(tiny.build())
    with model.disable_adapter(), pytest.raises(DataError, match="disabled"):
        find_targets(model)
    model.merge_adapter()
    with pytest.raises(DataError, match="merged"):
        find_targets(model)


def test_other_adapters_are_refused_by_name():
    for config, name in (
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "LOHA"),
        (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1]), "alora"),
    ):
        model = peft.get_peft_model(tiny.build(), config)
        with pytest.raises(DataError, match=name):
            find_targets(model)


def test_lora_on_what_is_not_linear():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 1)

    model = peft.get_peft_model(Convolution(), peft.LoraConfig(target_modules=["conv"]))
    with pytest.raises(DataError, match="conv: LoRA on Conv1d"):
        find_targets(model)


def test_lora_on_fused_experts():
    model = tiny.add_lora(
        tiny.build("qwen3_moe"),
        lora_dropout=0.0,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.down_proj"],
    )
    with pytest.raises(DataError, match="target_parameters"):
        find_targets(model)
    model.peft_config["default"].target_parameters = None  # as PEFT's own conversion leaves it
    with pytest.raises(DataError, match=r"experts: LoRA on Qwen3MoeExperts\.down_proj"):
        find_targets(model)
    assert len(find_targets(model, None, ["re:.*experts"])) == 4


def test_quantised_base():
    model = tiny.build()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(DataError, match="quantised"):
        find_targets(model)
    assert len(find_targets(tiny.add_lora(model))) == 12


def test_packed_and_wide_dtypes():
    model = tiny.build()
    layer = model.model.layers[1].self_attn.k_proj
    layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(DataError, match=r"quantised \(torch.int8\)"):
        find_targets(model)
    layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.float64))
    with pytest.raises(DataError, match=r"layers\.1\.self_attn\.k_proj\.weight: is torch.float64"):
        find_targets(model)


def test_keys_alone():
    keys = ["a.10.q_proj.weight", "a.9.q_proj.weight", "a.9.norm.weight", "lm_head.weight"]
    assert select_keys(keys) == ["a.9.q_proj.weight", "a.10.q_proj.weight"]
    assert select_keys(keys, "all-linear") == ["a.9.q_proj.weight", "a.10.q_proj.weight"]
    with pytest.raises(NothingPruned):
        select_keys(keys, ["lm_head"])
    with pytest.raises(UsageError, match="'x' matches no weight"):
        select_keys(keys, ["q_proj", "x"])
