"""Weights that are computed from other tensors: pruned where a zero stays a zero, else refused."""

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import antidote_fast
from antidote_fast import ActivationNorms, Selection, oneshot, prune_model_, prune_state_
from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.models.targets import find_targets
from antidote_fast.pruning.global_cut import find_cut

KEY = "model.layers.0.self_attn.q_proj.weight"


class Doubled(nn.Module):
    def forward(self, original):
        return 2 * original


def plain_tensor(module):
    weight = module.weight.detach().clone()
    del module.weight
    module.weight = weight


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "of_ones_own": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "plain_tensor": plain_tensor,
}
old = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())


@old
@pytest.mark.parametrize("how", COMPUTED)
def test_refused_by_name_before_anything_is_written(how):
    model = tiny.build().train()  # spectral_norm would take a step of its own in train mode
    COMPUTED[how](model.model.layers[1].self_attn.k_proj)
    before = state_of(model)
    name = r"^model.layers.1.self_attn.k_proj: its weight is "
    for score in ("magnitude", "random"):
        with pytest.raises(DataError, match=name):
            prune_model_(model, None, Selection(0.3), score=score)
    with pytest.raises(DataError, match=name):
        ActivationNorms.collect(model, tiny.batches())
    with pytest.raises(DataError, match=name):
        oneshot(model, score="magnitude", ratio=0.3)
    assert unchanged(model, before)
    # Left out, it does the others no harm.
    report = prune_model_(model, None, Selection(0.3), score="magnitude", ignore=["re:.*1.*k_proj"])
    assert len(report.layers) == 5


@old
@pytest.mark.parametrize("how", ["weight_norm", "old_weight_norm", "spectral_norm"])
def test_factors_of_an_adapter_and_their_base(how):
    model = tiny.add_lora(tiny.build())
    base = model.base_model.model.model.layers[0].self_attn.q_proj
    COMPUTED[how](base.base_layer)  # no target: its factors are
    expected = prune_model_(
        tiny.add_lora(tiny.build()), None, Selection(0.3), score="magnitude", return_masks=True
    )
    found = prune_model_(model, None, Selection(0.3), score="magnitude", return_masks=True)
    assert found.masks == expected.masks
    COMPUTED[how](base.lora_B["default"])
    with pytest.raises(DataError, match=r"q_proj\.lora_B: its weight is computed by"):
        prune_model_(model, None, Selection(0.3), score="magnitude")


def masked_model(kind="llama"):
    """A model with two weights under torch.nn.utils.prune, and the same made permanent."""
    model = tiny.build(kind)
    owners = [t.module for t in find_targets(model)[:2]]
    prune.random_unstructured(owners[0], "weight", amount=0.4)
    prune.l1_unstructured(owners[0], "weight", amount=0.2)  # a container of two
    prune.random_unstructured(owners[1], "weight", amount=0.3)
    plain = copy.deepcopy(tiny.build(kind))
    for mine, its in zip(owners, find_targets(plain)[:2], strict=True):
        with torch.no_grad():
            its.module.weight.copy_(mine.weight)
    return model, plain, owners


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_pruned_at_the_original_where_a_mask_is_multiplied(kind, scope):
    model, plain, owners = masked_model(kind)
    batches, selection = tiny.batches(), Selection(0.5, scope=scope)
    norms = ActivationNorms.collect(model, batches, fingerprint="")
    others = ActivationNorms.collect(plain, batches, fingerprint="")
    assert norms.keys == others.keys
    assert all(torch.equal(norms.sq_sum[key], others.sq_sum[key]) for key in norms.keys)
    hidden = [(o, o.weight_orig.detach().clone(), o.weight_mask == 0) for o in owners]
    mine = prune_model_(model, norms, selection, return_masks=True)
    its = prune_model_(plain, others, selection, return_masks=True)
    assert mine.masks == its.masks
    assert [x.zero_weights for x in mine.layers] == [x.zero_weights for x in its.layers]
    for target in find_targets(plain):
        module = model.get_submodule(target.key.removesuffix(".weight"))
        assert torch.equal(module.weight, target.weight)  # at once, before any forward
    with torch.no_grad():
        ids = batches[0]["input_ids"]
        assert torch.equal(model(ids).logits, plain(ids).logits)
    for owner, original, masked in hidden:  # what the mask hides is still there
        prune.remove(owner, "weight")
        assert original[masked].any()
    assert all(torch.equal(model.get_parameter(t.key), t.weight) for t in find_targets(plain))


