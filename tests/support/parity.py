"""A backend against the reference, bit for bit: what the tests of every backend share."""

import oracle
import torch
from hypothesis import strategies as st

from antidote_fast import Selection
from antidote_fast.ops import prune_with_report_

SHAPES = [
    (0, 5),
    (3, 0),
    (1, 1),
    (7, 2),
    (5, 8),
    (9, 15),
    (4, 16),
    (3, 31),
    (6, 32),
    (6, 33),
    (2, 63),
    (2, 64),
    (5, 65),
    (3, 257),
    (4, 1000),
    (33, 1024),
    (2, 4097),
]
SELECTIONS = {
    "row-5%": Selection(0.05),
    "row-20%": Selection(0.2),
    "row-all": Selection(1.0),
    "row-none": Selection(0.0),
    "row-smallest": Selection(0.4, largest=False),
    "tensor": Selection(0.1, scope="tensor"),
    "tensor-smallest": Selection(0.5, scope="tensor", largest=False),
    "2:4": Selection(n_m=(2, 4)),
    "3:16-smallest": Selection(n_m=(3, 16), largest=False),
}


def same(backend, weights, norms, selection, preserve=None, bases=None, device="cpu"):
    """Prune copies with the reference and with a backend; every bit of every output is equal.

    Args:
        device: where the backend's copies lie; the reference works on the CPU.

    Returns:
        The backend's masks, on the CPU.
    """
    outcomes = []
    for name, place in (("reference", "cpu"), (backend, device)):
        copies = [copied(w, place) for w in weights]
        masks, thresholds = prune_with_report_(
            copies,
            moved(norms, place),
            selection,
            preserve_norms=moved(preserve, place),
            base_weights=moved(bases, place),
            backend=name,
        )
        outcomes.append((copies, [mask.to("cpu") for mask in masks], thresholds))
    (expected, masks, edges), (pruned, own_masks, own_edges) = outcomes
    for i in range(len(weights)):
        assert own_masks[i] == masks[i]
        assert oracle.same_bits(pruned[i].cpu(), expected[i])
        assert own_edges[i] == edges[i] or (own_edges[i] != own_edges[i] and edges[i] != edges[i])
        check_padding(pruned[i])
    return own_masks


def moved(tensors, device):
    """A list of tensors or None, on a device; strides are kept."""
    if tensors is None:
        return None
    return [t if t is None or device == "cpu" else copied(t, device) for t in tensors]


def copied(tensor, device="cpu"):
    """A copy with the same strides; what lies between the rows is 7."""
    if tensor.is_contiguous():
        return tensor.to(device, copy=True)
    rows, columns = tensor.shape
    wide = torch.full((rows, tensor.stride(0)), 7.0, dtype=tensor.dtype, device=device)
    copy = wide[:, :columns]
    copy.copy_(tensor)  # same dtype: bits are kept
    return copy


def check_padding(weight):
    """Nothing was written between the rows of a copy."""
    if not weight.is_contiguous():
        rest = weight._base[:, weight.shape[1] :]
        assert bool((rest == 7).all())


def draw_call(data, widths=None):
    """Arguments of one call: weights (their columns from ``widths``), norms, selection, preserve
    norms, bases.
    """
    widths = st.integers(0, 140) if widths is None else widths
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from(list(oracle.DTYPES.values())))
    options = {"largest": data.draw(st.booleans()), "score_delta": data.draw(st.booleans())}
    grouped = data.draw(st.integers(0, 4)) == 0
    if grouped:
        m = data.draw(st.sampled_from([1, 2, 4, 7, 8, 9, 16, 70]))
        selection = Selection(n_m=(data.draw(st.integers(0, m)), m), **options)
    else:
        selection = Selection(
            data.draw(
                st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 0.99, 1.0]) | st.floats(0, 1)
            ),
            scope=data.draw(st.sampled_from(["row", "row", "tensor", "global"])),
            preserve_ratio=data.draw(st.none() | st.floats(0, 1)),
            **options,
        )
    weights, norms, preserve, bases = [], [], [], []
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 3]))):
        shape = data.draw(st.integers(0, 6)), data.draw(widths)
        kind = data.draw(st.sampled_from(oracle.WEIGHT_KINDS))
        padding = data.draw(st.sampled_from([0, 0, 1, 8]))
        weights.append(oracle.make_weight(kind, shape, dtype, generator, padding))
        present = selection.score_delta or data.draw(st.booleans())
        bases.append(oracle.make_weight(kind, shape, dtype, generator) if present else None)
        kinds = [data.draw(st.sampled_from(oracle.NORM_KINDS)) for _ in range(2)]
        norms.append(oracle.make_norm(kinds[0], shape[1], generator))
        preserve.append(None if grouped else oracle.make_norm(kinds[1], shape[1], generator))
    return weights, norms, selection, preserve, bases
