"""A model, or tensors as saved: norms and a selection become masks, weights and a report.

Source of the scores: Antidote, arXiv 2408.09600 (``wanda`` is its |W| * norm; ``magnitude`` and
``random`` are what it is compared with).
"""

import hashlib
import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from antidote_fast import _check, backends, ops
from antidote_fast.cross_check import CrossCheck
from antidote_fast.errors import DataError, NothingPruned, UsageError
from antidote_fast.fingerprint import fingerprint_model
from antidote_fast.masks import PackedMask
from antidote_fast.progress import track
from antidote_fast.prune_report import LayerReport, PruneReport
from antidote_fast.selection import Selection, num_pruned
from antidote_fast.sharded import add_up, local_rows, reshard
from antidote_fast.targets import ALL_LINEAR, coverage, find_targets, natural_key, select_keys

SCORES = ("wanda", "magnitude", "random")


def prune_model_(
    model,
    norms,
    selection,
    *,
    targets=None,
    ignore=(),
    score="wanda",
    seed=0,
    backend=None,
    return_masks=False,
    cross_check=True,
) -> PruneReport:
    """Prune a live model's targets in place, once.

    Of a model that FSDP2 shards each rank prunes the rows it holds (row scope), with norms that are
    the same on all ranks; every rank must call. The report is then that of whole weights and the
    same everywhere; masks are those of this rank's rows.

    Args:
        model: a transformers model, or a PEFT model (its active LoRA adapter is pruned).
        norms: :class:`ActivationNorms` of this model's targets; None for scores without data.
        selection: a :class:`Selection`; ``scope="global"`` compares over all targets.
        targets, ignore: as :func:`antidote_fast.targets.find_targets`. Where given, the norms may
            hold more weights than they name.
        score: ``"wanda"`` (|W| * norm), ``"magnitude"`` (|W|) or ``"random"``.
        seed: of the random score.
        backend: as in :mod:`antidote_fast.ops`.
        return_masks: keep the masks in the report.
        cross_check: compare a few rows of the first weight of each shape with the reference
            (:mod:`antidote_fast.cross_check`).

    Raises:
        AntidoteError: the backend does not select what the reference does.
        DataError: norms of another base or of other weights, NaN or infinity in a weight, norms
            of a layer that are all zero; a weight sharded otherwise than by rows. All is checked
            before the first write.
        UsageError, NothingPruned: as find_targets; an unknown score; a scope or score that sharded
            weights cannot be pruned by.
        PeerFailed: another rank refused.
    """
    _check_arguments(selection, score, seed, norms)
    reshard(model)
    found = find_targets(model, targets, ignore)
    if norms is not None:
        check_base(norms, fingerprint_model(model))
    weights, world = local_rows(found, norms, selection, score)
    with world.together():
        report = prune_state_(
            weights,
            _narrowed(norms, [t.key for t in found], targets, ignore),
            selection,
            score=score,
            seed=seed,
            backend=backend,
            return_masks=return_masks,
            cross_check=cross_check,
            transposed=[t.key for t in found if t.transposed],
            routed=[t.key for t in found if t.routed],
        )
    report = add_up(report, found, world)
    report.coverage = asdict(coverage(model, found))
    return report


