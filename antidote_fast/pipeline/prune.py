"""The prune stage: a folder in, a folder like it out.

A folder is pruned as it is saved: the activation norms are all that a model is needed for, and
with norms from before no model is loaded at all. What is not pruned keeps its bytes.
"""

import time

import torch

from antidote_fast.checkpoint import (
    check_free_space,
    check_output_folder,
    output_folder,
    write_pruned,
)
from antidote_fast.distributed import ALONE
from antidote_fast.errors import DataError
from antidote_fast.loading import first_line, pick_device
from antidote_fast.masks import save_masks
from antidote_fast.pipeline.calibrate import (
    NORMS_FILE,
    calibrate_folder,
    check_ranks,
    counts_of,
    describe_backend,
    inputs_of,
    load_data,
    load_norms,
    open_folders,
    said_by_first,
)
from antidote_fast.pipeline.card import write_card
from antidote_fast.pipeline.config import PruneConfig
from antidote_fast.pipeline.inputs import run_inputs
from antidote_fast.pipeline.stage import read_report, write_report
from antidote_fast.prune import PruneReport, check_base, prune_state_
from antidote_fast.resume import MANIFEST_ENTRY, digest_of, is_finished, run_folder
from antidote_fast.selection import Selection
from antidote_fast.targets import ALL_LINEAR, find_targets, select_keys

MASKS_FILE = "masks.safetensors"


def run(config: PruneConfig, *, progress=False, world=ALONE) -> dict:
    """The prune stage: writes a folder like the one it read, with the report and a model card.

    Args:
        config: what to prune; with ``norms``, or a score that needs no data, no model is loaded.
        progress: as :func:`antidote_fast.progress.track` takes it.
        world: the ranks that share the samples (:func:`antidote_fast.distributed.session`); rank 0
            prunes and writes. The norms are the same on every rank, and so would be the masks.

    Returns:
        The contents of report.json; empty on ranks that do not write.

    Raises:
        DataError, UsageError, NothingPruned, BackendUnavailable: data, a model or an
            adapter that is refused, a value out of range, no weight that matches the targets, a
            backend that cannot run; output_dir is untouched then. PeerFailed: another rank failed.
    """
    return prune_folder(config, progress=progress, world=world)[1]


def prune_folder(config, *, records=None, norms=None, tokenizer=None, progress=False, world=ALONE):
    """(PruneReport, contents of report.json) of pruning a folder into another.

    On the ranks of ``world`` but the first, which writes, it is (None, {}).
    """
    start = time.perf_counter()
    with world.together():
        check_ranks(config, world)
        # A model that is spread over devices may have targets that fit on none of them.
        device = pick_device("cpu" if config.device_map else config.device)
        backend = describe_backend(config.backend, device)
        if not (config.resume or world.rank):
            check_output_folder(config.output_dir, config.overwrite)
        base, adapter = open_folders(config, progress)
        source = adapter or base
        if norms is None and config.norms is not None:
            norms = load_norms(config.norms)
        counts = {}
        if norms is not None:
            check_base(norms, base.fingerprint())
            counts = counts_of(norms)
        elif config.score == "wanda":
            records = load_data(config, records)
        inputs = run_inputs(config, base, adapter, records=records, norms=norms)
        finished = config.resume and not world.rank and is_finished(config.output_dir, inputs)
        if not (finished or world.rank):
            check_output_folder(config.output_dir, config.overwrite)
            check_free_space(config.output_dir, sum(f.stat().st_size for f in source.weight_files))
    if said_by_first(finished, world):
        contents = read_report(config.output_dir) if finished else {}
        return PruneReport.from_dict(contents) if finished else None, contents
    given = {"norms": norms, "counts": counts, "backend": backend, "start": start}
    options = {"tokenizer": tokenizer, "progress": progress}
    entries = {"base_fingerprint": base.fingerprint()} if adapter else {}
    if config.stream:
        with run_folder(
            config.output_dir, inputs, resume=config.resume, overwrite=config.overwrite
        ) as run:
            report, contents, digests = _prune_streamed(
                config, base, adapter, records, run, **given, **options
            )
            run.commit(digests, **entries)
        return report, contents
    if norms is None and config.score == "wanda":
        given["norms"], given["counts"] = calibrate_folder(
            config, base, adapter, records=records, **options, world=world
        )
    with world.together():
        if world.rank:
            return None, {}
        pruned = _prune_read(config, source, given["norms"], device, progress)
        entries[MANIFEST_ENTRY] = digest_of(inputs)
        with output_folder(
            config.output_dir, config.overwrite, progress=progress, **entries
        ) as folder:
            contents = _write(config, source, folder, *pruned, **given, progress=progress)
        return pruned[0], contents


