"""The calibrate stage, and what calibration and pruning share: folders, data, norms."""

import os
import time
from pathlib import Path

from antidote_fast import backends
from antidote_fast.calibrate import ActivationNorms
from antidote_fast.checkpoint import (
    check_adapter,
    check_copied,
    check_not_quantized,
    check_output_folder,
    load_adapter,
    load_model,
    load_tokenizer,
    open_checkpoint,
    output_folder,
    resolve_folder,
)
from antidote_fast.distributed import ALONE, World
from antidote_fast.errors import DataError, UsageError
from antidote_fast.fingerprint import block_name
from antidote_fast.loading import pick_device
from antidote_fast.pipeline.config import CalibrateConfig
from antidote_fast.pipeline.data import load_records, local_file, make_batches
from antidote_fast.pipeline.estimate import check_memory
from antidote_fast.pipeline.inputs import run_inputs
from antidote_fast.pipeline.stage import read_report, write_report
from antidote_fast.resume import MANIFEST_ENTRY, digest_of, is_finished, run_folder
from antidote_fast.safe_open import Watch
from antidote_fast.targets import natural_key
from antidote_fast.tokens import fitted, vocab_size
from antidote_fast.verify import check_input

NORMS_FILE = "norms.safetensors"


def run(config: CalibrateConfig, *, progress=False, world=ALONE) -> dict:
    """The calibrate stage: writes ``norms.safetensors``, which serves any later selection.

    Args:
        config: the model, the adapter and the data.
        progress: as :func:`antidote_fast.progress.track` takes it.
        world: the ranks that share the samples (:func:`antidote_fast.distributed.session`); rank 0
            writes.

    Returns:
        The contents of report.json; empty on ranks that do not write.

    Raises:
        DataError, UsageError, NothingPruned: data, a model or an adapter that is refused, or no
            weight that matches the targets; output_dir is untouched then.
    """
    start = time.perf_counter()
    with world.together():
        check_ranks(config, world)
        watch = Watch(*inputs_of(config))
        if not (config.resume or world.rank):
            check_output_folder(config.output_dir, config.overwrite)
        backend = describe_backend(None, pick_device(config.device))
        base, adapter = open_folders(config, progress)
        records = load_data(config, None)
        inputs = run_inputs(config, base, adapter, records=records)
        finished = config.resume and not world.rank and is_finished(config.output_dir, inputs)
        if config.resume and not (finished or world.rank):
            check_output_folder(config.output_dir, config.overwrite)
    if said_by_first(finished, world):
        return read_report(config.output_dir) if finished else {}
    if config.stream:
        about = watch, backend, start
        return _run_streamed(config, base, adapter, records, inputs, about, progress)
    [(norms, counts)] = calibrate_folder(
        config, base, adapter, {"dataset": records}, progress=progress, world=world
    )
    with world.together():
        if world.rank:
            return {}
        entries = {MANIFEST_ENTRY: digest_of(inputs)}
        with output_folder(config.output_dir, config.overwrite, **entries) as folder:
            report = _write(config, folder, norms, {**counts, **backend}, start)
            watch.check()
        return report


def _run_streamed(config, base, adapter, records, inputs, about, progress):
    from antidote_fast.pipeline import stream

    watch, backend, start = about

    with run_folder(
        config.output_dir, inputs, resume=config.resume, overwrite=config.overwrite
    ) as run:
        norms, counts = stream.collect_norms(config, base, adapter, records, run, progress=progress)
        report = _write(config, run.output, norms, {**counts, **backend}, start)
        watch.check()
        run.commit()
    return report


def _write(config, folder, norms, about, start):
    norms.save(folder / NORMS_FILE)
    results = {"seconds": round(time.perf_counter() - start, 3), **about}
    return write_report(folder, "calibrate", config, results, inputs=inputs_of(config))


def check_ranks(config, world):
    """Refuse what several processes cannot share."""
    if world.size > 1 and config.stream:
        raise UsageError(
            "stream=True: must be left out with torchrun; one process streams a model through one "
            "device"
        )
    if world.size > 1 and config.device_map is not None:
        raise UsageError(
            f"device_map={config.device_map!r}: must be left out with torchrun, which gives each "
            "rank a GPU of its own; start one process"
        )


