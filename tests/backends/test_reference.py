"""The reference backend against an independent stable sort."""

import numpy as np
import oracle
import pytest
import sampling
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from antidote_fast import Selection, prune_, prune_many_, prune_mask, select_mask
from antidote_fast import score as score_op

REFERENCE = {"backend": "reference"}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kind", oracle.WEIGHT_KINDS)
@pytest.mark.parametrize("norm_kind", oracle.NORM_KINDS)
def test_score_and_row_mask(dtype, kind, norm_kind):
    generator = torch.Generator().manual_seed(0)
    weight = oracle.make_weight(kind, (5, 37), oracle.DTYPES[dtype], generator)
    norm = oracle.make_norm(norm_kind, 37, generator)
    scores = score_op(weight, norm, **REFERENCE)
    expected = torch.from_numpy(oracle.score(weight, norm))
    assert oracle.same_bits(scores, expected)
    mask = prune_mask(weight, norm, Selection(0.2), **REFERENCE)
    np.testing.assert_array_equal(
        mask.to_bool().numpy(), oracle.removed([weight], [norm], Selection(0.2))[0]
    )


@settings(max_examples=sampling.examples(300, 100), deadline=None)
@given(st.data())
def test_any_selection(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    dtype = oracle.DTYPES[data.draw(st.sampled_from(list(oracle.DTYPES)))]
    largest = data.draw(st.booleans())
    delta = data.draw(st.booleans())
    if data.draw(st.booleans()):
        m = data.draw(st.integers(1, 9))
        selection = Selection(
            n_m=(data.draw(st.integers(0, m)), m), largest=largest, score_delta=delta
        )
    else:
        selection = Selection(
            data.draw(st.floats(0, 1)),
            largest=largest,
            score_delta=delta,
            scope=data.draw(st.sampled_from(["row", "tensor", "global"])),
            preserve_ratio=data.draw(st.none() | st.floats(0, 1)),
        )
    weights, norms, preserve, bases = [], [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 20))
        kind = data.draw(st.sampled_from(oracle.WEIGHT_KINDS))
        weights.append(oracle.make_weight(kind, shape, dtype, generator))
        bases.append(oracle.make_weight("gauss", shape, dtype, generator))
        for norms_of in (norms, preserve):
            norm_kind = data.draw(st.sampled_from(oracle.NORM_KINDS))
            norms_of.append(oracle.make_norm(norm_kind, shape[1], generator))
    if selection.n_m is not None:
        preserve = None
    expected = oracle.removed(weights, norms, selection, preserve, bases)
    pruned, masks = prune_many_(
        [w.clone() for w in weights],
        norms,
        selection,
        preserve_norms=preserve,
        base_weights=bases,
        return_mask=True,
        **REFERENCE,
    )
    for weight, base, after, mask, gone in zip(
        weights, bases, pruned, masks, expected, strict=True
    ):
        np.testing.assert_array_equal(mask.to_bool().numpy(), gone)
        assert mask.count() == gone.sum()
        size = torch.int32 if dtype == torch.float32 else torch.int16
        reverted = torch.where(torch.from_numpy(gone), base.view(size), weight.view(size))
        assert oracle.same_bits(after, reverted.view(dtype))


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("largest", [True, False])
def test_select_mask_takes_signed_scores(scope, largest):
    generator = torch.Generator().manual_seed(1)
    for kind in oracle.WEIGHT_KINDS:
        scores = oracle.make_weight(kind, (4, 23), torch.float32, generator)
        selection = Selection(0.3, scope=scope, largest=largest)
        mask = select_mask(scores, selection, **REFERENCE).to_bool().numpy()
        expected = oracle.selected([scores.numpy()], 0.3, scope, largest)[0]
        np.testing.assert_array_equal(mask, expected)


def test_removed_weights_are_plus_zero():
    weight = torch.tensor([[-1.0, float("inf"), float("nan"), -0.0, 3.0]])
    prune_(weight, None, Selection(1.0), **REFERENCE)
    assert oracle.same_bits(weight, torch.zeros(1, 5))
