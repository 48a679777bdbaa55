"""Model-level pruning against plain torch, and every refusal."""

import json
import math

import plain_prune
import pytest
import tiny
import torch

from antidote_fast.errors import DataError, NothingPruned, UsageError
from antidote_fast.models.targets import find_targets
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.prune import prune_model_, prune_state_
from antidote_fast.selection import Selection, num_pruned


def oracle(weights, norms, selection):
    """Masks by a stable argsort of fp32 scores; weights (out, in) in global order."""
    scores = [w.float().abs() * n for w, n in zip(weights, norms, strict=True)]
    masks = [torch.zeros(s.shape, dtype=torch.bool) for s in scores]
    if selection.scope == "row":
        for score, mask in zip(scores, masks, strict=True):
            k = num_pruned(score.shape[1], selection)
            for row in range(len(score)):
                order = torch.argsort(score[row], stable=True)
                mask[row, order[-k:] if selection.largest else order[:k]] = True
        return masks
    groups = [[i] for i in range(len(scores))]
    if selection.scope == "global":
        groups = [list(range(len(scores)))]
    for group in groups:
        flat = torch.cat([scores[i].reshape(-1) for i in group])
        k = num_pruned(flat.numel(), selection)
        order = torch.argsort(flat, stable=True)
        chosen = torch.zeros(flat.shape, dtype=torch.bool)
        chosen[order[-k:] if selection.largest else order[:k]] = True
        for i, part in zip(group, chosen.split([scores[i].numel() for i in group]), strict=True):
            masks[i] = part.reshape(scores[i].shape)
    return masks


def state_and_norms(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"m.layers.{i}.q_proj.weight": (5 + i, 16) for i in (0, 2, 10)}
    state = {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}
    sums = {k: torch.rand(s[1], generator=generator) + 0.1 for k, s in shapes.items()}
    return state, ActivationNorms(sums, num_sequences=3, num_tokens=11)


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_matches_oracle(scope, largest, dtype):
    state, norms = state_and_norms(dtype)
    before = {k: v.clone() for k, v in state.items()}
    selection = Selection(0.25, scope=scope, largest=largest)
    # Given in another order: global order is the natural one (2 before 10).
    report = prune_state_(dict(reversed(state.items())), norms, selection, return_masks=True)
    keys = list(before)
    expected = oracle(
        [before[k] for k in keys], [norms.act_norm(k, scope) for k in keys], selection
    )
    assert [layer.key for layer in report.layers] == keys
    edges = []
    for key, mask in zip(keys, expected, strict=True):
        chosen = (before[key].float().abs() * norms.act_norm(key, scope))[mask]
        edges.append(float(chosen.min() if largest else chosen.max()))
    if scope == "global":
        edges = [min(edges) if largest else max(edges)] * len(edges)
    for key, mask, edge, layer in zip(keys, expected, edges, report.layers, strict=True):
        assert torch.equal(report.masks[key].to_bool(), mask)
        assert torch.equal(state[key], before[key].masked_fill(mask, 0))
        assert layer.threshold == edge
        assert layer.removed == int(mask.sum())
        assert layer.achieved == int(mask.sum()) / mask.numel()
        assert layer.shape == tuple(mask.shape)
        assert (layer.seconds is None) == (scope == "global")
        if scope == "row":
            assert layer.k == num_pruned(16, selection)
    assert report.num_pruned == sum(int(m.sum()) for m in expected)
    assert report.num_weights == sum(m.numel() for m in expected)
    assert report.achieved == report.num_pruned / report.num_weights


def test_row_k_is_the_papers():
    state = {"q_proj.weight": torch.randn(2, 256)}
    norms = ActivationNorms({"q_proj.weight": torch.ones(256)}, num_sequences=1, num_tokens=1)
    for ratio, k in ((0.05, 13), (0.1, 26), (0.2, 52)):
        report = prune_state_({k: v.clone() for k, v in state.items()}, norms, Selection(ratio))
        assert report.layers[0].k == k
        assert report.layers[0].requested == ratio
        assert report.layers[0].achieved == k / 256