def said_by_first(value, world) -> bool:
    """What rank 0, which alone looks at the output, found to be so."""
    return world.gather("yes" if value else "no")[0] == "yes"


def open_folders(config, progress=False):
    """(base, adapter or None), checked by their headers, hashes and what lies beside the weights.

    No weights are loaded.
    """
    base = open_checkpoint(
        resolve_folder(config.model_name_or_path), trust_remote_code=config.trust_remote_code
    )
    if base.is_adapter:
        raise DataError(
            f"model_name_or_path={config.model_name_or_path!r}: is a PEFT adapter; give its base "
            "model, and this folder as adapter"
        )
    check_input(base.folder, progress)
    if config.adapter is None:
        check_not_quantized(base)
        check_copied(base)
        return base, None
    adapter = open_checkpoint(resolve_folder(config.adapter, "adapter"))
    if not adapter.is_adapter:
        raise DataError(
            f"adapter={config.adapter!r}: is a whole model, not an adapter; give it as "
            "model_name_or_path, without adapter"
        )
    check_copied(adapter)
    check_adapter(adapter, base)
    return base, adapter


def open_aligned(config, shapes, model_type, progress=False):
    """Checkpoint of ``config.base_model``, checked by its headers and hashes; None without one.

    Args:
        config: a :class:`PruneConfig`.
        shapes: {parameter name: shape} of the model to prune, whose blocks must be as its.
        model_type: that of the model's config.
        progress: as :func:`antidote_fast.progress.track` takes it.

    Raises:
        DataError: no such model, an adapter, a quantised model, or another architecture; the
            message names the first tensor that differs.
    """
    if config.base_model is None:
        return None
    where = f"base_model={config.base_model!r}"
    aligned = open_checkpoint(
        resolve_folder(config.base_model, "base_model"), trust_remote_code=config.trust_remote_code
    )
    if aligned.is_adapter:
        raise DataError(f"{where}: is a PEFT adapter; give a whole model")
    check_not_quantized(aligned)
    check_input(aligned.folder, progress)
    theirs = aligned.config.get("model_type")
    if theirs != model_type:
        raise DataError(f"{where}: is a {theirs} model, and the one to prune is {model_type}")
    ours = _block_shapes(shapes)
    found = _block_shapes({name: entry.shape for name, entry in aligned.tensors.items()})
    for name in sorted(ours.keys() | found.keys(), key=natural_key):
        if ours.get(name) != found.get(name):
            raise DataError(
                f"{where}: has {name!r} as {found.get(name, 'no tensor')}, and the model to prune "
                f"as {ours.get(name, 'no tensor')}"
            )
    return aligned


def _block_shapes(shapes):
    named = {block_name(name): tuple(shape) for name, shape in shapes.items() if len(shape) == 2}
    return {name: shape for name, shape in named.items() if name is not None}


def calibrate_folder(config, base, adapter, sets, *, tokenizer=None, progress=False, world=ALONE):
    """[(norms, what the report says of them)] of several data sets, from folders.

    Args:
        config: a :class:`CalibrateConfig` or :class:`PruneConfig`.
        base, adapter: checkpoints of :func:`open_folders`.
        sets: {field of the config that names them: records, or None to load them}; all are checked
            before weights load.
        tokenizer: instead of the base's own.
        progress: as :func:`antidote_fast.progress.track` takes it.
        world: the ranks that share each data set's batches.
    """
    with world.together():
        sets = [load_data(config, records, name) for name, records in sets.items()]
        trust = config.trust_remote_code
        tokenizer = tokenizer or load_tokenizer(base.folder, trust_remote_code=trust)
        batches = [batches_of(config, records, tokenizer, base.config) for records in sets]
        check_memory(config, [base, adapter])
        model = load_model(
            base.folder,
            dtype=config.dtype,
            device=config.device,
            device_map=config.device_map,
            trust_remote_code=trust,
        )
        if adapter is not None:
            model = load_adapter(model, adapter)
        # Weights that accelerate keeps elsewhere cannot be looked at; the files can.
        offloaded = any(parameter.is_meta for parameter in model.parameters())
        fingerprint = base.fingerprint() if offloaded else None
    return [
        collect(
            config,
            model,
            records,
            tokenizer,
            batches=made,
            progress=progress,
            world=world,
            fingerprint=fingerprint,
        )
        for records, made in zip(sets, batches, strict=True)
    ]


