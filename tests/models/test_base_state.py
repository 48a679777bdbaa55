"""What a base is made of comes back, and no bit of its weights changes unseen."""

import pytest
import tiny
import torch

from antidote_fast.models import base_state
from antidote_fast.models.base_state import Marks, ModuleTree


class Odd(torch.nn.Module):
    """Tensors of many dtypes, sizes that no word divides, views, ties and buffers."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        whole = torch.randn(40, 31, generator=draw)
        self.first = torch.nn.Parameter(whole)
        self.tied = self.first
        self.part = torch.nn.Parameter(whole.clone()[3:, 1:9], requires_grad=False)
        self.narrow = torch.nn.Parameter(whole.bfloat16()[:7, :3].contiguous())
        self.eight = torch.nn.Parameter(whole[:5].to(torch.float8_e4m3fn), requires_grad=False)
        self.packed = torch.nn.Parameter(torch.arange(13, dtype=torch.uint8), requires_grad=False)
        self.single = torch.nn.Parameter(torch.tensor(1.5))
        self.none = torch.nn.Parameter(torch.empty(0, 4))
        self.register_buffer("kept", torch.ones(3, dtype=torch.bool))
        self.register_buffer("made", torch.ones(3), persistent=False)
        self.register_buffer("absent", None)


def raw(tensor):
    return tensor.detach().untyped_storage()


def test_every_single_bit_is_seen(monkeypatch):
    monkeypatch.setattr(base_state, "_WORDS", {"cpu": 16})  # so that there are many pieces
    odd = Odd()
    marks = Marks(odd)
    assert marks.changed() is None
    for name in ("first", "narrow", "eight", "packed", "single", "kept"):
        data = torch.tensor([], dtype=torch.uint8).set_(raw(getattr(odd, name)))
        for place in {0, 1, len(data) // 2, len(data) - 1} & set(range(len(data))):
            for bit in (0, 7):
                data[place] ^= 1 << bit
                assert marks.changed() == name, (name, place, bit)
                data[place] ^= 1 << bit
    odd.part.data[-1, -1] *= -1  # a view whose memory is not its own
    assert marks.changed() == "part"
    odd.part.data[-1, -1] *= -1
    odd.made += 1  # what a model makes anew by itself is no weight
    assert marks.changed() is None


def test_changes_that_cancel_are_seen():
    """Signs of two numbers: in a plain sum with odd keys the highest bits cancel each other."""
    model = torch.nn.Linear(64, 64, bias=False)
    marks = Marks(model)
    for columns in ([1, 3], [0, 2], [1, 3, 5, 7], [0, 1, 2, 3]):
        model.weight.data[5, columns] *= -1
        assert marks.changed() == "weight"
        model.weight.data[5, columns] *= -1
    rows = model.weight.data[:2].clone()
    model.weight.data[:2] = rows.flip(0)
    assert marks.changed() == "weight"
    model.weight.data[:2] = rows
    assert marks.changed() is None
    model.weight = torch.nn.Parameter(model.weight.data.clone())  # another tensor, the same values
    assert marks.changed() == "weight"


def test_another_model_of_the_same_weights():
    marks = Marks(tiny.build())
    marks.release()
    assert marks.move_to(tiny.build()) is None
    marks.release()
    assert marks.move_to(tiny.build(seed=1)) == "model.embed_tokens.weight"
    twin = tiny.build(seed=1)
    twin.model.norm.weight.data += 1
    marks.release()
    assert marks.move_to(twin) == "model.norm.weight"


@pytest.mark.parametrize("training", [False, True])
def test_a_tree_comes_back(training):
    model = tiny.build().train(training)
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.requires_grad_(False)
    attention.register_forward_hook(lambda *_: None)
    before = {name: (id(module), set(vars(module))) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    weights = {name: id(p) for name, p in model.named_parameters()}
    pretraining, hooks = model.config.pretraining_tp, list(attention._forward_hooks)
    tree = ModuleTree(model)
    tiny.add_lora(model, modules_to_save=["lm_head"])
    model.config.pretraining_tp = 7
    model.extra = 1
    attention.forward = None
    attention._forward_hooks.clear()
    model.model.norm.weight = torch.nn.Parameter(torch.ones(32))
    model.model.norm.register_buffer("more", torch.ones(1))
    tree.restore()
    after = {name: (id(module), set(vars(module))) for name, module in model.named_modules()}
    assert after == before
    assert {name: id(p) for name, p in model.named_parameters()} == weights
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(module.training == training for module in model.modules())
    assert model.config.pretraining_tp == pretraining
    assert list(attention._forward_hooks) == hooks
    assert "forward" not in vars(attention)
    assert not list(model.model.norm.buffers())
