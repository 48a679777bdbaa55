"""An independent answer to "which weights go": numpy and a stable sort, no code of the package.

Also the cases that the backends are compared on: weights with ties, zeros, denormals, infinities
and NaN, and norms that go with them.
"""

import numpy as np
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WEIGHT_KINDS = ("gauss", "ties", "equal", "zeros", "denormal", "bits", "sorted", "huge")
NORM_KINDS = (
    "none",
    "uniform",
    "ones",
    "dead",
    "tiny",
    "large",
    "inf",
    "nan",
    "negative",
    "outlier",
)


def floats(tensor):
    """Any of the three dtypes as numpy fp32, by its bits."""
    if tensor.dtype == torch.float32:
        return tensor.contiguous().numpy()
    bits = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def score(weight, norm, base=None):
    """``| |w| * n |`` in numpy fp32, a NaN as the canonical one."""
    with np.errstate(all="ignore"):
        value = floats(weight)
        if base is not None:
            value = value - floats(base)
        value = np.abs(value)
        if norm is not None:
            value = np.abs(value * norm.numpy())
    return np.where(np.isnan(value), np.uint32(0x7FC00000).view(np.float32), value)


def count(n, ratio, largest):
    """The official codes' counts, in Python floats."""
    if not largest:
        return int(n * ratio)
    k = n - int(n * (1 - ratio))
    return max(k, 1) if ratio > 0 and n > 0 else k


def last(values, k, largest=True):
    """Bool mask over a flat array: the last (first) k of a stable ascending sort, NaN last."""
    order = sorted(range(len(values)), key=lambda i: (np.isnan(values[i]), float(values[i]), i))
    if any(np.isnan(values)):  # NaN compares with nothing: order those by index alone
        numbers = [i for i in order if not np.isnan(values[i])]
        order = numbers + [i for i in range(len(values)) if np.isnan(values[i])]
    chosen = order[len(order) - k :] if largest else order[:k]
    mask = np.zeros(len(values), dtype=bool)
    mask[chosen] = True
    return mask


def selected(scores, ratio, scope="row", largest=True, n_m=None):
    """Bool masks, one a score matrix of the list."""
    if n_m is not None:
        return [_groups(s, n_m, largest) for s in scores]
    if scope == "row":
        return [
            np.stack([last(row, count(len(row), ratio, largest), largest) for row in s])
            if s.size
            else np.zeros(s.shape, dtype=bool)
            for s in scores
        ]
    if scope == "tensor":
        return [
            last(s.ravel(), count(s.size, ratio, largest), largest).reshape(s.shape) for s in scores
        ]
    flat = np.concatenate([s.ravel() for s in scores])
    mask = last(flat, count(len(flat), ratio, largest), largest)
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [m.reshape(s.shape) for m, s in zip(np.split(mask, ends), scores, strict=True)]


def _groups(scores, n_m, largest):
    n, m = n_m
    mask = np.zeros(scores.shape, dtype=bool)
    for r, row in enumerate(scores):
        for begin in range(0, len(row), m):
            group = row[begin : begin + m]
            k = n if len(group) == m else n * len(group) // m
            mask[r, begin : begin + m] = last(group, k, largest)
    return mask


def removed(weights, norms, selection, preserve_norms=None, base_weights=None):
    """Bool masks of what ``selection`` removes of a list of weights."""
    bases = base_weights if selection.score_delta else [None] * len(weights)
    scores = [score(w, n, b) for w, n, b in zip(weights, norms, bases, strict=True)]
    masks = selected(scores, selection.ratio, selection.scope, selection.largest, selection.n_m)
    protected = [i for i, n in enumerate(preserve_norms or []) if n is not None]
    if protected:
        ratio = selection.ratio if selection.preserve_ratio is None else selection.preserve_ratio
        scores = [score(weights[i], preserve_norms[i], bases[i]) for i in protected]
        for i, kept in zip(protected, selected(scores, ratio, selection.scope), strict=True):
            masks[i] = masks[i] & ~kept
    return masks


def same_bits(a, b):
    """Equal in every bit, NaN payloads and signs of zero included."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(size), b.contiguous().view(size))


def make_weight(kind, shape, dtype, generator, padding=0):
    """A weight of this kind; ``padding`` more columns in memory make its rows strided."""
    rows, columns = shape
    value = torch.randn(shape, generator=generator)
    if kind == "ties":
        value = torch.randint(-3, 4, shape, generator=generator).float()
    elif kind == "equal":
        value = torch.full(shape, -0.5)
    elif kind == "zeros":  # of both signs
        value = value * (torch.rand(shape, generator=generator) > 0.6)
    elif kind == "denormal":
        value = value * (1e-6 if dtype == torch.float16 else 1e-39)
    elif kind == "sorted":
        value = value.sort(dim=-1).values
    elif kind == "huge":
        value = value * 1e38
    value = value.to(dtype)
    if kind == "bits":  # any bit pattern: infinities, quiet and signalling NaN
        raw = torch.randint(-(2**31), 2**31, shape, generator=generator)
        size = torch.int32 if dtype == torch.float32 else torch.int16
        raw = raw.to(torch.int32).to(size)
        some = torch.rand(shape, generator=generator) < 0.5
        value = torch.where(some, raw, value.view(size)).view(dtype)
    if not padding:
        return value
    wide = torch.full((rows, columns + padding), 7.0, dtype=dtype)
    wide[:, :columns].view(value.dtype).copy_(value)
    return wide[:, :columns]


def make_norm(kind, columns, generator):
    """An activation norm of this kind, or None."""
    if kind == "none":
        return None
    norm = torch.rand(columns, generator=generator)
    if kind == "ones":
        norm = torch.ones(columns)
    elif kind == "dead":
        norm = norm.round()
    elif kind == "tiny":
        norm = norm * 1e-38
    elif kind == "large":
        norm = norm * 1e30
    elif kind in ("inf", "nan") and columns:
        norm[int(torch.randint(columns, (), generator=generator))] = float(kind)
    elif kind == "negative":
        norm = -norm
    elif kind == "outlier":
        norm = norm**-2
    return norm
