"""The prune stage: a folder in, a folder like it out.

A folder is pruned as it is saved: the activation norms are all that a model is needed for, and
with norms from before no model is loaded at all. What is not pruned keeps its bytes.
"""

import time

from antidote_fast.config.prune import PruneConfig
from antidote_fast.distributed.ranks import ALONE
from antidote_fast.errors import DataError
from antidote_fast.files.commit import (
    check_free_space,
    check_output_folder,
    digest_of,
    output_folder,
)
from antidote_fast.files.provenance import hash_inputs, read_report, run_inputs, write_report
from antidote_fast.files.pruned_copy import write_pruned
from antidote_fast.files.resume import MANIFEST_ENTRY, is_finished, run_folder
from antidote_fast.files.safe_open import Watch
from antidote_fast.masks import save_masks
from antidote_fast.models.loading import pick_device
from antidote_fast.pruning.prune import prune_state_
from antidote_fast.pruning.report import PruneReport
from antidote_fast.stages.evidence import Known, weights_to_prune
from antidote_fast.stages.gates.stage import check_stage, learn_folder
from antidote_fast.stages.inputs import (
    NORMS_FILE,
    calibrate_folder,
    check_ranks,
    describe_backend,
    inputs_of,
    load_data,
    open_aligned,
    open_folders,
    said_by_first,
)
from antidote_fast.stages.model_card import write_card

MASKS_FILE = "masks.safetensors"
PRESERVE_NORMS_FILE = "preserve-norms.safetensors"


def run(config: PruneConfig, *, progress=False, world=ALONE) -> dict:
    """The prune stage: writes a folder like the one it read, with the report and a model card.

    Args:
        config: what to prune; with ``norms``, or a score that needs no data, no model is loaded.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        world: the ranks that share the samples (:func:`antidote_fast.distributed.session`);
            rank 0
            prunes and writes. The norms are the same on every rank, and so would be the masks.

    Returns:
        The contents of report.json; empty on ranks that do not write.

    Raises:
        DataError, UsageError, NothingPruned, BackendUnavailable: data, a model or an
            adapter that is refused, a value out of range, no weight that matches the targets, a
            backend that cannot run; output_dir is untouched then. PeerFailed: another rank failed.
    """
    return prune_folder(config, progress=progress, world=world)[1]


def prune_folder(
    config,
    *,
    records=None,
    norms=None,
    preserve_records=None,
    preserve_norms=None,
    tokenizer=None,
    progress=False,
    world=ALONE,
):
    """(PruneReport, contents of report.json) of pruning a folder into another.

    On the ranks of ``world`` but the first, which writes, it is (None, {}).
    """
    start = time.perf_counter()
    with world.together():
        check_ranks(config, world)
        watch = Watch(*inputs_of(config))
        # A model that is spread over devices may have targets that fit on none of them.
        device = pick_device("cpu" if config.device_map else config.device)
        known = Known(describe_backend(config.backend, device))
        if not (config.resume or world.rank):
            check_output_folder(config.output_dir, config.overwrite)
        base, adapter = open_folders(config, progress)
        check_stage(config, base, adapter is not None, world)
        source = adapter or base
        shapes = {name: entry.shape for name, entry in base.tensors.items()}
        known.aligned = open_aligned(config, shapes, base.config.get("model_type"), progress)
        known.take_given(config, norms, preserve_norms)
        if known.named is not None:
            known.check_base(base.fingerprint())
        given = {"dataset": records, "preserve_dataset": preserve_records}
        sets = {name: load_data(config, given[name], name) for name in known.missing(config)}
        inputs = inputs_for(config, base, adapter, known, sets)
        finished = config.resume and not world.rank and is_finished(config.output_dir, inputs)
        if not (finished or world.rank):
            if config.resume:
                check_output_folder(config.output_dir, config.overwrite)
            check_free_space(config.output_dir, sum(f.stat().st_size for f in source.weight_files))
    if said_by_first(finished, world):
        contents = read_report(config.output_dir) if finished else {}
        return PruneReport.from_dict(contents) if finished else None, contents
    options = {"tokenizer": tokenizer, "progress": progress}
    entries = {"base_fingerprint": base.fingerprint()} if adapter else {}
    if config.stream:
        with run_folder(
            config.output_dir, inputs, resume=config.resume, overwrite=config.overwrite
        ) as run:
            report, contents, digests = _prune_streamed(
                config, base, adapter, sets.get("dataset"), run, known, start, **options
            )
            watch.check()
            run.commit(digests, **entries)
        return report, contents
    if config.score == "gate":
        found = learn_folder(config, base, adapter, known.aligned, sets, **options)
        known.scores, known.gate_counts = found
    elif sets:
        made = calibrate_folder(config, base, adapter, sets, **options, world=world)
        for name, found in zip(sets, made, strict=True):
            known.take_collected(name, *found)
    with world.together():
        if world.rank:
            return None, {}
        pruned = _prune_read(config, source, known, device, progress)
        entries[MANIFEST_ENTRY] = digest_of(inputs)
        with output_folder(
            config.output_dir, config.overwrite, progress=progress, **entries
        ) as folder:
            contents = _write(config, source, folder, *pruned, known, start, progress)
            watch.check()
        return pruned[0], contents