def prune_state_(
    weights,
    norms,
    selection,
    *,
    targets=None,
    ignore=(),
    score="wanda",
    seed=0,
    backend=None,
    return_masks=False,
    cross_check=True,
    transposed=(),
    routed=(),
    together=False,
    cut=None,
    progress=False,
) -> PruneReport:
    """Prune tensors as saved, in place, with no model and no forward.

    Args:
        weights: {parameter name: (out, in) tensor, bf16, fp16 or fp32}; (in, out) for those in
            ``transposed``.
        norms: :class:`ActivationNorms` of the same names, or None for scores without data.
        targets, ignore: prune these of the weights only (by name, as
            :func:`antidote_fast.targets.select_keys`; ``targets=None`` is all of them).
        transposed: names of weights saved as (in, out); those of the norms are added.
        routed: names of weights inside routed experts, which are skipped where no token reached
            them; those of the norms are added.
        together: prune all weights in one call on a CPU too, as on a GPU; less time for many small
            ones, and then no time of each.
        cut: for global scope, the :class:`antidote_fast.global_cut.GlobalCut` of all weights of
            which these are some.
        progress: as :func:`antidote_fast.progress.track` takes it.
        selection, score, seed, backend, return_masks, cross_check: as :func:`prune_model_`.

    Raises:
        As :func:`prune_model_`; nothing is written then.
    """
    start = time.perf_counter()
    _check_arguments(selection, score, seed, norms)
    if targets is not None or ignore:
        keys = select_keys(weights, ALL_LINEAR if targets is None else targets, ignore)
        norms = _narrowed(norms, keys, targets, ignore)
        weights = {key: weights[key] for key in keys}
    if not weights:
        raise NothingPruned("nothing to prune: no weights")
    order = sorted(weights, key=natural_key)
    transposed = set(transposed) | (norms.transposed if norms else set())
    routed = set(routed) | (norms.routed if norms else set())
    if norms is not None:
        _check_keys(weights, norms)
    with torch.no_grad():
        layers, skipped = _prepare(order, weights, norms, selection, score, transposed, routed)
        modules = {backends.select(backend, layer.matrix.device.type) for layer in layers}
        calls = _calls(layers, selection.scope, together)
        # One call refuses by itself before it writes, unless it writes scores.
        if selection.scope != "global" and (len(calls) > 1 or score == "random"):
            _check_all(layers, selection)
        guard = CrossCheck(selection, backend) if cross_check else None
        for call in track(calls, "prune", progress):
            if cut is not None:
                _apply_cut(call, cut, backend)
            else:
                _run(call, selection, score, seed, backend, guard)
    ratio = selection.ratio if selection.n_m is None else selection.n_m[0] / selection.n_m[1]
    return PruneReport(
        score=score,
        scope=selection.scope,
        ratio=ratio,
        largest=selection.largest,
        n_m=selection.n_m,
        seed=seed,
        backend="+".join(sorted(module.__name__.rsplit(".", 1)[-1] for module in modules)),
        layers=[_layer_report(layer, selection, ratio) for layer in layers],
        skipped=skipped,
        seconds=time.perf_counter() - start,
        masks={layer.key: layer.mask for layer in layers} if return_masks else None,
    )


def random_scores(key, shape, seed) -> torch.Tensor:
    """Uniform fp32 scores that depend on (seed, key) alone, the same on every machine."""
    return torch.rand(shape, generator=random_generator(key, seed))


def random_generator(key, seed) -> torch.Generator:
    """What draws the scores of :func:`random_scores`, all at once or some rows after another."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass
class _Layer:
    """A weight on its way: ``matrix`` is (out, in), the saved tensor or a transposed copy of it."""

    key: str
    saved: torch.Tensor
    matrix: torch.Tensor
    transposed: bool
    copied: bool
    norm: torch.Tensor | None
    zero_norm_channels: int | None
    zero_weights: int = 0
    mask: PackedMask | None = None
    threshold: float = math.nan
    seconds: float | None = None


def _check_arguments(selection, score, seed, norms):
    if not isinstance(selection, Selection):
        raise UsageError(f"selection={selection!r:.80}: must be a Selection")
    if selection.score_delta or selection.preserve_ratio is not None:
        raise UsageError(
            "selection: score_delta and preserve_ratio are for single tensors (antidote_fast.ops)"
        )
    if score not in SCORES:
        raise UsageError(f"score={score!r}: must be one of {', '.join(SCORES)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed={seed!r}: must be an integer >= 0")
    if score == "wanda" and norms is None:
        raise UsageError("norms=None: must be given where score='wanda'")


def _narrowed(norms, keys, targets, ignore):
    """The norms of ``keys`` alone, where the caller named them; else the norms as they are."""
    if norms is None or (targets is None and not ignore):
        return norms
    return norms.subset(keys)


def check_base(norms, actual):
    """Refuse norms whose base model's fingerprint is known and is not ``actual``."""
    if norms.fingerprint and actual and norms.fingerprint != actual:
        raise DataError(
            f"norms: were collected on another base model (fingerprint {norms.fingerprint}, not "
            f"{actual}); collect them again on this one"
        )