def test_n_m_reports_its_ratio():
    state, norms = state_and_norms()
    report = prune_state_(state, norms, Selection(n_m=(2, 4)))
    assert report.ratio == 0.5
    assert {layer.achieved for layer in report.layers} == {0.5}
    assert all(int((w == 0).sum()) == w.numel() // 2 for w in state.values())
    assert report.layers[0].threshold is None


def test_magnitude_needs_no_norms_and_ignores_them():
    selection = Selection(0.3, scope="tensor")
    state, norms = state_and_norms()
    other = {k: v.clone() for k, v in state.items()}
    before = {k: v.clone() for k, v in state.items()}
    first = prune_state_(state, Evidence(score="magnitude"), selection, return_masks=True)
    prune_state_(other, Evidence(norms, score="magnitude"), selection)
    ones = [torch.ones(16)] * 3
    for key, mask in zip(before, oracle(before.values(), ones, selection), strict=True):
        assert torch.equal(first.masks[key].to_bool(), mask)
        assert torch.equal(state[key], other[key])
    assert first.layers[0].zero_norm_channels is None


@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_random_depends_on_seed_and_key_only(scope):
    selection = Selection(0.3, scope=scope)
    masks = []
    for weight_seed, seed in ((0, 7), (1, 7), (0, 8)):
        state, _ = state_and_norms(seed=weight_seed)
        report = prune_state_(
            state, Evidence(score="random"), selection, seed=seed, return_masks=True
        )
        masks.append(report.masks)
        assert all(torch.equal(state[k] == 0, m.to_bool()) for k, m in report.masks.items())
    for key in masks[0]:
        assert torch.equal(masks[0][key].bits, masks[1][key].bits)
        assert not torch.equal(masks[0][key].bits, masks[2][key].bits)
    counts = [int(m.count()) for m in masks[0].values()]
    total = sum(math.prod(m.shape) for m in masks[0].values())
    if scope == "row":
        assert counts == [m.shape[0] * num_pruned(16, selection) for m in masks[0].values()]
    elif scope == "global":
        assert sum(counts) == num_pruned(total, selection)


def test_random_scores_are_pinned():
    # The numbers of another machine or release must be these, or seeds mean nothing.
    values = plain_prune.random_scores("a.weight", (1, 3), 0)
    assert values.dtype == torch.float32
    assert [round(v, 6) for v in values.flatten().tolist()] == [0.789029, 0.908629, 0.553689]


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("scope", ["row", "global"])
def test_full_model(kind, scope):
    model = tiny.build(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    norms = ActivationNorms.collect(model, tiny.batches(), targets="all-linear")
    selection = Selection(0.2, scope=scope)
    report = prune_model_(model, norms, selection, targets="all-linear", return_masks=True)
    targets = find_targets(model, "all-linear")
    oriented = [before[t.key].t() if t.transposed else before[t.key] for t in targets]
    expected = oracle(oriented, [norms.act_norm(t.key, scope) for t in targets], selection)
    after = model.state_dict()
    for target, mask in zip(targets, expected, strict=True):
        assert torch.equal(report.masks[target.key].to_bool(), mask)
        saved_mask = mask.t() if target.transposed else mask
        assert torch.equal(after[target.key], before[target.key].masked_fill(saved_mask, 0))
    touched = {t.key for t in targets}
    assert all(torch.equal(after[k], before[k]) for k in before if k not in touched)
    assert report.coverage["targeted"] == report.coverage["total"]
    output = model.get_output_embeddings().weight
    if model.config.tie_word_embeddings:
        assert output is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_adapter(kind):
    model = tiny.add_lora(tiny.build(kind))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    norms = ActivationNorms.collect(model, tiny.batches())
    report = prune_model_(model, norms, Selection(0.25))
    after = model.state_dict()
    pruned = 0
    for name, value in before.items():
        if ".lora_" not in name:
            assert torch.equal(after[name], value)
            continue
        key = name.replace(".default.", ".")
        mask = oracle([value], [norms.act_norm(key)], Selection(0.25))[0]
        assert torch.equal(after[name], value.masked_fill(mask, 0))
        pruned += int(mask.sum())
    assert report.num_pruned == pruned > 0
    # The base is as it was, so the same norms serve again.
    assert prune_model_(model, norms, Selection(0.5)).num_pruned > pruned


def test_targets_and_ignore_narrow_the_norms():
    model = tiny.build()
    norms = ActivationNorms.collect(model, tiny.batches(), targets="all-linear")
    report = prune_model_(model, norms, Selection(0.1), targets=["q_proj"], ignore=["re:.*0.*"])
    assert [layer.key for layer in report.layers] == ["model.layers.1.self_attn.q_proj.weight"]
    state = {k: model.state_dict()[k] for k in norms.keys}
    report = prune_state_(state, norms, Selection(0.1), ignore=["mlp.up_proj"])
    assert len(report.layers) == 12
    with pytest.raises(DataError, match=r"norms: hold no weight .*embed"):
        prune_state_(
            {"model.layers.0.embed.weight": torch.ones(2, 2)},
            norms,
            Selection(0.1),
            targets="embed",
        )


def test_zero_lora_b_is_pruned_without_effect_and_reported():
    model = tiny.add_lora(tiny.build(), b_std=0.0)
    norms = ActivationNorms.collect(model, tiny.batches())
    report = prune_model_(model, norms, Selection(0.25))
    for layer in report.layers:
        size = math.prod(layer.shape)
        assert layer.zero_weights == (size if "lora_B" in layer.key else 0)
        assert layer.removed > 0
    state = model.state_dict()
    assert all(not v.any() for k, v in state.items() if "lora_B" in k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1, 2])
def test_zero_weights_are_counted(dtype, step):
    memory = torch.ones(6, 8 * step, dtype=dtype)
    weight = memory[:, :8]  # rows apart where step is 2
    weight[0, :3], weight[5, 7], weight[2, 2] = 0.0, -0.0, 1e-7
    report = prune_state_(
        {"a.0.q_proj.weight": weight}, Evidence(score="magnitude"), Selection(0.1)
    )
    assert report.layers[0].zero_weights == 4
    empty = {"a.0.q_proj.weight": torch.empty(0, 8, dtype=dtype)}
    report = prune_state_(empty, Evidence(score="magnitude"), Selection(0.1))
    assert (report.layers[0].zero_weights, report.num_pruned, report.achieved) == (0, 0, 0.0)


def test_zero_norms():
    state, norms = state_and_norms()
    key = next(iter(state))
    norms.sq_sum[key][:5] = 0
    report = prune_state_({k: v.clone() for k, v in state.items()}, norms, Selection(0.25))
    assert [layer.zero_norm_channels for layer in report.layers] == [5, 0, 0]
    norms.sq_sum[key].zero_()
    before = {k: v.clone() for k, v in state.items()}
    with pytest.raises(DataError, match=r"layers\.0.*all its activation norms are zero"):
        prune_state_(state, norms, Selection(0.25))
    assert all(torch.equal(state[k], before[k]) for k in state)
    report = prune_state_(state, Evidence(norms, routed=[key]), Selection(0.25))
    assert report.skipped == {key: "routed expert that no token reached"}
    assert torch.equal(state[key], before[key])
    assert len(report.layers) == 2
    for value in norms.sq_sum.values():
        value.zero_()
    with pytest.raises(NothingPruned, match="no token reached"):
        prune_state_(state, Evidence(norms, routed=list(state)), Selection(0.25))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_weights_leave_everything_untouched(bad):
    state, norms = state_and_norms()
    last = list(state)[-1]
    state[last][0, 3] = bad
    before = {k: v.clone() for k, v in state.items()}
    with pytest.raises(DataError, match=r"layers\.10\.q_proj\.weight: holds NaN or infinity"):
        prune_state_(state, norms, Selection(0.5))
    assert all(torch.equal(state[k], before[k]) or k == last for k in state)
    assert torch.equal(state[last].isfinite(), before[last].isfinite())


def test_keys_must_match_both_ways():
    state, norms = state_and_norms()
    less = dict(list(state.items())[:2])
    with pytest.raises(DataError, match=r"hold 1 weights that are not here, 'm\.layers\.10"):
        prune_state_(less, norms, Selection(0.5))
    with pytest.raises(DataError, match=r"lack 1 of 4 weights to prune, 'extra"):
        prune_state_({**state, "extra.weight": torch.ones(2, 2)}, norms, Selection(0.5))
    with pytest.raises(NothingPruned):
        prune_state_({}, norms, Selection(0.5))


def test_norms_of_another_base():
    norms = ActivationNorms.collect(tiny.build(seed=0), tiny.batches())
    with pytest.raises(DataError, match="another base model"):
        prune_model_(tiny.build(seed=1), norms, Selection(0.5))
    norms.fingerprint = ""
    with pytest.raises(DataError, match=r"norms: lack .*'model\.layers\.2"):
        prune_model_(tiny.build(layers=3), norms, Selection(0.5))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"score": "taylor"}, UsageError, "score='taylor'"),
        ({"seed": -1}, UsageError, "seed=-1"),
        ({"seed": True}, UsageError, "seed=True"),
        ({"norms": None}, UsageError, "norms=None"),
        ({"selection": 0.1}, UsageError, "selection=0.1"),
        ({"selection": Selection(0.1, score_delta=True)}, UsageError, "score_delta"),
        ({"backend": "nonesuch"}, ValueError, "backend='nonesuch'"),
        ({"targets": []}, UsageError, "targets=\\[\\]"),
        ({"targets": "nonesuch"}, NothingPruned, "nonesuch"),
        ({"targets": ["q_proj", "nonesuch"]}, UsageError, "nonesuch"),
        ({"ignore": "re:("}, UsageError, "not a pattern"),
    ],
)
def test_arguments(change, error, match):
    state, norms = state_and_norms()
    before = {k: v.clone() for k, v in state.items()}
    options = {"norms": norms, "score": "wanda", "selection": Selection(0.1)} | change
    evidence = Evidence(options.pop("norms"), options.pop("score"))
    with pytest.raises(error, match=match):
        prune_state_(state, evidence, **options)
    assert all(torch.equal(state[k], before[k]) for k in state)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.ones(3), "must be a matrix"),
        (torch.ones(2, 16, dtype=torch.float64), "is torch.float64"),
        (torch.ones(2, 16, dtype=torch.int8), "is torch.int8"),
        (torch.ones(2, 16, device="meta"), "meta"),
        (torch.ones(2, 15), "has 15 input channels, its norms 16"),
    ],
)
def test_unusable_weights(weight, match):
    state, norms = state_and_norms()
    key = list(state)[-1]
    state[key] = weight
    before = state[next(iter(state))].clone()
    with pytest.raises(DataError, match=rf"layers\.10.*{match}"):
        prune_state_(state, norms, Selection(0.1))
    assert torch.equal(state[next(iter(state))], before)


