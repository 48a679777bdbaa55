"""What a model says of the data, and the one call that prunes by it."""

import dataclasses
import time
from typing import Any

import torch

from antidote_fast.data.batches import batches_of
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.resume import Run
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import load_model, without_weights
from antidote_fast.models.targets import ALL_LINEAR, find_targets, select_keys
from antidote_fast.norms.activation_norms import ActivationNorms, counts_of
from antidote_fast.pruning.prune import prune_state_
from antidote_fast.pruning.report import PruneReport
from antidote_fast.stages.inputs import Inputs, learner_of


def gather(inputs: Inputs, run: Run | None = None) -> None:
    """Run a model over the data that are still to be seen, and add what it says to the inputs.

    Norms are collected, or scores are learned where the config's score is one of those.

    Args:
        inputs: as :func:`antidote_fast.stages.inputs.open_inputs` gives them.
        run: where the model runs block by block, what goes on where it was interrupted.

    Raises:
        DataError, AntidoteError: data that become no tokens, a model that cannot be loaded, not
            enough memory.
        Interrupted: a signal came while a model ran block by block.
    """
    config = inputs.config
    if not inputs.records:
        return
    if run is not None:
        from antidote_fast.streaming import job

        options = {"tokenizer": inputs.given_tokenizer, "progress": inputs.progress}
        about = (config, inputs.base, inputs.adapter, inputs.records["dataset"], run)
        norms, counts = job.collect_norms(*about, **options)
        inputs.add_norms("dataset", norms, counts)
        return
    model, batches, fingerprint = inputs.model, {}, None
    learner = learner_of(config)
    if learner is not None:
        if model is None:
            opened = (config, inputs.base, inputs.adapter, inputs.aligned, inputs.records)
            options = {"tokenizer": inputs.given_tokenizer, "progress": inputs.progress}
            scores, inputs.counts["gate"] = learner.learn_folder(*opened, **options)
        else:
            live = (config, model, inputs.aligned, inputs.evidence.base_weights, inputs.records)
            scores, inputs.counts["gate"] = learner.learn_live(*live, inputs.tokenizer)
        inputs.evidence = dataclasses.replace(inputs.evidence, scores=scores)
        return
    with inputs.world.together():
        model_config = inputs.base.config if model is None else _config_of(model)
        for name, records in inputs.records.items():
            batches[name] = batches_of(config, records, inputs.tokenizer, model_config)
        if model is None:
            model = _load(inputs)
            # Weights that accelerate keeps elsewhere cannot be looked at; the files can.
            offloaded = any(parameter.is_meta for parameter in model.parameters())
            fingerprint = inputs.base.fingerprint() if offloaded else None
    for name, some in batches.items():
        options = {"progress": inputs.progress, "world": inputs.world, "fingerprint": fingerprint}
        norms, counts = collect(config, model, some, **options)
        inputs.add_norms(name, norms, counts)


def _config_of(model):
    return model.config.to_dict() if hasattr(model.config, "to_dict") else {}


def _load(inputs):
    """The model of the folders, its adapter on it."""
    config = inputs.config
    check_memory(config, [inputs.base, inputs.adapter])
    options = config.load_options
    model = load_model(inputs.base.folder, device_map=config.device_map, **options)
    return model if inputs.adapter is None else load_adapter(model, inputs.adapter)


def collect(
    config: Any,
    model: torch.nn.Module,
    batches: Any,
    *,
    progress: Any = False,
    world: World = ALONE,
    fingerprint: str | None = None,
) -> tuple[ActivationNorms, dict]:
    """(norms, what the report says of them) of a live model, each rank on batches of its own.

    Args:
        config: whose targets, ignore, response_only, aggregation and backend are looked at.
        model: a transformers or PEFT model.
        batches: as :func:`antidote_fast.data.batches.batches_of`.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        world: the ranks that share the batches.
        fingerprint: of the base's files, where its weights cannot be looked at.
    """
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
    counts = counts_of(norms) | batches.counts
    if world.size > 1:
        sizes = [batch["input_ids"].shape[0] for batch in batches]
        counts["world_size"] = world.size
        shares = (World(rank, world.size).shard(sizes) for rank in range(world.size))
        counts["sequences_per_rank"] = [sum(share) for share in shares]
    return norms, counts


def read_weights(inputs: Inputs) -> dict[str, torch.Tensor]:
    """{parameter name: tensor, on the device that prunes} of the weights to prune, as saved.

    What removed ones take, and how the weights are saved, is added to the inputs' evidence.
    """
    keys, roles = weights_to_prune(inputs.config, inputs.source, inputs.naming_norms)
    weights = {
        key: tensor.to(inputs.device)
        for key, tensor in inputs.source.read(keys, inputs.progress).items()
    }
    base_weights = inputs.base_weights(keys)
    inputs.evidence = dataclasses.replace(inputs.evidence, base_weights=base_weights, **roles)
    return weights


def prune_weights(
    inputs: Inputs, weights: dict[str, torch.Tensor], *, together: bool = False
) -> PruneReport:
    """Prune tensors as saved, in place, by the inputs' evidence and the config's settings.

    Args:
        inputs: whose evidence is whole.
        weights: {parameter name: tensor}.
        together: as :func:`antidote_fast.pruning.prune.prune_state_`, whose errors are raised.
    """
    config, is_named = inputs.config, inputs.naming_norms is not None
    inputs.pruned_from = time.perf_counter()
    return prune_state_(
        weights,
        inputs.evidence,
        config.selection,
        targets=config.targets if is_named else None,
        ignore=config.ignore if is_named else (),
        together=together,
        progress=inputs.progress,
        **config.prune_options,
    )


def weights_to_prune(
    config: Any, source: Checkpoint, norms: ActivationNorms | None
) -> tuple[list[str], dict[str, Any]]:
    """(names of the weights, how those are saved), by norms that name them or by the targets."""
    if norms is not None:
        keys = norms.keys
        if config.targets is not None or config.ignore:
            chosen = ALL_LINEAR if config.targets is None else config.targets
            keys = select_keys(keys, chosen, config.ignore)
        return keys, {"transposed": sorted(norms.transposed), "routed": sorted(norms.routed)}
    if source.is_adapter:
        return select_keys(source.tensors, config.targets, config.ignore), {}
    # Which weights are saved transposed only the model's own code knows.
    model = without_weights(source, "auto", config.trust_remote_code)
    targets = find_targets(model, config.targets, config.ignore)
    return [target.key for target in targets], {
        "transposed": [target.key for target in targets if target.transposed],
        "routed": [target.key for target in targets if target.routed],
    }