def _check_keys(weights, norms):
    absent = sorted(set(weights) - set(norms.sq_sum), key=natural_key)
    if absent:
        raise DataError(
            f"norms: lack {len(absent)} of {len(weights)} weights to prune, {absent[0]!r} first; "
            "give the targets and ignore with which they were collected"
        )
    extra = sorted(set(norms.sq_sum) - set(weights), key=natural_key)
    if extra:
        raise DataError(
            f"norms: hold {len(extra)} weights that are not here, {extra[0]!r} first; they are of "
            "another model, or targets and ignore must name what to prune"
        )


def _prepare(order, weights, norms, selection, score, transposed, routed):
    """Every check on every layer; nothing is written here."""
    layers, skipped = [], {}
    for key in order:
        saved = weights[key]
        if not isinstance(saved, torch.Tensor) or saved.dim() != 2:
            raise DataError(f"{key}: must be a matrix (out_features, in_features)")
        if saved.dtype not in _check.WEIGHT_DTYPES:
            raise DataError(f"{key}: is {saved.dtype}; must be float32, bfloat16 or float16")
        if saved.device.type == "meta":
            raise DataError(f"{key}: is not loaded (meta device); prune the checkpoint's tensors")
        matrix = saved.t() if key in transposed else saved
        norm = zeros = None
        if norms is not None:
            norm = norms.act_norm(key, selection.scope)
            if norm.shape[0] != matrix.shape[1]:
                raise DataError(
                    f"{key}: has {matrix.shape[1]} input channels, its norms {norm.shape[0]}"
                )
            zeros = norm.numel() - int(torch.count_nonzero(norm))
            if zeros == norm.numel() and score == "wanda":
                if key in routed:
                    skipped[key] = "routed expert that no token reached"
                    continue
                raise DataError(f"{key}: all its activation norms are zero")
        # A copy where columns do not lie side by side: Conv1D, and odd views.
        copied = key in transposed or matrix.stride(1) != 1
        if copied:
            matrix = matrix.clone(memory_format=torch.contiguous_format)
        use = norm.to(saved.device, non_blocking=True) if score == "wanda" else None
        layers.append(_Layer(key, saved, matrix, key in transposed, copied, use, zeros))
    for layer, (is_finite, num_zeros) in zip(layers, _looked_at(layers), strict=True):
        if not is_finite:
            raise DataError(f"{layer.key}: holds NaN or infinity")
        layer.zero_weights = num_zeros
    if not layers:
        raise NothingPruned(
            f"nothing to prune: {len(skipped)} weights, all of routed experts that no token reached"
        )
    return layers, skipped


def _looked_at(layers):
    """(whether a weight is finite, how many of its elements are zero) of each layer.

    A GPU is waited for once, not once a layer.
    """
    facts = [None] * len(layers)
    by_device = {}
    for i, layer in enumerate(layers):
        matrix = layer.matrix
        if matrix.device.type == "cpu" and matrix.is_contiguous() and matrix.numel():
            # isfinite() makes temporaries: 218 ms for (4096, 4096) fp32, this 23 (2-core Xeon,
            # busy).
            low, high = torch.aminmax(matrix)
            # As integers without their sign bit; twice as fast as torch.count_nonzero on bf16.
            bits = matrix.view(torch.int16 if matrix.itemsize == 2 else torch.int32).numpy()
            facts[i] = _fact(low.item(), high.item(), np.count_nonzero(bits << 1), matrix)
        else:
            by_device.setdefault(matrix.device, []).append(i)
    for indices in by_device.values():
        found = [_bounds_and_nonzero(layers[i].matrix) for i in indices]
        rows = torch.stack(found).tolist()
        for i, (low, high, nonzero) in zip(indices, rows, strict=True):
            facts[i] = _fact(low, high, nonzero, layers[i].matrix)
    return facts