def _prune_streamed(
    config, base, adapter, records, run, *, norms, counts, backend, start, tokenizer, progress
):
    """(PruneReport, contents of report.json, digests known already) of pruning block by block."""
    from antidote_fast.pipeline import stream

    options = {"tokenizer": tokenizer, "progress": progress}
    if adapter is not None:
        if norms is None and config.score == "wanda":
            norms, counts = stream.collect_norms(config, base, adapter, records, run, **options)
        pruned = _prune_read(config, adapter, norms, pick_device(config.device), progress)
        given = {"norms": norms, "counts": counts, "backend": backend, "start": start}
        return pruned[0], _write(config, adapter, run.output, *pruned, **given), None
    keys, roles = [], {}
    if norms is not None or config.score != "wanda":
        keys, roles = _weights_to_prune(config, base, norms)
        if norms is not None and (config.targets is not None or config.ignore):
            chosen = ALL_LINEAR if config.targets is None else config.targets
            keys = select_keys(keys, chosen, config.ignore)
        absent = [key for key in keys if base.find(key) is None]
        if absent:
            raise DataError(f"{base.folder}: has no tensor {absent[0]!r}")
    report, norms, found, digests = stream.prune_model(
        config, base, records, run, norms=norms, keys=keys, roles=roles, **options
    )
    whole = time.perf_counter() - start
    seconds = {"calibrate": max(0.0, whole - report.seconds), "prune": report.seconds}
    counts = {**counts, **found}
    contents = finish(run.output, config, report, norms, counts, backend, seconds)
    return report, contents, digests


def _prune_read(config, source, norms, device, progress=False):
    """(PruneReport, {name: pruned tensor}, when it began) of a folder's weights in memory."""
    keys, roles = _weights_to_prune(config, source, norms)
    weights = {key: tensor.to(device) for key, tensor in source.read(keys, progress).items()}
    calibrated = time.perf_counter()
    report = prune_state_(
        weights,
        norms,
        Selection(config.ratio, scope=config.scope),
        targets=config.targets if norms is not None else None,
        ignore=config.ignore if norms is not None else (),
        score=config.score,
        seed=config.seed,
        backend=config.backend,
        return_masks=config.save_masks,
        cross_check=config.cross_check,
        progress=progress,
        **roles,
    )
    return report, weights, calibrated


def _write(
    config,
    source,
    folder,
    report,
    weights,
    calibrated,
    *,
    norms,
    counts,
    backend,
    start,
    progress=False,
):
    """Write the pruned folder; returns the contents of report.json."""
    pruned = {layer.key: weights[layer.key] for layer in report.layers}
    write_pruned(source, folder, pruned, progress)
    seconds = {"calibrate": calibrated - start, "prune": time.perf_counter() - calibrated}
    return finish(folder, config, report, norms, counts, backend, seconds)


def _weights_to_prune(config, source, norms):
    """(names of the weights, how those are saved that norms would tell of)."""
    if norms is not None:
        return norms.keys, {}
    if source.is_adapter:
        return select_keys(source.tensors, config.targets, config.ignore), {}
    # Which weights are saved transposed only the model's own code knows: build it without memory.
    import transformers

    trust = config.trust_remote_code
    try:
        settings = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=trust)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=trust)
    except Exception as error:  # whatever a foreign config makes transformers raise
        raise DataError(f"{source.folder}: cannot be loaded: {first_line(error)}") from error
    found = find_targets(model, config.targets, config.ignore)
    return [target.key for target in found], {
        "transposed": [target.key for target in found if target.transposed],
        "routed": [target.key for target in found if target.routed],
    }


def finish(folder, config, report, norms, counts, backend, seconds, inputs=None):
    """Norms and masks where asked for, the model card and report.json.

    ``inputs`` are hashes that are known already, as of :func:`hash_inputs`.
    """
    if config.save_norms and norms is not None:
        norms.save(folder / NORMS_FILE)
    if config.save_masks and report.masks is not None:  # else they are there already
        metadata = {"score": report.score, "scope": report.scope, "ratio": str(report.ratio)}
        save_masks(folder / MASKS_FILE, report.masks, metadata)
    write_card(folder, config, report, counts)
    results = {
        **report.to_dict(),
        **counts,
        **backend,
        "seconds": round(sum(seconds.values()), 3),
        "stage_seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    inputs = inputs_of(config) if inputs is None else inputs
    return write_report(folder, "prune", config, results, inputs=inputs)
