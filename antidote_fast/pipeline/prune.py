"""The prune stage: a folder in, a folder like it out.

A folder is pruned as it is saved: the activation norms are all that a model is needed for, and
with norms from before no model is loaded at all. What is not pruned keeps its bytes.
"""

import time
from dataclasses import dataclass, field

import torch

from antidote_fast.bounds import bounded
from antidote_fast.calibrate import ActivationNorms
from antidote_fast.checkpoint import (
    check_free_space,
    check_output_folder,
    output_folder,
    write_pruned,
)
from antidote_fast.distributed import ALONE
from antidote_fast.errors import DataError
from antidote_fast.files import Checkpoint
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
    open_aligned,
    open_folders,
    said_by_first,
)
from antidote_fast.pipeline.card import write_card
from antidote_fast.pipeline.config import PruneConfig
from antidote_fast.pipeline.gate_stage import check_stage, learn_folder
from antidote_fast.pipeline.inputs import run_inputs
from antidote_fast.pipeline.stage import hash_inputs, read_report, write_report
from antidote_fast.prune import PruneReport, check_base, prune_state_
from antidote_fast.resume import MANIFEST_ENTRY, digest_of, is_finished, run_folder
from antidote_fast.safe_open import Watch
from antidote_fast.targets import ALL_LINEAR, find_targets, select_keys

MASKS_FILE = "masks.safetensors"
PRESERVE_NORMS_FILE = "preserve-norms.safetensors"


@dataclass
class Known:
    """What a prune goes by, and what its report says of that.

    Args:
        backend: as :func:`antidote_fast.pipeline.calibrate.describe_backend`.
        norms, counts: the norms, and what the report says of them; None and empty without.
        preserve_norms, preserve_counts: the same of the data to preserve.
        aligned: checkpoint of the model that removed weights fall back to, or None.
        scores, gate_counts: of score gate, as
            :func:`antidote_fast.pipeline.gates.learn_gates` gives them; None and empty without.
    """

    backend: dict
    norms: ActivationNorms | None = None
    counts: dict = field(default_factory=dict)
    preserve_norms: ActivationNorms | None = None
    preserve_counts: dict = field(default_factory=dict)
    aligned: Checkpoint | None = None
    scores: dict[str, torch.Tensor] | None = None
    gate_counts: dict = field(default_factory=dict)

    def take_given(self, config, norms=None, preserve_norms=None):
        """Norms that are there already: in memory, or in the files that the config names."""
        if norms is None and config.norms is not None:
            norms = load_norms(config.norms)
        if preserve_norms is None and config.preserve_norms is not None:
            preserve_norms = load_norms(config.preserve_norms, "preserve_norms")
        if norms is not None:
            self.norms, self.counts = norms, counts_of(norms)
        if preserve_norms is not None:
            self.preserve_norms, self.preserve_counts = preserve_norms, counts_of(preserve_norms)

    def check_base(self, fingerprint):
        """Refuse norms of another base model."""
        for name in ("norms", "preserve_norms"):
            given = getattr(self, name)
            if given is not None:
                check_base(given, fingerprint, name)

    def missing(self, config) -> list[str]:
        """The fields of the config that name data that a model is still to see."""
        learns = config.score == "gate" and self.scores is None
        needed = {
            "dataset": learns or (config.score == "wanda" and self.norms is None),
            "preserve_dataset": learns or (config.preserves and self.preserve_norms is None),
        }
        return [name for name, is_needed in needed.items() if is_needed]

    def take_collected(self, name, norms, counts):
        """Norms that were collected on the data of this field."""
        if name == "dataset":
            self.norms, self.counts = norms, counts
        else:
            self.preserve_norms, self.preserve_counts = norms, counts

    @property
    def named(self) -> ActivationNorms | None:
        """Norms whose names say which weights are pruned, where there are any."""
        return self.preserve_norms if self.norms is None else self.norms

    def entries(self) -> dict:
        """What report.json says of all this."""
        found = {**self.counts, **self.backend}
        if self.preserve_norms is not None:
            found["preserve_data"] = self.preserve_counts
        if self.gate_counts:
            found["gate"] = self.gate_counts
        if self.aligned is not None:
            found["base_model_fingerprint"] = self.aligned.fingerprint()
        return found


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
    from antidote_fast.pipeline import stream

    options = {"tokenizer": tokenizer, "progress": progress}
    if adapter is not None:
        if records is not None:
            found = stream.collect_norms(config, base, adapter, records, run, **options)
            known.take_collected("dataset", *found)
        pruned = _prune_read(config, adapter, known, pick_device(config.device), progress)
        return pruned[0], _write(config, adapter, run.output, *pruned, known, start), None
    keys, roles = [], {}
    if records is None:
        keys, roles = weights_to_prune(config, base, known.named)
        absent = [key for key in keys if base.find(key) is None]
        if absent:
            raise DataError(f"{base.folder}: has no tensor {absent[0]!r}")
    report, norms, found, digests = stream.prune_model(
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
        known.norms,
        config.selection,
        targets=config.targets if known.named is not None else None,
        ignore=config.ignore if known.named is not None else (),
        score=config.score,
        seed=config.seed,
        backend=config.backend,
        return_masks=config.save_masks,
        cross_check=config.cross_check,
        preserve_norms=known.preserve_norms,
        base_weights=bases,
        scores=known.scores,
        progress=progress,
        **roles,
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


def weights_to_prune(config, source, named):
    """(names of the weights, how those are saved), by norms that name them or by the targets."""
    if named is not None:
        keys = named.keys
        if config.targets is not None or config.ignore:
            chosen = ALL_LINEAR if config.targets is None else config.targets
            keys = select_keys(keys, chosen, config.ignore)
        return keys, {"transposed": sorted(named.transposed), "routed": sorted(named.routed)}
    if source.is_adapter:
        return select_keys(source.tensors, config.targets, config.ignore), {}
    # Which weights are saved transposed only the model's own code knows: build it without memory.
    import transformers

    trust = config.trust_remote_code
    try:
        settings = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=trust)
        with torch.device("meta"), bounded(source):
            model = transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=trust)
    except DataError:
        raise
    except Exception as error:  # whatever a foreign config makes transformers raise
        raise DataError(f"{source.folder}: cannot be loaded: {first_line(error)}") from error
    found = find_targets(model, config.targets, config.ignore)
    return [target.key for target in found], {
        "transposed": [target.key for target in found if target.transposed],
        "routed": [target.key for target in found if target.routed],
    }


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