def test_what_a_mask_hides_is_kept():
    model, _, owners = masked_model()
    hidden = [(o, o.weight_orig.detach().clone(), o.weight_mask == 0) for o in owners]
    report = prune_model_(model, None, Selection(0.1), score="magnitude", return_masks=True)
    for target, (owner, original, masked) in zip(find_targets(model)[:2], hidden, strict=True):
        removed = report.masks[target.key].to_bool()
        assert torch.equal(owner.weight_orig[~removed], original[~removed])
        assert not (removed & masked).any()  # a hidden weight counts as zero
        assert not owner.weight_orig[removed].any()


def test_no_base_weights_under_a_mask_and_no_folder(tmp_path):
    model, plain, _ = masked_model()
    base = {t.key: t.weight.detach() for t in find_targets(tiny.build(seed=1))}
    before = state_of(model)
    with pytest.raises(DataError, match=r"weight: is masked by torch.nn.utils.prune.*base_weights"):
        prune_model_(model, None, Selection(0.3), score="magnitude", base_weights=base)
    with pytest.raises(UsageError, match=r"^output_dir=.*weight_orig"):
        oneshot(model, score="magnitude", ratio=0.3, output_dir=tmp_path / "out")
    assert unchanged(model, before)
    assert not list(tmp_path.iterdir())
    assert oneshot(model, score="magnitude", ratio=0.3).num_pruned > 0
    assert oneshot(plain, score="magnitude", ratio=0.3, output_dir=tmp_path / "out").num_pruned > 0


@pytest.mark.parametrize(
    "end",
    [
        *("parametrizations.weight.original", "parametrizations.weight.original0"),
        *("weight_orig", "weight_mask", "weight_g", "weight_v"),
    ],
)
def test_names_of_originals_are_refused_where_there_is_no_model(end):
    name = f"model.layers.0.self_attn.q_proj.{end}"
    state = {KEY: torch.ones(4, 8), name: torch.ones(4, 8)}
    norms = ActivationNorms({key: torch.ones(8) for key in state}, num_sequences=1, num_tokens=1)
    with pytest.raises(DataError, match=rf"^{name}: is what a weight is computed from"):
        prune_state_(state, norms, Selection(0.5))
    with pytest.raises(DataError, match=rf"^{name}: is what a weight is computed from"):
        find_cut(list(state), state.get, norms, Selection(0.5, scope="global"))
    assert all(tensor.all() for tensor in state.values())


def test_a_weight_that_another_one_is_computed_from():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    parametrizations.weight_norm(model["other"])
    model["other"].parametrizations.weight.original1 = model["q_proj"].weight
    with pytest.raises(DataError, match=r"^q_proj.weight: another weight is computed from it"):
        find_targets(model)


def test_tied_to_an_embedding_that_is_computed():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "embed": nn.Embedding(4, 4)})
    parametrizations.spectral_norm(model["embed"])
    model["q_proj"].weight = model["embed"].parametrizations.weight.original
    with pytest.raises(antidote_fast.errors.NothingPruned):
        find_targets(model)


class Strange(nn.Linear):
    """Computes with another tensor than its parameter."""

    def __getattr__(self, name):
        found = super().__getattr__(name)
        return found.detach() * 2 if name == "weight" else found


def test_a_module_whose_weight_is_none_of_its_tensors():
    model = nn.ModuleDict({"q_proj": Strange(4, 4)})
    with torch.no_grad():  # Linear has initialised a copy
        model["q_proj"]._parameters["weight"].copy_(torch.arange(1.0, 17).view(4, 4))
    with pytest.raises(
        AntidoteError, match=r"^q_proj.weight: its module \(Strange\) computes with"
    ):
        prune_model_(model, None, Selection(0.5), score="magnitude")


class Odd(torch.Tensor):
    """Stands for the tensors of other libraries, which may be packed inside."""


def test_tensors_that_are_no_plain_matrices(monkeypatch):
    def model(weight):
        made = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})
        made["q_proj"].weight = nn.Parameter(weight)
        return made

    for weight, says in (
        (torch.ones(4, 4).as_subclass(Odd), "is a Odd; must be a plain parameter"),
        (torch.ones(0), r"has shape \(0,\)"),
        (torch.ones(1, 4).expand(4, 4), r"stride\(\)=\(0, 1\)"),
        (torch.ones(4, 1).expand(4, 4), r"stride\(\)=\(1, 0\)"),
    ):
        made = model(weight)
        before = state_of(made)
        with pytest.raises(DataError, match=rf"^q_proj.weight.*{says}"):
            prune_model_(made, None, Selection(0.5), score="magnitude")
        assert unchanged(made, before)
    shared = torch.ones(6, 4)
    made = model(shared[:4])
    made["k_proj"].weight = nn.Parameter(shared[2:])
    with pytest.raises(DataError, match=r"^k_proj.weight and q_proj.weight overlap in memory"):
        prune_model_(made, None, Selection(0.5), score="magnitude")
    assert shared.all()