def collect(
    config,
    model,
    records,
    tokenizer,
    *,
    batches=None,
    progress=False,
    world=ALONE,
    fingerprint=None,
):
    """(norms, what the report says of them) of a live model, each rank on batches of its own."""
    with world.together():
        if batches is None:
            model_config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
            batches = batches_of(config, records, tokenizer, model_config)
    norms = ActivationNorms.collect(
        model,
        world.shard(batches),
        targets=config.targets,
        ignore=config.ignore,
        response_only=config.response_only,
        aggregation=config.aggregation,
        progress=progress,
        fingerprint=fingerprint,
        backend=getattr(config, "backend", None),
        world=world,
    )
    counts = {
        **counts_of(norms),
        "num_records": len(records),
        "num_dropped": batches.num_dropped,
        "num_truncated": batches.num_truncated,
    }
    if world.size > 1:
        sizes = [batch["input_ids"].shape[0] for batch in batches]
        counts["world_size"] = world.size
        shares = (World(rank, world.size).shard(sizes) for rank in range(world.size))
        counts["sequences_per_rank"] = [sum(share) for share in shares]
    return norms, counts


def batches_of(config, records, tokenizer, model_config):
    """Batches for a forward of a model of this config.

    Refused where it has too few positions, or no embedding for a token.
    """
    batches = make_batches(
        records,
        tokenizer,
        template=config.template,
        max_seq_length=config.max_seq_length,
        batch_size=config.batch_size,
    )
    known = vocab_size(model_config)
    batches[:] = [fitted(batch, known, f"batch {i}") for i, batch in enumerate(batches, 1)]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    positions = model_config.get("max_position_embeddings", model_config.get("n_positions"))
    if isinstance(positions, int) and longest > positions:
        raise UsageError(
            f"max_seq_length={config.max_seq_length}: must be at most {positions}, the positions "
            f"that the model has, for these data"
        )
    return batches


def load_data(config, records, name="dataset"):
    """The records of the data set that the field ``name`` says; given ones cut to as many."""
    if records is not None:
        return records[: config.num_calibration_samples]
    data = getattr(config, name)
    # Gates are learned on prompts that the aligned model answers.
    output = getattr(config, "score", None) != "gate"
    return load_records(data, limit=config.num_calibration_samples, require_output=output)


def load_norms(path, name="norms"):
    """Norms from a file, or from the folder that calibrate wrote."""
    path = Path(path)
    path = path / NORMS_FILE if path.is_dir() else path
    check_input(path.parent, only=path.name)
    return ActivationNorms.load(path, name)


def describe_backend(name, device):
    """What the report says of the backend; an unknown or unavailable one is refused."""
    try:
        module = backends.select(name, device.type)
        kernels = {"cpu_isa": module.isa()} if module.NAME == "cpu" else {}
    except ValueError as error:
        raise UsageError(str(error)) from None
    wish = os.environ.get(backends.ENVIRONMENT)
    asked = f"backend={name}" if name else wish and f"{backends.ENVIRONMENT}={wish}"
    return {
        "backend": module.NAME,
        **kernels,
        "backend_reason": asked or f"first that is available for {device.type} tensors",
        "backends": {key: why or "available" for key, why in backends.available().items()},
    }


def counts_of(norms):
    return {
        "num_sequences": norms.num_sequences,
        "num_tokens": norms.num_tokens,
        "response_only": norms.response_only,
        "aggregation": norms.aggregation,
    }


def inputs_of(config):
    names = ("dataset", "preserve_dataset")
    data = [getattr(config, name, None) for name in names]
    others = ("norms", "preserve_norms", "base_model")
    return [
        config.model_name_or_path,
        config.adapter,
        *(name and local_file(name) for name in data),
        *(getattr(config, name, None) for name in others),
    ]
