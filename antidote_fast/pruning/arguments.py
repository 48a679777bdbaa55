"""What a prune of a model is asked for, checked before the first write."""

import hashlib
import math

import torch

from antidote_fast.errors import DataError, UsageError
from antidote_fast.models.targets import natural_key
from antidote_fast.selection import Selection, check_seed

SCORES = ("wanda", "magnitude", "random", "gate")
_GIVEN_WHOLE = ("random", "gate")  # scores that are a matrix of their own, not made of the weight


def random_scores(key, shape, seed) -> torch.Tensor:
    """Uniform fp32 scores that depend on (seed, key) alone, the same on every machine."""
    generator = random_generator(key, seed)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def random_generator(key, seed) -> torch.Generator:
    """What draws the scores of :func:`random_scores`, all at once or some rows after another."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check_arguments(
    selection, score, seed, norms, preserve_norms=None, base_weights=None, scores=None
):
    """Refuse, as UsageError, what no weight needs to be looked at for."""
    if not isinstance(selection, Selection):
        raise UsageError(f"selection={selection!r:.80}: must be a Selection")
    if score not in SCORES:
        raise UsageError(f"score={score!r}: must be one of {', '.join(SCORES)}")
    check_seed(seed)
    if score == "wanda" and norms is None:
        raise UsageError("norms=None: must be given where score='wanda'")
    if selection.preserve_ratio is not None and preserve_norms is None:
        raise UsageError(
            f"preserve_norms=None: must be given with preserve_ratio={selection.preserve_ratio}"
        )
    if selection.score_delta and base_weights is None:
        raise UsageError("base_weights=None: must be given with score_delta=True")
    if preserve_norms is not None and selection.n_m is not None:
        raise UsageError(f"preserve_norms: must be left out with n_m={selection.n_m}")
    if score in _GIVEN_WHOLE and (preserve_norms is not None or selection.score_delta):
        name = "score_delta=True" if preserve_norms is None else "preserve_norms"
        raise UsageError(f"{name}: must be left out where score={score!r}")
    if score == "gate" and scores is None:
        raise UsageError("scores=None: must be given where score='gate'")
    if score != "gate" and scores is not None:
        raise UsageError(f"scores: must be left out where score={score!r}")


def check_scores(layers, scores):
    """Refuse score matrices that no order can be read from."""
    for layer in layers:
        given = scores.get(layer.key)
        if given is None:
            raise DataError(f"scores: hold no weight {layer.key!r}")
        plain = type(given) in (torch.Tensor, torch.nn.Parameter)
        shape = layer.matrix.shape
        if not plain or given.dtype != torch.float32 or given.shape != shape:
            shown = f"{given.dtype} {tuple(given.shape)}" if plain else type(given).__name__
            raise DataError(
                f"{layer.key}: is {shown} in scores; must be torch.float32 {tuple(shape)}"
            )
        if given.numel():
            low, high = (bound.item() for bound in torch.aminmax(given.detach()))
            if not (low >= 0 and math.isfinite(high)):  # NaN fails here too
                raise DataError(f"{layer.key}: its scores must be finite and at least 0")


def check_base(norms, actual, name="norms"):
    """Refuse norms whose base model's fingerprint is known and is not ``actual``."""
    if norms.fingerprint and actual and norms.fingerprint != actual:
        raise DataError(
            f"{name}: were collected on another base model (fingerprint {norms.fingerprint}, not "
            f"{actual}); collect them again on this one"
        )


def check_keys(weights, found, name="norms"):
    """Refuse norms of the weights ``found`` where those of ``weights`` are wanted (both: names)."""
    absent = sorted(set(weights) - set(found), key=natural_key)
    if absent:
        raise DataError(
            f"{name}: lack {len(absent)} of {len(weights)} weights to prune, {absent[0]!r} first; "
            "give the targets and ignore with which they were collected"
        )
    extra = sorted(set(found) - set(weights), key=natural_key)
    if extra:
        raise DataError(
            f"{name}: hold {len(extra)} weights that are not here, {extra[0]!r} first; they are of "
            "another model, or targets and ignore must name what to prune"
        )