def inputs_for(config, base, adapter, known, sets) -> dict:
    """What decides a prune's result: :func:`run_inputs` of what is given and what is collected."""
    return run_inputs(
        config,
        base,
        adapter,
        records=sets.get("dataset"),
        norms=known.norms,
        preserve_records=sets.get("preserve_dataset"),
        preserve_norms=known.preserve_norms,
        aligned=known.aligned,
    )


def _prune_streamed(config, base, adapter, records, run, known, start, *, tokenizer, progress):
    """(PruneReport, contents of report.json, digests known already) of pruning block by block."""
    from antidote_fast.streaming import job

    options = {"tokenizer": tokenizer, "progress": progress}
    if adapter is not None:
        if records is not None:
            found = job.collect_norms(config, base, adapter, records, run, **options)
            known.take_collected("dataset", *found)
        pruned = _prune_read(config, adapter, known, pick_device(config.device), progress)
        return pruned[0], _write(config, adapter, run.output, *pruned, known, start), None
    keys, roles = [], {}
    if records is None:
        keys, roles = weights_to_prune(config, base, known.named)
        absent = [key for key in keys if base.find(key) is None]
        if absent:
            raise DataError(f"{base.folder}: has no tensor {absent[0]!r}")
    report, norms, found, digests = job.prune_model(
        config,
        base,
        records,
        run,
        norms=known.norms,
        keys=keys,
        roles=roles,
        preserve_norms=known.preserve_norms,
        aligned=known.aligned,
        **options,
    )
    whole = time.perf_counter() - start
    seconds = {"calibrate": max(0.0, whole - report.seconds), "prune": report.seconds}
    known.take_collected("dataset", norms, {**known.counts, **found})
    return report, finish(run.output, config, report, known, seconds), digests


def _prune_read(config, source, known, device, progress=False):
    """(PruneReport, {name: pruned tensor}, when it began) of a folder's weights in memory."""
    keys, roles = weights_to_prune(config, source, known.named)
    weights = {key: tensor.to(device) for key, tensor in source.read(keys, progress).items()}
    bases = None if known.aligned is None else known.aligned.read(keys, progress)
    calibrated = time.perf_counter()
    report = prune_state_(
        weights,
        known.evidence(config.score, bases, **roles),
        config.selection,
        targets=config.targets if known.named is not None else None,
        ignore=config.ignore if known.named is not None else (),
        seed=config.seed,
        backend=config.backend,
        return_masks=config.save_masks,
        cross_check=config.cross_check,
        progress=progress,
    )
    return report, weights, calibrated


def _write(config, source, folder, report, weights, calibrated, known, start, progress=False):
    """Write the pruned folder; returns the contents of report.json."""
    pruned = {layer.key: weights[layer.key] for layer in report.layers}
    write_pruned(source, folder, pruned, progress)
    seconds = {"calibrate": calibrated - start, "prune": time.perf_counter() - calibrated}
    hashed = source.digests() if source.is_adapter else None
    inputs = hash_inputs(inputs_of(config), hashed)
    return finish(folder, config, report, known, seconds, inputs)


def finish(folder, config, report, known, seconds, inputs=None):
    """Norms and masks where asked for, the model card and report.json.

    ``inputs`` are hashes that are known already, as of :func:`hash_inputs`.
    """
    if config.save_norms:
        for given, name in (
            (known.norms, NORMS_FILE),
            (known.preserve_norms, PRESERVE_NORMS_FILE),
        ):
            if given is not None:
                given.save(folder / name)
    if config.save_masks and report.masks is not None:  # else they are there already
        metadata = {"score": report.score, "scope": report.scope, "ratio": str(report.ratio)}
        save_masks(folder / MASKS_FILE, report.masks, metadata)
    about = (known.counts, known.preserve_counts, known.gate_counts)
    write_card(folder, config, report, *about)
    results = {
        **report.to_dict(),
        **known.entries(),
        "seconds": round(sum(seconds.values()), 3),
        "stage_seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    inputs = inputs_of(config) if inputs is None else inputs
    return write_report(folder, "prune", config, results, inputs=inputs)