def _fact(low, high, nonzero, matrix):
    return math.isfinite(low) and math.isfinite(high), matrix.numel() - int(nonzero)


def _bounds_and_nonzero(matrix):
    """(3,) float64 on its device: the smallest and largest element, NaN if any is, and a count."""
    if not matrix.numel():
        return torch.zeros(3, dtype=torch.float64, device=matrix.device)
    bounds = [bound.double() for bound in torch.aminmax(matrix)]
    return torch.stack([*bounds, torch.count_nonzero(matrix).double()])


def _check_all(layers, selection):
    """What the op refuses (overlaps, strides), for all layers before the first one is written."""
    by_device = {}
    for layer in layers:
        by_device.setdefault(layer.matrix.device, []).append(layer.matrix)
    for matrices in by_device.values():
        nothing = [None] * len(matrices)
        _check.prune_lists(matrices, nothing, selection, nothing, nothing, write=True, many=True)


def _calls(layers, scope, together):
    """The layers that one call prunes: compared with each other, or together on a GPU.

    On a CPU each weight is a call, and is timed, unless they are wanted together; a GPU takes all
    of its weights in a few launches.
    """
    if scope == "global":
        return [layers]
    calls = {}
    for i, layer in enumerate(layers):
        device = layer.matrix.device
        alone = device.type == "cpu" and not together
        calls.setdefault(i if alone else device, []).append(layer)
    return list(calls.values())


def _run(layers, selection, score, seed, backend, guard):
    """Select and write, for the layers of one call."""
    start = time.perf_counter()
    names, matrices = [x.key for x in layers], [x.matrix for x in layers]
    scored, norms = matrices, [x.norm for x in layers]
    if score == "random":
        scored = [random_scores(x.key, x.matrix.shape, seed).to(x.matrix.device) for x in layers]
    samples = guard.before(names, scored, norms, matrices) if guard else ()
    masks, thresholds = ops.prune_with_report_(scored, norms, selection, backend=backend)
    if score == "random":
        for matrix, mask in zip(matrices, masks, strict=True):
            ops.apply_mask_(matrix, mask, backend=backend)
    if samples:
        guard.after(samples, matrices, masks, thresholds)
    for layer, mask, threshold in zip(layers, masks, thresholds, strict=True):
        _write_back(layer)
        layer.mask, layer.threshold = mask, threshold
    if len(layers) == 1 and selection.scope != "global":
        layers[0].seconds = time.perf_counter() - start


def _apply_cut(layers, cut, backend):
    """Write what a selection over more weights than these has chosen."""
    for layer in layers:
        layer.mask, layer.threshold = cut.mask(layer.key, layer.matrix), cut.threshold
        ops.apply_mask_(layer.matrix, layer.mask, backend=backend)
        _write_back(layer)


def _write_back(layer):
    if layer.copied:
        layer.saved.copy_(layer.matrix.t() if layer.transposed else layer.matrix)


def _layer_report(layer, selection, ratio):
    rows, columns = layer.matrix.shape
    if selection.scope == "global":
        k = removed = layer.mask.count()
    elif selection.scope == "tensor":
        k = removed = num_pruned(rows * columns, selection)
    else:
        k = num_pruned(columns, selection)
        removed = rows * k
    return LayerReport(
        key=layer.key,
        shape=(rows, columns),
        k=k,
        removed=removed,
        requested=ratio,
        achieved=removed / (rows * columns) if rows * columns else 0.0,
        threshold=None if math.isnan(layer.threshold) else layer.threshold,
        zero_norm_channels=layer.zero_norm_channels,
        zero_weights=layer.zero_weights,
        num_bytes=layer.saved.nbytes,
        seconds=layer.seconds,
    )
