"""A model, or tensors as saved: evidence and a selection become masks, weights and a report.

Source: Antidote, arXiv 2408.09600. What weights are ordered by is a score, one module each in
:mod:`antidote_fast.pruning.scores`.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

import torch

from antidote_fast import backends, ops
from antidote_fast.config.scores import SCORES
from antidote_fast.distributed.fsdp import add_up, local_rows, reshard
from antidote_fast.errors import DataError, NothingPruned, UsageError
from antidote_fast.files.fingerprint import fingerprint_model
from antidote_fast.models.targets import ALL_LINEAR, coverage, find_targets, select_keys
from antidote_fast.models.undo import without_grad
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.cross_check import CrossCheck, check_live
from antidote_fast.pruning.evidence import Evidence, check_base, check_keys
from antidote_fast.pruning.global_cut import GlobalCut
from antidote_fast.pruning.layers import Layer, check_all, prepare, remove_all
from antidote_fast.pruning.report import LayerReport, PruneReport
from antidote_fast.pruning.scores import score_module
from antidote_fast.selection import Selection, num_pruned
from antidote_fast.system.progress import track


def prune_model_(
    model: torch.nn.Module,
    norms: Evidence | ActivationNorms | None,
    selection: Selection,
    *,
    targets: str | Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    score: str = "wanda",
    seed: int = 0,
    backend: str | None = None,
    return_masks: bool = False,
    cross_check: bool = True,
    preserve_norms: ActivationNorms | None = None,
    base_weights: Mapping[str, torch.Tensor] | None = None,
    scores: Mapping[str, torch.Tensor] | None = None,
) -> PruneReport:
    """Prune a live model's targets in place, once.

    What is removed is chosen for all weights before the first one is written, as masks of one bit a
    weight. So an exception (Ctrl-C, no memory) leaves the model as it was, or, if it comes while
    the masks are applied, with all of its targets pruned: it is raised once they are.

    Of a model that FSDP2 shards each rank prunes the rows it holds (row scope), with norms that are
    the same on all ranks; every rank must call. The report is then that of whole weights and the
    same everywhere; masks are those of this rank's rows.

    Args:
        model: a transformers model, or a PEFT model (its active LoRA adapter is pruned).
        norms: :class:`ActivationNorms` of this model's targets; None for scores without data. Or an
            :class:`Evidence`, which holds ``score``, ``preserve_norms``, ``base_weights`` and
            ``scores`` as well.
        selection: a :class:`Selection`; ``scope="global"`` compares over all targets.
        targets, ignore: as :func:`antidote_fast.models.targets.find_targets`. Where given, the
            norms may hold more weights than they name.
        seed: of the random score.
        backend: as in :mod:`antidote_fast.ops`.
        return_masks: keep the masks in the report.
        cross_check: compare a few rows of the first weight of each shape with the reference
            (:mod:`antidote_fast.pruning.cross_check`).
        score, preserve_norms, base_weights, scores: as :class:`Evidence` says.

    Raises:
        AntidoteError: the backend does not select what the reference does, or does not write what
            it selected; a device that failed while weights were written, with those that are done.
        DataError: norms of another base or of other weights, NaN or infinity in a weight, norms
            of a layer that are all zero; a weight sharded otherwise than by rows; a base weight
            that is not there, of another shape, or whose values the weight's dtype cannot hold; a
            score matrix that is not there or is not as above. All is checked before the first
            write.
        UsageError, NothingPruned: as find_targets; an unknown score; a scope or score that sharded
            weights cannot be pruned by; a selection that needs norms or weights that are not given.
        PeerFailed: another rank refused.
    """
    evidence = Evidence.of(
        norms, score=score, preserve_norms=preserve_norms, base_weights=base_weights, scores=scores
    )
    evidence.check(selection, seed)
    reshard(model)
    to_prune = find_targets(model, targets, ignore)
    actual = fingerprint_model(model) if evidence.named_norms else None
    for name, collected in evidence.named_norms.items():
        check_base(collected, actual, name)
    by_rows = [name for name, declared in SCORES.items() if not declared.own_matrix]
    weights, world = local_rows(to_prune, evidence, selection, by_rows)
    masked = {target.key: target for target in to_prune if target.masked}
    if masked and (evidence.base_weights is not None or world.size > 1):
        what = "sharded" if evidence.base_weights is None else "pruned with base_weights"
        raise DataError(
            f"{next(iter(masked))}: is masked by torch.nn.utils.prune, and cannot be {what}; make "
            "it permanent first (torch.nn.utils.prune.remove)"
        )
    weights |= {key: target.computed() for key, target in masked.items()}
    if targets is not None or ignore:
        evidence = evidence.narrowed([target.key for target in to_prune])
    evidence = replace(
        evidence,
        transposed={target.key for target in to_prune if target.transposed},
        routed={target.key for target in to_prune if target.routed},
    )
    with world.together():
        if cross_check:
            check_live(to_prune, weights)
        guard = CrossCheck(selection, backend, cross_check)
        layers, report = _choose(weights, evidence, selection, seed, guard)
    for layer in layers:
        layer.masked = masked.get(layer.key)
    with world.together():
        _remove(layers, report, guard, return_masks)
        if cross_check:
            check_live(to_prune, weights)
    report = add_up(report, to_prune, world)
    report.coverage = asdict(coverage(model, to_prune))
    return report


def prune_state_(
    weights: Mapping[str, torch.Tensor],
    evidence: Evidence | ActivationNorms | None,
    selection: Selection,
    *,
    targets: str | Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    seed: int = 0,
    backend: str | None = None,
    return_masks: bool = False,
    cross_check: bool = True,
    together: bool = False,
    cut: GlobalCut | None = None,
    progress: bool = False,
) -> PruneReport:
    """Prune tensors as saved, in place, with no model and no forward.

    Args:
        weights: {parameter name: (out, in) tensor, bf16, fp16 or fp32}; (in, out) for those that
            ``evidence.transposed`` names.
        evidence: an :class:`Evidence` of the same names; or :class:`ActivationNorms` alone, for
            score wanda.
        targets, ignore: prune these of the weights only (by name, as
            :func:`antidote_fast.models.targets.select_keys`; ``targets=None`` is all of them).
        together: prune all weights in one call on a CPU too, as on a GPU; less time for many small
            ones, and then no time of each.
        cut: for global scope, the :class:`antidote_fast.pruning.global_cut.GlobalCut` of all
            weights of which these are some; found with these preserve norms, where there are any.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        selection, seed, backend, return_masks, cross_check: as :func:`prune_model_`.

    Raises:
        AntidoteError: as :func:`prune_model_`; nothing is written then.
    """
    evidence = Evidence.of(evidence)
    evidence.check(selection, seed)
    if targets is not None or ignore:
        keys = select_keys(weights, ALL_LINEAR if targets is None else targets, ignore)
        evidence = evidence.narrowed(keys)
        weights = {key: weights[key] for key in keys}
    guard = CrossCheck(selection, backend, cross_check)
    layers, report = _choose(weights, evidence, selection, seed, guard, together, cut, progress)
    _remove(layers, report, guard, return_masks)
    return report


@without_grad
def _choose(weights, evidence, selection, seed, guard, together=False, cut=None, progress=False):
    """(layers with masks, a report that lacks them): what is done before the first write."""
    start = time.perf_counter()
    declared = SCORES[evidence.score]
    if cut is not None and declared.learner is not None:
        raise UsageError(f"cut: must be left out where score={evidence.score!r}")
    if not weights:
        raise NothingPruned("nothing to prune: no weights")
    for name, norms in evidence.named_norms.items():
        check_keys(weights, norms.sq_sum, name)
    layers, skipped = prepare(weights, evidence, selection.scope)
    kernels = {backends.select(guard.backend, layer.matrix.device.type).NAME for layer in layers}
    check_all(layers, selection)
    for call in track(_calls(layers, selection.scope, together), "prune", progress):
        if cut is None:
            _select(call, evidence, selection, seed, guard)
            continue
        for layer in call:
            layer.mask = cut.mask(layer.key, layer.matrix, layer.base)
            layer.threshold = cut.threshold
    ratio = selection.ratio if selection.n_m is None else selection.n_m[0] / selection.n_m[1]
    report = PruneReport(
        score=evidence.score,
        scope=selection.scope,
        ratio=ratio,
        largest=selection.largest,
        n_m=selection.n_m,
        seed=seed,
        backend="+".join(sorted(kernels)),
        layers=[],
        skipped=skipped,
        seconds=time.perf_counter() - start,
        preserve_ratio=None if evidence.preserve_norms is None else selection.preserve.ratio,
        score_delta=selection.score_delta,
        reverted=evidence.base_weights is not None,
    )
    return layers, report


@without_grad
def _remove(layers, report, guard, return_masks):
    """Apply the masks, and fill in the report."""
    start = time.perf_counter()
    remove_all(layers, guard.backend)
    guard.written()
    report.layers = [_layer_report(layer, guard.selection, report.ratio) for layer in layers]
    report.masks = {layer.key: layer.mask for layer in layers} if return_masks else None
    report.seconds += time.perf_counter() - start


def _calls(layers, scope, together):
    """The layers that one call prunes: compared with each other, or together on a GPU.

    On a CPU each weight is a call, and is timed, unless they are wanted together; a GPU takes all
    of its weights in a few launches.
    """
    if scope == "global":
        return [layers]
    calls: dict[int | torch.device, list[Layer]] = {}
    for i, layer in enumerate(layers):
        device = layer.matrix.device
        alone = device.type == "cpu" and not together
        calls.setdefault(i if alone else device, []).append(layer)
    return list(calls.values())


def _select(layers, evidence, selection, seed, guard):
    """Choose what is removed, for the layers of one call."""
    start = time.perf_counter()
    scored = matrices = [x.matrix for x in layers]
    if SCORES[evidence.score].own_matrix:
        rows_of = score_module(evidence.score).row_scores
        scored = [
            rows_of(x.key, x.matrix, evidence, seed)(0, len(x.matrix)).to(x.matrix.device)
            for x in layers
        ]
    samples = guard.before(layers, scored)
    masks, thresholds = ops.prune_with_report_(
        scored,
        [x.norm for x in layers],
        selection,
        preserve_norms=[x.preserve_norm for x in layers],
        base_weights=[x.base for x in layers] if scored is matrices else None,
        write=False,
        backend=guard.backend,
    )
    for layer, mask, threshold in zip(layers, masks, thresholds, strict=True):
        layer.mask, layer.threshold = mask, threshold
    guard.selected(samples, layers)
    if len(layers) == 1 and selection.scope != "global":
        layers[0].seconds = time.perf_counter() - start


def _layer_report(layer, selection, ratio):
    rows, columns = layer.matrix.shape
    preserving = layer.preserve_norm is not None
    if selection.scope == "global":  # how many of a weight were selected, nothing tells
        k = removed = layer.mask.count()
        preserved = None if preserving else 0
    else:
        whole = selection.scope == "tensor"
        k = num_pruned(rows * columns if whole else columns, selection)
        selected = k if whole else rows * k
        removed = layer.mask.count() if preserving else selected
        preserved = selected - removed
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
        preserved=preserved,
        zero_preserve_channels=layer.zero_preserve_channels,
    )