def test_overlapping_weights_are_refused_before_any_write():
    memory = torch.randn(6, 16)
    state = {"a.0.q_proj.weight": memory[:4], "a.1.q_proj.weight": memory[3:]}
    before = memory.clone()
    for scope in ("row", "global"):
        with pytest.raises(ValueError, match="overlap"):
            prune_state_(state, Evidence(score="magnitude"), Selection(0.5, scope=scope))
    assert torch.equal(memory, before)


def test_strided_weight_is_written_back():
    memory = torch.randn(8, 5)
    state = {"a.0.q_proj.weight": memory.t()}
    before = memory.clone()
    prune_state_(state, Evidence(score="magnitude"), Selection(0.25))
    mask = oracle([before.t()], [torch.ones(8)], Selection(0.25))[0]
    assert torch.equal(memory, before.masked_fill(mask.t(), 0))


def test_square_conv1d_uses_the_norms_record():
    # The shape alone does not tell (in, out) from (out, in) here.
    model = tiny.build("gpt2")
    norms = ActivationNorms.collect(model, tiny.batches(), targets=["attn.c_proj"])
    state = {k: model.state_dict()[k].clone() for k in norms.keys}
    prune_state_(state, norms, Selection(0.25))
    prune_model_(model, norms, Selection(0.25), targets=["attn.c_proj"])
    for key, value in state.items():
        assert torch.equal(value, model.state_dict()[key])
        assert (value == 0).sum(dim=0).tolist() == [8] * 32


def test_report_is_json():
    state, norms = state_and_norms()
    report = prune_state_(state, norms, Selection(0.25), return_masks=True)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["num_layers"] == 3
    assert values["requested"] == 0.25
    assert values["achieved"] == report.achieved
    assert values["backend"] in ("cpu", "reference")
    assert values["layers"][0]["key"] == "m.layers.0.q_proj.weight"
    assert "masks" not in values
    assert values["seconds"] > 0
