"""What matters on data to preserve is kept: values, counts and refusals, from model to folder."""

import dataclasses
import json

import plain_prune
import pytest
import tiny
import torch
from broken_backends import DAMAGES, WRONG, not_written, one_too_many, swap

from antidote_fast.backends import reference
from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.models.targets import find_targets
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.global_cut import GlobalCut, find_cut
from antidote_fast.pruning.prune import prune_model_, prune_state_
from antidote_fast.pruning.report import PruneReport
from antidote_fast.selection import Selection, num_pruned

SCOPES = ["row", "tensor", "global"]


def made(dtype=torch.float32, seed=0, few_values=False):
    """(weights, norms, norms to preserve by)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"m.layers.{i}.q_proj.weight": (5 + i, 17) for i in (0, 2, 10)}
    draw = torch.randn
    if few_values:  # equal scores everywhere
        draw = lambda shape, generator: torch.randint(-2, 3, shape, generator=generator) / 2  # noqa: E731
    state = {key: draw(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    norms = [
        ActivationNorms(
            {key: torch.rand(shape[1], generator=generator) + 0.1 for key, shape in shapes.items()},
            num_sequences=3,
            num_tokens=11 + number,
        )
        for number in range(2)
    ]
    return state, *norms


def by_key(norms, scope, keys):
    return norms and {key: norms.act_norm(key, scope) for key in keys}


@pytest.mark.parametrize("few_values", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_removed_is_a_set_difference(scope, largest, score, few_values):
    for dtype, ratio in ((torch.float32, None), (torch.bfloat16, 0.6), (torch.float16, 0.0)):
        state, norms, preserve = made(dtype, few_values=few_values)
        before = {key: value.clone() for key, value in state.items()}
        selection = Selection(0.3, scope=scope, largest=largest, preserve_ratio=ratio)
        given = norms if score == "wanda" else None
        lists = by_key(given, scope, state), selection, by_key(preserve, scope, state)
        expected = plain_prune.masks(before, *lists)
        alone = plain_prune.masks(before, lists[0], selection)
        report = prune_state_(
            state,
            Evidence(given, score=score, preserve_norms=preserve),
            selection,
            return_masks=True,
        )
        for layer in report.layers:
            mask = expected[layer.key]
            assert torch.equal(report.masks[layer.key].to_bool(), mask)
            wanted = plain_prune.removed(before[layer.key], mask)
            assert torch.equal(plain_prune.bits(state[layer.key]), plain_prune.bits(wanted))
            assert layer.removed == int(mask.sum())
            assert layer.achieved == layer.removed / mask.numel()
            selected = int(alone[layer.key].sum())
            assert layer.preserved == (None if scope == "global" else selected - layer.removed)
            assert layer.zero_preserve_channels == 0
        selected = sum(int(mask.sum()) for mask in alone.values())
        assert report.num_preserved == selected - report.num_pruned
        if largest or ratio == 0.0:
            assert (report.num_preserved > 0) == (ratio != 0.0)
        assert report.preserve_ratio == (0.3 if ratio is None else ratio)


def test_norms_of_the_same_data_keep_everything():
    for scope in SCOPES:
        state, norms, _ = made()
        before = {key: value.clone() for key, value in state.items()}
        report = prune_state_(
            state, Evidence(norms, preserve_norms=norms), Selection(0.3, scope=scope)
        )
        assert (report.num_pruned, report.achieved) == (0, 0.0)
        assert report.num_preserved > 0
        assert all(torch.equal(state[key], before[key]) for key in state)


def test_norms_that_are_all_zero_keep_the_last_of_equal_scores():
    state = {"q_proj.weight": torch.arange(1.0, 21).view(2, 10)}
    norms = [
        ActivationNorms({"q_proj.weight": value}, num_sequences=1, num_tokens=1)
        for value in (torch.arange(10.0, 0, -1), torch.zeros(10))
    ]
    report = prune_state_(state, Evidence(norms[0], preserve_norms=norms[1]), Selection(0.2))
    assert report.layers[0].zero_preserve_channels == 10
    assert (state["q_proj.weight"] == 0).sum() == report.num_pruned > 0
    assert not (state["q_proj.weight"][:, 8:] == 0).any()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_live_models(kind, scope):
    live = tiny.add_lora(tiny.build()) if kind == "lora" else tiny.build(kind)
    norms, preserve = (ActivationNorms.collect(live, tiny.batches(seed=s)) for s in (0, 1))
    found = find_targets(live)
    turn = lambda target: target.weight.detach().t() if target.transposed else target.weight  # noqa: E731
    before = {target.key: turn(target).detach().clone() for target in found}
    selection = Selection(0.3, scope=scope, preserve_ratio=0.2)
    lists = (by_key(one, scope, before) for one in (norms, preserve))
    expected = plain_prune.masks(before, next(lists), selection, next(lists))
    report = prune_model_(live, norms, selection, preserve_norms=preserve)
    assert {target.key for target in found} == set(expected)
    for target in found:
        wanted = plain_prune.removed(before[target.key], expected[target.key])
        assert torch.equal(turn(target), wanted), target.key
    assert report.num_preserved > 0


def test_norms_of_more_weights_are_narrowed_to_the_targets():
    live = tiny.build()
    options = {"targets": ["up_proj"], "ignore": ["re:.*layers.0"]}
    norms, preserve = (
        ActivationNorms.collect(live, tiny.batches(seed=s), targets=["all-linear"]) for s in (0, 1)
    )
    report = prune_model_(live, norms, Selection(0.3), preserve_norms=preserve, **options)
    assert [layer.key for layer in report.layers] == ["model.layers.1.mlp.up_proj.weight"]
    state = dict(live.named_parameters())
    report = prune_state_(
        {key: state[key].detach() for key in norms.keys},
        Evidence(norms, preserve_norms=preserve),
        Selection(0.1),
        **options,
    )
    assert len(report.layers) == 1
    fewer = preserve.subset([key for key in preserve.keys if "up_proj" not in key])
    with pytest.raises(DataError, match=r"^preserve_norms: hold no weight 'model.layers.1.mlp.up"):
        prune_model_(tiny.build(), norms, Selection(0.3), preserve_norms=fewer, **options)


def other_base(norms):
    return ActivationNorms(norms.sq_sum, num_sequences=1, num_tokens=1, fingerprint="other")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"preserve_norms": None},
            UsageError,
            "^preserve_norms=None: must be .*preserve_ratio=0.5",
        ),
        ({"score": "random"}, UsageError, "^preserve_norms: must be left out where score='random'"),
        ({"selection": Selection(n_m=(2, 4))}, UsageError, r"^preserve_norms: .* n_m=\(2, 4\)"),
        ("fewer", DataError, "^preserve_norms: lack 1 of 3 weights to prune, 'm.layers.0.q_proj"),
        ("more", DataError, "^preserve_norms: hold 1 weights that are not here, 'x' first"),
        ("short", DataError, "^m.layers.0.*: has 17 input channels, its preserve norms 3"),
    ],
)
def test_refusals_leave_the_weights(change, error, says):
    state, norms, preserve = made()
    first = next(iter(state))
    if change == "fewer":
        change = {"preserve_norms": preserve.subset([k for k in preserve.keys if k != first])}
    elif change in ("more", "short"):
        sums = preserve.sq_sum | {"x" if change == "more" else first: torch.ones(3)}
        change = {"preserve_norms": ActivationNorms(sums, num_sequences=1, num_tokens=1)}
    options = {"preserve_norms": preserve} | change
    selection = options.pop("selection", Selection(0.3, preserve_ratio=0.5))
    with pytest.raises(error, match=says):
        prune_state_(state, Evidence(norms, **options), selection)
    assert all(torch.equal(state[key], value) for key, value in made()[0].items())


def test_norms_of_another_base_are_refused():
    live = tiny.build()
    norms = ActivationNorms.collect(live, tiny.batches())
    with pytest.raises(DataError, match=r"^preserve_norms: were collected on another base model"):
        prune_model_(live, norms, Selection(0.3), preserve_norms=other_base(norms))


# --- one weight at a time -------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("few_values", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("largest", [True, False])
def test_a_global_cut_as_all_at_once(largest, few_values, score):
    for ratio, kept in ((0.1, None), (0.5, 0.3), (0.9, 0.05), (0.3, 0.0), (0.0, 0.4), (0.2, 1.0)):
        state, norms, preserve = made(torch.bfloat16, few_values=few_values)
        norms = norms if score == "wanda" else None
        evidence = Evidence(norms, score, preserve)
        selection = Selection(ratio, scope="global", largest=largest, preserve_ratio=kept)
        read = []
        cut = find_cut(
            list(state),
            lambda key, state=state, read=read: read.append(key) or state[key],
            evidence,
            selection,
        )
        assert len(read) <= 2 * len(state)
        assert sum(cut.counts.values()) == num_pruned(
            sum(w.numel() for w in state.values()), selection
        )
        cut = GlobalCut.from_dict(json.loads(json.dumps(cut.to_dict())), evidence)
        masks = {key: cut.mask(key, weight) for key, weight in state.items()}
        report = prune_state_(
            state,
            evidence,
            selection,
            return_masks=True,
        )
        assert all(report.masks[key] == mask for key, mask in masks.items())
        assert report.layers[0].threshold in (cut.threshold, None)


# --- broken kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_broken_kernel_is_refused_before_anything_is_written(broken, damage, scope):
    broken(damage)
    state, norms, preserve = made()
    selection = Selection(0.4, scope=scope, preserve_ratio=0.3)
    with pytest.raises(AntidoteError, match=f"^m.layers.*: {WRONG}; nothing was written"):
        prune_state_(state, Evidence(norms, preserve_norms=preserve), selection)
    assert all(torch.equal(state[key], value) for key, value in made()[0].items())


@pytest.mark.parametrize("damage", [swap, one_too_many, not_written])
@pytest.mark.parametrize("scope", SCOPES)
def test_one_that_is_broken_for_whole_weights_only(broken, damage, scope):
    broken(damage, smallest=4 * 17)
    state, norms, preserve = made()
    selection = Selection(0.4, scope=scope, preserve_ratio=0.1)
    end = "the weights in memory are not" if damage is not_written else "nothing was written"
    with pytest.raises(AntidoteError, match=f"^m.*: {WRONG}; {end}"):
        prune_state_(state, Evidence(norms, preserve_norms=preserve), selection)


@pytest.mark.parametrize(
    ("scope", "rows"), [("row", 0), ("tensor", 0), ("global", 0), ("row", 4)], ids=str
)
def test_a_kernel_that_forgets_what_is_to_be_kept(broken, scope, rows):
    """Always, or (in row scope, where it can be told) of whole weights only."""

    def forgets(operands, selection, **options):
        if any(len(o.weight) > rows for o in operands):
            operands = [dataclasses.replace(o, preserve_norm=None) for o in operands]
        reference.prune(operands, selection, **options)

    broken(lambda *arguments: None).prune = forgets
    state, norms, preserve = made()
    with pytest.raises(AntidoteError, match=WRONG):
        prune_state_(state, Evidence(norms, preserve_norms=preserve), Selection(0.4, scope=scope))


def test_a_report_of_earlier_has_the_new_entries_by_default():
    state, norms, preserve = made()
    report = prune_state_(state, Evidence(norms, preserve_norms=preserve), Selection(0.4))
    values = json.loads(json.dumps(report.to_dict()))
    again = PruneReport.from_dict(values)
    assert again.to_dict() == report.to_dict()
    assert values["num_preserved"] == sum(layer["preserved"] for layer in values["layers"]) > 0
    for name in ("preserve_ratio", "score_delta", "reverted", "num_preserved"):
        del values[name]
    for layer in values["layers"]:
        del layer["preserved"], layer["zero_preserve_channels"]
    old = PruneReport.from_dict(values)
    assert (old.preserve_ratio, old.score_delta, old.reverted) == (None, False, False)
    assert (old.num_preserved, old.num_pruned) == (0, report.num_pruned)


def test_random_scores_take_no_preserve_ratio_either():
    with pytest.raises(UsageError, match=r"^preserve_norms=None: must be given"):
        prune_state_(made()[0], Evidence(score="random"), Selection(0.1, preserve_ratio=0.1))
