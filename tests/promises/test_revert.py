"""Removed weights take the base's values, and may be scored by the difference from them."""

import functools
import json
from dataclasses import replace

import plain_prune
import pytest
import tiny
import torch
from broken_backends import WRONG, not_written, swap

from antidote_fast.errors import AntidoteError, DataError, UsageError
from antidote_fast.models.targets import find_targets
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.global_cut import GlobalCut, find_cut
from antidote_fast.pruning.prune import prune_model_, prune_state_
from antidote_fast.selection import Selection

SCOPES = ["row", "tensor", "global"]
SHAPES = {f"m.layers.{i}.q_proj.weight": (5 + i, 17) for i in (0, 2, 10)}


def made(dtype=torch.float32, seed=0, few_values=False):
    """(weights, norms, norms to preserve by, base weights that some of the weights equal)."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        if few_values:
            return {
                k: torch.randint(-2, 3, s, generator=generator).to(dtype) for k, s in SHAPES.items()
            }
        return {k: torch.randn(s, generator=generator).to(dtype) for k, s in SHAPES.items()}

    norms = [
        ActivationNorms(
            {k: torch.rand(s[1], generator=generator) + 0.1 for k, s in SHAPES.items()},
            num_sequences=3,
            num_tokens=11 + number,
        )
        for number in range(2)
    ]
    state, base = draw(), draw()
    for key, value in base.items():
        value[:2] = state[key][:2]
        value[0, 0] = -0.0
    return state, *norms, base


def by_key(norms, scope, keys):
    return norms and {key: norms.act_norm(key, scope) for key in keys}


@pytest.mark.parametrize("few_values", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("scope", SCOPES)
def test_values_bit_for_bit(scope, score, delta, preserving, few_values):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state, norms, preserve, base = made(dtype, few_values=few_values)
        before = {key: value.clone() for key, value in state.items()}
        given, kept = norms if score == "wanda" else None, preserve if preserving else None
        selection = Selection(0.3, scope=scope, score_delta=delta)
        lists = by_key(given, scope, state), selection, by_key(kept, scope, state)
        expected = plain_prune.masks(before, *lists, base)
        report = prune_state_(
            state,
            Evidence(
                given,
                score=score,
                preserve_norms=kept,
                base_weights=base | {"another": torch.ones(1)},
            ),
            selection,
            return_masks=True,
        )
        assert (report.score_delta, report.reverted) == (delta, True)
        for layer in report.layers:
            mask = expected[layer.key]
            assert torch.equal(report.masks[layer.key].to_bool(), mask)
            wanted = plain_prune.removed(before[layer.key], mask, base[layer.key])
            assert torch.equal(plain_prune.bits(state[layer.key]), plain_prune.bits(wanted))
            assert layer.removed == int(mask.sum())
        assert report.num_pruned == sum(int(mask.sum()) for mask in expected.values()) > 0


def test_random_scores_revert_too():
    state, *_, base = made()
    before = {key: value.clone() for key, value in state.items()}
    prune_state_(state, Evidence(score="random", base_weights=base), Selection(0.3), seed=4)
    scores = {key: plain_prune.random_scores(key, value.shape, 4) for key, value in state.items()}
    for key, mask in plain_prune.masks(scores, None, Selection(0.3)).items():
        assert torch.equal(
            plain_prune.bits(state[key]),
            plain_prune.bits(plain_prune.removed(before[key], mask, base[key])),
        )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_live_models(kind, scope):
    build = tiny.build if kind == "lora" else functools.partial(tiny.build, kind)
    live, aligned = build(), build(seed=1)
    if kind == "lora":
        live, aligned = tiny.add_lora(live), tiny.add_lora(aligned, seed=1)
    norms = ActivationNorms.collect(live, tiny.batches())
    base = {target.key: target.weight for target in find_targets(aligned)}
    turned = {t.key: t.transposed for t in find_targets(live)}
    upright = lambda key, w: w.detach().t() if turned[key] else w.detach()  # noqa: E731
    before = {t.key: upright(t.key, t.weight).clone() for t in find_targets(live)}
    selection = Selection(0.3, scope=scope, score_delta=True)
    upright_base = {key: upright(key, weight) for key, weight in base.items()}
    expected = plain_prune.masks(before, by_key(norms, scope, before), selection, base=upright_base)
    prune_model_(live, norms, selection, base_weights=base)
    for target in find_targets(live):
        wanted = plain_prune.removed(
            before[target.key], expected[target.key], upright_base[target.key]
        )
        assert torch.equal(upright(target.key, target.weight), wanted), target.key


def test_a_base_of_another_dtype_is_taken_where_it_fits():
    state, norms, _, base = made(torch.bfloat16)
    wide = {key: value.float() for key, value in base.items()}
    other = {key: value.clone() for key, value in state.items()}
    selection = Selection(0.3, score_delta=True)
    prune_state_(state, Evidence(norms, base_weights=base), selection)
    prune_state_(other, Evidence(norms, base_weights=wide), selection)
    assert all(
        torch.equal(plain_prune.bits(state[key]), plain_prune.bits(other[key])) for key in state
    )
    state, norms, _, base = made(torch.float32)
    prune_state_(
        state, Evidence(norms, base_weights={k: v.bfloat16() for k, v in base.items()}), selection
    )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"base_weights": None}, UsageError, "^base_weights=None: must be .*score_delta=True"),
        ({"score": "random"}, UsageError, "^score_delta=True: must be left out .*score='random'"),
        ("missing", DataError, "^base_weights: hold no weight 'm.layers.10.q_proj.weight'"),
        ("shape", DataError, r"^m.layers.10.*: is torch.float32 \(2, 3\) in base_weights; must be"),
        ("dtype", DataError, "^m.layers.10.*: is torch.int64 .* in base_weights; must be"),
        ("list", DataError, "^m.layers.10.*: is list in base_weights"),
        ("meta", DataError, "^m.layers.10.*: is not loaded in base_weights"),
        ("nan", DataError, "^m.layers.10.*: holds NaN or infinity in base_weights"),
        ("inf", DataError, "^m.layers.10.*: holds NaN or infinity in base_weights"),
        ("wide", DataError, "^m.layers.10.*: is torch.float64 .* in base_weights; must be"),
        ("narrow", DataError, "^m.layers.10.*: is torch.float32 in base_weights, and torch.bfloat"),
        ("same", ValueError, "overlap in memory"),
    ],
)
def test_refusals_leave_the_weights(change, error, says):
    dtype = torch.bfloat16 if change == "narrow" else torch.float32
    state, norms, _, base = made(dtype)
    last = "m.layers.10.q_proj.weight"
    values = {
        "shape": lambda w: torch.ones(2, 3),
        "dtype": lambda w: w.long(),
        "list": lambda w: w.tolist(),
        "meta": lambda w: w.to("meta"),
        "nan": lambda w: w.index_fill(0, torch.tensor([3]), torch.nan),
        "inf": lambda w: w.index_fill(0, torch.tensor([3]), -torch.inf),
        "wide": torch.Tensor.double,
        "narrow": lambda w: w.float() + 1e-4,
        "same": lambda w: state[last],
    }
    if change == "missing":
        del base[last]
    elif isinstance(change, str):
        base[last] = values[change](base[last])
    options = {"base_weights": base} | (change if isinstance(change, dict) else {})
    with pytest.raises(error, match=says):
        prune_state_(state, Evidence(norms, **options), Selection(0.3, score_delta=True))
    assert all(torch.equal(state[key], value) for key, value in made(dtype)[0].items())


# --- one weight at a time -------------------------------------------------------------------------


@pytest.mark.parametrize("few_values", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("preserving", [False, True])
def test_a_global_cut_as_all_at_once(preserving, largest, few_values):
    for ratio in (0.05, 0.4, 1.0):
        state, norms, preserve, base = made(torch.float16, few_values=few_values)
        selection = Selection(ratio, scope="global", largest=largest, score_delta=True)
        evidence = Evidence(norms, preserve_norms=preserve if preserving else None)
        cut = find_cut(list(state), state.get, evidence, selection, read_base=base.get)
        cut = GlobalCut.from_dict(json.loads(json.dumps(cut.to_dict())), evidence)
        masks = {key: cut.mask(key, weight, base[key]) for key, weight in state.items()}
        pieces = {key: value.clone() for key, value in state.items()}
        for key in pieces:  # as a stream does: a weight at a time
            prune_state_(
                {key: pieces[key]},
                Evidence(
                    norms.subset([key]),
                    preserve_norms=preserve.subset([key]) if preserving else None,
                    base_weights=base,
                ),
                selection,
                cut=cut,
            )
        evidence = replace(evidence, base_weights=base)
        report = prune_state_(state, evidence, selection, return_masks=True)
        assert all(report.masks[key] == mask for key, mask in masks.items())
        assert all(
            torch.equal(plain_prune.bits(pieces[key]), plain_prune.bits(state[key]))
            for key in state
        )


def test_a_cut_of_a_difference_needs_the_base():
    with pytest.raises(
        UsageError, match=r"^base_weights=None: must be given with score_delta=True"
    ):
        find_cut(
            ["a"],
            None,
            Evidence(score="magnitude"),
            Selection(0.1, scope="global", score_delta=True),
        )


# --- broken kernels -------------------------------------------------------------------------------


def zeros(weight, before, mask_bits, thresholds):
    """Removed weights become zero, whatever the base has."""
    mask = reference_mask(mask_bits, weight)
    weight[mask] = 0.0


def reference_mask(mask_bits, weight):
    from antidote_fast.backends.reference import unpack_bits

    return unpack_bits(mask_bits, weight.shape[1])


@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize("damage", [swap, not_written, zeros], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_broken_kernel_is_found_out(broken, damage, scope, preserving):
    ratio = 0.1 if preserving else None
    selection = Selection(0.5, scope=scope, score_delta=True, preserve_ratio=ratio)
    chosen, written = "nothing was written", "the weights in memory are not"
    for smallest, says in ((0, chosen), (4 * 17, chosen if damage is swap else written)):
        broken(damage, smallest=smallest)
        state, norms, preserve, base = made()
        kept = preserve if preserving else None
        with pytest.raises(AntidoteError, match=f"^m.*: {WRONG}; {says}"):
            prune_state_(state, Evidence(norms, preserve_norms=kept, base_weights=base), selection)
        if not smallest:
            assert all(torch.equal(state[key], value) for key, value in made()[0].items())


def test_a_kernel_that_scores_the_weights_and_not_their_difference(broken):
    from antidote_fast.backends import reference

    plain = Selection(0.4)
    broken(lambda *arguments: None).prune = lambda operands, selection, write: reference.prune(
        operands, plain, write=write
    )
    state, norms, _, base = made()
    with pytest.raises(AntidoteError, match=WRONG):
        prune_state_(state, Evidence(norms, base_weights=base), Selection(0.4, score_delta=True))


def test_a_broken_write_of_random_choices_is_found_out(broken, monkeypatch):
    from antidote_fast.backends import reference

    broken(lambda *arguments: None)
    real = reference.apply_mask_
    monkeypatch.setattr(reference, "apply_mask_", lambda w, mask, base: real(w, mask, None))
    state, *_, base = made()
    with pytest.raises(AntidoteError, match=f"{WRONG}; the weights in memory"):
        prune_state_(state, Evidence(score="random", base_weights=base), Selection(0.4))
