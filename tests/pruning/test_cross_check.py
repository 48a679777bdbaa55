"""A kernel that selects or writes wrongly is found out, by name, and its folder is not written."""

import os
from dataclasses import replace

import pytest
import tiny
import torch
from broken_backends import DAMAGES, WRONG, also_written, not_written, one_too_many, swap

from antidote_fast import backends, oneshot
from antidote_fast.backends import reference
from antidote_fast.config.prune import PruneConfig
from antidote_fast.errors import AntidoteError
from antidote_fast.ops import prune_with_report_
from antidote_fast.pruning.cross_check import CrossCheck
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.layers import Layer
from antidote_fast.pruning.prune import prune_model_, prune_state_
from antidote_fast.selection import Selection
from antidote_fast.stages import prune


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (9, 40), "b": (9, 40), "c": (5, 33)}
    return {k: torch.randn(shape, generator=generator).to(dtype) for k, shape in shapes.items()}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_a_broken_kernel_is_refused_before_anything_is_written(broken, damage, scope):
    broken(damage)
    state = weights()
    with pytest.raises(AntidoteError, match=f"^[abc]: {WRONG}; nothing was written") as caught:
        prune_state_(state, Evidence(score="magnitude"), Selection(0.25, scope=scope))
    assert caught.value.exit_code == 1
    assert all(torch.equal(state[key], value) for key, value in weights().items())


@pytest.mark.parametrize("damage", [swap, one_too_many, not_written, also_written])
@pytest.mark.parametrize("scope", ["row", "tensor", "global"])
def test_one_that_is_broken_for_whole_weights_only(broken, damage, scope):
    """The copied rows go well; the same rows of the whole weight do not."""
    broken(damage, smallest=4 * 40)
    state, chosen = weights(), damage in (swap, one_too_many)
    end = "nothing was written" if chosen else "the weights in memory are not"
    with pytest.raises(AntidoteError, match=f"^[ab]: {WRONG}; {end}"):
        prune_state_(state, Evidence(score="magnitude"), Selection(0.25, scope=scope))
    same = [torch.equal(state[key], value) for key, value in weights().items()]
    assert all(same) or not chosen


def test_a_wrong_count_far_from_the_copied_rows(broken):
    def extra(weight, before, bits, thresholds):
        bits[1, 0] |= 1 | ~bits[1, 0] & 2
        bits[1, 0] |= 0x0F

    for scope in ("tensor", "global"):
        broken(extra, smallest=4 * 40)
        with pytest.raises(AntidoteError, match=WRONG):
            prune_state_(weights(), Evidence(score="magnitude"), Selection(0.1, scope=scope))


def test_random_scores_and_switching_it_off(broken):
    broken(swap)
    with pytest.raises(AntidoteError, match=WRONG):
        prune_state_(weights(), Evidence(score="random"), Selection(0.25))
    state = weights()
    evidence = Evidence(score="magnitude")
    report = prune_state_(state, evidence, Selection(0.25), cross_check=False)
    assert report.num_pruned == 2 * 90 + 45
    with pytest.raises(AntidoteError, match=WRONG):
        prune_model_(tiny.build(), None, Selection(0.25), score="magnitude")
    prune_model_(tiny.build(), evidence, Selection(0.25), cross_check=False)


def test_no_folder_is_written(broken, folders, tmp_path):
    broken(swap)
    options = {"adapter": str(folders / "adapter"), "score": "magnitude"}
    config = PruneConfig(
        model_name_or_path=str(folders / "model"), output_dir=str(tmp_path / "out"), **options
    )
    with pytest.raises(AntidoteError, match=f"lora_A.weight: {WRONG}"):
        prune.run(config)
    assert os.listdir(tmp_path) == []
    prune.run(replace(config, cross_check=False))
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("cross_check", [True, False])
def test_live_models_are_checked_as_asked(broken, cross_check):
    broken(swap)
    model, options = tiny.build(), {"score": "magnitude", "cross_check": cross_check}
    if cross_check:
        with pytest.raises(AntidoteError, match=WRONG):
            oneshot(model, **options)
    else:
        assert oneshot(model, **options).num_pruned > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        *({"ratio": r, "scope": s} for r in (0.0, 0.1, 1.0) for s in ("row", "tensor", "global")),
        {"n_m": (2, 4)},
        {"n_m": (1, 3)},
    ],
    ids=str,
)
def test_sound_kernels_pass_with_ties_zeros_and_single_rows(dtype, largest, options):
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 24), (1, 9), (6, 1), (12, 24), (0, 5), (3, 0)]
    # Few values, so that the edge lies among equal scores.
    matrices = [torch.randint(-2, 3, s, generator=generator).to(dtype) for s in shapes]
    norms = [torch.randint(0, 3, s[1:], generator=generator).float() for s in shapes]
    selection = Selection(**options, largest=largest)
    guard = CrossCheck(selection, None)
    layers = [
        Layer(key, matrix, matrix, False, False, norm, None)
        for key, matrix, norm in zip("abcdef", matrices, norms, strict=True)
    ]
    samples = guard.before(layers, matrices)
    assert [sample.layer.key for sample in samples] == (
        [] if backends.select(None, "cpu") is reference else list("abcd")
    )
    result = prune_with_report_(matrices, norms, selection, write=False)
    for layer, mask, threshold in zip(layers, *result, strict=True):
        layer.mask, layer.threshold = mask, threshold
    guard.selected(samples, layers)
    for layer in layers:
        layer.remove(None)
    guard.written()


def test_each_kind_is_looked_at_once():
    if backends.select(None, "cpu") is reference:
        pytest.skip("the cpu extension is not built")
    guard = CrossCheck(Selection(0.1), None)
    state = weights()
    layers = [Layer(key, w, w, False, False, None, None) for key, w in state.items()]
    lists = layers, list(state.values())
    assert [sample.layer.key for sample in guard.before(*lists)] == ["a", "c"]
    assert guard.before(*lists) == []
