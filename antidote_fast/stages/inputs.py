"""A stage's inputs, opened and checked: folders, data, norms, an aligned model, a backend."""

import dataclasses
import os
from pathlib import Path

from antidote_fast import backends
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.data.batches import batches_of
from antidote_fast.data.load import load_records, local_file
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.fingerprint import block_name
from antidote_fast.files.manifest import check_input
from antidote_fast.files.pruned_copy import check_copied
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import (
    check_not_quantized,
    load_model,
    load_tokenizer,
    resolve_folder,
)
from antidote_fast.models.targets import natural_key
from antidote_fast.norms.activation_norms import ActivationNorms, counts_of

NORMS_FILE = "norms.safetensors"


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
    """Checkpoint of ``config.aligned_model``, checked by its headers and hashes; None without one.

    Args:
        config: a :class:`PruneConfig`.
        shapes: {parameter name: shape} of the model to prune, whose blocks must be as its.
        model_type: that of the model's config.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Raises:
        DataError: no such model, an adapter, a quantised model, or another architecture; the
            message names the first tensor that differs.
    """
    if config.aligned_model is None:
        return None
    where = f"aligned_model={config.aligned_model!r}"
    aligned = open_checkpoint(
        resolve_folder(config.aligned_model, "aligned_model"),
        trust_remote_code=config.trust_remote_code,
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
        progress: as :func:`antidote_fast.system.progress.track` takes it.
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


def inputs_of(config):
    names = ("dataset", "preserve_dataset")
    data = [getattr(config, name, None) for name in names]
    others = ("norms", "preserve_norms", "aligned_model")
    return [
        config.model_name_or_path,
        config.adapter,
        *(name and local_file(name) for name in data),
        *(getattr(config, name, None) for name in others),
    ]


def check_data(stages):
    """Read every data set once before hours are spent on the first stage."""
    from antidote_fast.data.load import load_records

    splits = {
        # As evaluate reads them: the drift is measured on alignment data, from the train split.
        (
            getattr(stage, field.name),
            "test"
            if isinstance(stage, EvaluateConfig) and field.name != "drift_dataset"
            else "train",
        )
        for stage in stages
        for field in dataclasses.fields(stage)
        if field.name == "dataset" or field.name.endswith("_dataset")
    }
    for name, split in sorted(pair for pair in splits if pair[0] is not None):
        load_records(name, split=split)
