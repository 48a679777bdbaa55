"""The prune stage: a folder in, a folder like it out.

A folder is pruned as it is saved: the activation norms are all that a model is needed for, and
with norms from before no model is loaded at all. What is not pruned keeps its bytes.
"""

import dataclasses
import time
from typing import Any

from antidote_fast.config.prune import PruneConfig
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import DataError
from antidote_fast.files.provenance import hash_inputs, input_files, read_report, write_report
from antidote_fast.files.pruned_copy import write_pruned
from antidote_fast.masks import save_masks
from antidote_fast.pruning.report import PruneReport
from antidote_fast.stages.evidence import gather, prune_weights, read_weights, weights_to_prune
from antidote_fast.stages.inputs import NORMS_FILE, Inputs, open_inputs
from antidote_fast.stages.model_card import write_card

MASKS_FILE = "masks.safetensors"
PRESERVE_NORMS_FILE = "preserve-norms.safetensors"


def run(config: PruneConfig, *, progress: Any = False, world: World = ALONE) -> dict:
    """The prune stage: writes a folder like the one it read, with the report and a model card.

    Args:
        config: what to prune; with ``norms``, or a score that needs no data, no model is loaded.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        world: the ranks that share the samples; rank 0 prunes and writes.

    Returns:
        The contents of report.json; empty on ranks that do not write.

    Raises:
        DataError, UsageError, NothingPruned, BackendUnavailable: data, a model or an
            adapter that is refused, a value out of range, no weight that matches the targets, a
            backend that cannot run; output_dir is untouched then. PeerFailed: another rank failed.
    """
    return prune_folder(config, progress=progress, world=world)[1]


def prune_folder(
    config: PruneConfig,
    in_memory: dict[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    progress: Any = False,
    world: World = ALONE,
) -> tuple[PruneReport | None, dict]:
    """(PruneReport, contents of report.json) of pruning a folder into another.

    On the ranks of ``world`` but the first, which writes, it is (None, {}). Arguments and errors
    are those of :func:`antidote_fast.stages.inputs.open_inputs` and :func:`run`.
    """
    inputs = open_inputs(config, in_memory, tokenizer=tokenizer, progress=progress, world=world)
    if inputs.is_whole(room=inputs.source.file_bytes):
        contents = {} if world.rank else read_report(config.output_dir)
        return None if world.rank else PruneReport.from_dict(contents), contents
    if config.stream:
        with inputs.run_folder() as run:
            report = _prune_in_blocks(inputs, run)
            return report, finish(run.output, inputs, report)
    gather(inputs)
    with world.together():
        if world.rank:
            return None, {}
        weights = read_weights(inputs)
        report = prune_weights(inputs, weights)
        with inputs.output_folder(progress) as folder:
            write_pruned(inputs.source, folder, pruned_of(weights, report), progress)
            return report, finish(folder, inputs, report)


def _prune_in_blocks(inputs, run):
    """The report of pruning into ``run.output`` what does not fit in memory."""
    from antidote_fast.streaming import job

    base = inputs.base
    if inputs.adapter is not None:  # which does fit; the model that it is on does not
        gather(inputs, run)
        weights = read_weights(inputs)
        report = prune_weights(inputs, weights)
        write_pruned(inputs.adapter, run.output, pruned_of(weights, report))
        return report
    keys: list[str] = []
    evidence = inputs.evidence
    if not inputs.records:
        keys, roles = weights_to_prune(inputs.config, base, inputs.naming_norms)
        absent = [key for key in keys if base.find(key) is None]
        if absent:
            raise DataError(f"{base.folder}: has no tensor {absent[0]!r}")
        evidence = dataclasses.replace(evidence, **roles)
    about = (inputs.config, base, inputs.records.get("dataset"), run, evidence)
    options = {"tokenizer": inputs.given_tokenizer, "progress": inputs.progress}
    report, norms, counts, run.digests = job.prune_model(
        *about, keys=keys, aligned=inputs.aligned, **options
    )
    inputs.pruned_from = max(inputs.begun, time.perf_counter() - report.seconds)
    inputs.add_norms("dataset", norms, inputs.counts.get("dataset", {}) | counts)
    return report


def pruned_of(weights: dict, report: PruneReport) -> dict:
    """The tensors, of those that were to be pruned, of which weights are removed."""
    return {layer.key: weights[layer.key] for layer in report.layers}


def finish(folder: Any, inputs: Inputs, report: PruneReport, hashes: dict | None = None) -> dict:
    """Write norms and masks where asked for, the model card and report.json; returns what is in it.

    ``hashes`` are of the files that were read, as of :func:`hash_inputs`, where they are known.
    """
    config, counts = inputs.config, inputs.counts
    seconds = {
        "calibrate": inputs.pruned_from - inputs.begun,
        "prune": time.perf_counter() - inputs.pruned_from,
    }
    if config.save_norms:
        files = {"norms": NORMS_FILE, "preserve_norms": PRESERVE_NORMS_FILE}
        for name, norms in inputs.evidence.named_norms.items():
            norms.save(folder / files[name])
    if config.save_masks and report.masks is not None:  # else they are there already
        metadata = {"score": report.score, "scope": report.scope, "ratio": str(report.ratio)}
        save_masks(folder / MASKS_FILE, report.masks, metadata)
    report.data = inputs.data
    write_card(folder, config, report, counts)
    named = {"preserve_dataset": "preserve_data", "gate": "gate"}
    results = {
        **report.to_dict(),
        **counts.get("dataset", {}),
        **inputs.backend,
        **{entry: counts[name] for name, entry in named.items() if name in counts},
        "seconds": round(sum(seconds.values()), 3),
        "stage_seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    if inputs.aligned is not None:
        results["aligned_model_fingerprint"] = inputs.aligned.fingerprint()
    if hashes is None:
        read = inputs.adapter.digests() if inputs.adapter is not None else None
        hashes = hash_inputs(input_files(config), read)
    return write_report(folder, "prune", config, results, inputs=hashes)
