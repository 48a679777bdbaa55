"""Attention and MLP blocks of many architectures, found by a walk and seen by hooks."""

import pytest
import tiny
import torch
from torch import nn

from antidote_fast.errors import DataError
from antidote_fast.models.blocks import (
    attention_modules,
    by_token,
    mlp_modules,
    outputs_kept,
    outputs_seen,
)

KINDS = [*tiny.KINDS, "mixtral", "qwen3_moe"]
PLACES = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}  # else model.layers
ATTENTION = {"gpt2": "attn"}  # else self_attn
MLP = {"opt": "fc2"}  # else mlp
IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 2, 2]])


def build(kind, adapter):
    model = tiny.build(kind, layers=3)
    targets = {"gpt2": ["c_attn", "c_fc", "c_proj"], "opt": ["q_proj", "fc1", "fc2"]}
    options = {"target_modules": targets[kind]} if kind in targets else {}
    return tiny.add_lora(model, **options) if adapter else model


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_names(kind, adapter):
    model = build(kind, adapter)
    place = ("base_model.model." if adapter else "") + PLACES.get(kind, "model.layers")
    found = {
        ATTENTION.get(kind, "self_attn"): attention_modules(model),
        MLP.get(kind, "mlp"): mlp_modules(model),
    }
    for child, pairs in found.items():
        assert [name for name, _ in pairs] == [f"{place}.{i}.{child}" for i in range(3)]
        assert all(model.get_submodule(name) is module for name, module in pairs)


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_found_is_all_that_a_block_adds(kind, adapter):
    """With attention and MLP silent each block hands on what it was given; with one of them not."""
    model = build(kind, adapter)
    place = ("base_model.model." if adapter else "") + PLACES.get(kind, "model.layers")
    blocks = list(model.get_submodule(place))

    def change(*silent):
        """Of the hidden states, in each block."""
        given, handed_on = [], []
        handles = [
            handle
            for block in blocks
            for handle in (
                block.register_forward_pre_hook(lambda _, args: given.append(args[0])),
                block.register_forward_hook(lambda _, args, out: handed_on.append(first(out))),
            )
        ]
        silence = outputs_seen([pair for each in silent for pair in each], zeros)
        with silence:
            model(input_ids=IDS, use_cache=False)
        for handle in handles:
            handle.remove()
        return [float((a - b).abs().max()) for a, b in zip(given, handed_on, strict=True)]

    attention, mlp = attention_modules(model), mlp_modules(model)
    assert change(attention, mlp) == [0, 0, 0]
    assert min(change(attention)) > 0.01 < min(change(mlp))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def zeros(number, output):
    return torch.zeros_like(output)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(x), "weights", x


class OuterAttention(nn.Module):
    """As BERT's: an attention inside an attention, and the softmax in a class without weights."""

    def __init__(self):
        super().__init__()
        self.inner = Attention()
        self.core_attention = type("CoreAttention", (nn.Module,), {})()


class MoeNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Block(nn.Module):
    def __init__(self, **children):
        super().__init__()
        self.attn = Attention()
        for name, child in children.items():
            setattr(self, name, child)


def test_the_innermost_with_weights_is_taken():
    model = nn.ModuleDict({"a": OuterAttention(), "b": Attention()})
    assert [name for name, _ in attention_modules(model)] == ["a.inner", "b"]


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        ({"feed_forward": nn.Linear(4, 4), "out": nn.Linear(4, 4)}, "feed_forward"),
        ({"ffn": nn.Sequential(nn.Linear(4, 4)), "moe_norm": MoeNorm()}, "ffn"),
        ({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4), "norm": nn.LayerNorm(4)}, "fc2"),
        ({"mlp": nn.Linear(4, 4), "norm": MoeNorm()}, "mlp"),
    ],
)
def test_mlps_by_class_then_by_name_then_the_last_linear_layer(children, expected):
    model = nn.ModuleDict({"block": Block(**children)})
    assert [name for name, _ in mlp_modules(model)] == [f"block.{expected}"]


class Wrapped(nn.Module):
    """GPT-Neo's attention lies in a module that only picks one."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()


def test_beside_an_attention_that_is_wrapped_once_more():
    blocks = [Block(mlp=nn.Linear(4, 4), norm=MoeNorm()) for _ in range(2)]
    for block in blocks:
        block.attn = Wrapped()
    model = nn.ModuleDict({"moe_layers": nn.ModuleList(blocks), "mlp": nn.Linear(4, 4)})
    assert [name for name, _ in mlp_modules(model)] == ["moe_layers.0.mlp", "moe_layers.1.mlp"]
    del blocks[1].mlp
    with pytest.raises(DataError, match=r"beside moe_layers\.1\.attn\.attention in ModuleDict"):
        mlp_modules(model)


def test_models_without_are_refused_by_name():
    with pytest.raises(DataError, match=r"^no attention modules found in Linear$"):
        attention_modules(nn.Linear(2, 2))
    model = nn.ModuleDict({"block": Block(norm=MoeNorm())})
    with pytest.raises(DataError, match=r"^no MLP found beside block\.attn in ModuleDict$"):
        mlp_modules(model)


def test_outputs_are_seen_in_order_replaced_or_left():
    pairs = [("a", Attention()), ("b", nn.Linear(4, 4))]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    plain = [pairs[0][1].proj(x), pairs[1][1](x)]
    seen = []
    with outputs_seen(pairs, lambda number, output: seen.append((number, output))):
        assert torch.equal(pairs[0][1](x)[0], plain[0])
        assert torch.equal(pairs[1][1](x), plain[1])
    assert [number for number, _ in seen] == [0, 1]
    assert all(torch.equal(output, plain[number]) for number, output in seen)
    with outputs_seen(pairs, lambda number, output: output * 2 + number):
        changed, *rest = pairs[0][1](x)
        assert torch.equal(changed, plain[0] * 2)
        assert rest == ["weights", x]
        assert torch.equal(pairs[1][1](x), plain[1] * 2 + 1)
    assert not any(module._forward_hooks for _, module in pairs)


def test_hooks_are_taken_off_after_an_error():
    pairs = [("a", nn.Linear(4, 4))]
    with pytest.raises(KeyError), outputs_seen(pairs, lambda number, output: {}[number]):
        pairs[0][1](torch.ones(4))
    assert not pairs[0][1]._forward_hooks


def test_outputs_are_kept_with_their_graph():
    layer = nn.Linear(4, 4)
    with outputs_kept([("a", layer)]) as outputs:
        layer(torch.ones(2, 4))
    (gradient,) = torch.autograd.grad(outputs[0].sum(), [layer.bias])
    assert gradient.tolist() == [2, 2, 2, 2]


def test_by_token_undoes_a_flattened_batch():
    whole = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.ones(2, 3)
    for output in (whole, whole.reshape(6, 4), whole.reshape(1, 6, 4)):
        assert torch.equal(by_token(output, mask), whole)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3), (12, 4), (2, 4)], ids=str)
def test_by_token_refuses_another_number_of_tokens(shape):
    with pytest.raises(DataError, match=r"^a block puts out \(.*\) for \(2, 3\) tokens: not a "):
        by_token(torch.ones(shape), torch.ones(2, 3))
