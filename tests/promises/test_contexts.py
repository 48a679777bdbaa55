"""The same masks and norms whatever torch's defaults, modes and generators say around the call."""

import contextlib

import pytest
import tiny
import torch

from antidote_fast import ActivationNorms, Selection, prune_model_, prune_state_
from antidote_fast.models.targets import find_targets
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.global_cut import find_cut


@contextlib.contextmanager
def switched(set_value, value, before):
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


def deterministic(value):
    torch.use_deterministic_algorithms(value)


CONTEXTS = {
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: switched(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float16": lambda: switched(torch.set_default_dtype, torch.float16, torch.float32),
    "meta": lambda: torch.device("meta"),
    "default_device": lambda: switched(torch.set_default_device, "meta", None),
    "deterministic": lambda: switched(deterministic, True, False),
    "threads": lambda: switched(torch.set_num_threads, 3, torch.get_num_threads()),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "seed": lambda: switched(torch.manual_seed, 5, 0),
}
SELECTIONS = {
    "row": Selection(0.3),
    "tensor": Selection(0.3, scope="tensor"),
    "global": Selection(0.3, scope="global"),
    "n_m": Selection(n_m=(2, 4)),
    "preserve": Selection(0.4, preserve_ratio=0.2),
}


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape, dtype in (
            ("a", (9, 40), torch.float32),
            ("b", (1, 7), torch.bfloat16),
            ("c", (33, 17), torch.float16),
        )
    }


def norms_of(state, seed):
    generator = torch.Generator().manual_seed(seed)
    sums = {key: torch.rand(w.shape[1], generator=generator) for key, w in state.items()}
    return ActivationNorms(sums, num_sequences=2, num_tokens=9)


def pruned(score, selection):
    """A call that prunes; it returns (weights afterwards, bits of the masks)."""
    state, blank = weights(), weights()
    norms = norms_of(state, 1) if score == "wanda" else None
    kept = norms_of(state, 2) if selection.preserve_ratio is not None else None

    def call():
        evidence = Evidence(norms, score, preserve_norms=kept)
        report = prune_state_(state, evidence, selection, seed=3, return_masks=True)
        found = {key: mask.bits for key, mask in report.masks.items()}
        if selection.scope == "global":
            cut = find_cut(list(blank), blank.get, evidence, selection, seed=3)
            found |= {f"{key} of the cut": cut.mask(key, w).bits for key, w in blank.items()}
        return state, found

    return call


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("score", ["random", "wanda", "magnitude"])
def test_masks_are_the_same(context, score):
    for name, selection in SELECTIONS.items():
        if name == "preserve" and score == "random":
            continue
        expected, call = pruned(score, selection)(), pruned(score, selection)
        with CONTEXTS[context]():
            found = call()
        for mine, its in zip(found, expected, strict=True):
            for key, tensor in its.items():
                assert torch.equal(mine[key], tensor), (name, key)


# A default device, autocast and the number of threads change what the model itself computes.
@pytest.mark.parametrize(
    "context", sorted(set(CONTEXTS) - {"meta", "default_device", "autocast", "threads"})
)
@pytest.mark.parametrize("aggregation", ["rms", "mean"])
def test_norms_and_live_models_are_the_same(context, aggregation):
    def do(model, batches):
        norms = ActivationNorms.collect(model, batches, aggregation=aggregation)
        prune_model_(model, norms, Selection(0.3))
        return norms

    model, other, batches = tiny.build(), tiny.build(), tiny.batches()
    expected = do(model, batches)
    with CONTEXTS[context]():
        norms = do(other, batches)
    for key in expected.keys:
        assert torch.equal(norms.sq_sum[key], expected.sq_sum[key])
        assert torch.equal(norms.act_norm(key), expected.act_norm(key))
    for mine, its in zip(find_targets(other), find_targets(model), strict=True):
        assert torch.equal(mine.weight, its.weight)
