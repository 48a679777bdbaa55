"""What a model says of the data, and the one call that prunes by it."""

import dataclasses
import time
from typing import Any

import torch

from antidote_fast.data.batches import batches_of
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.resume import Run
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import without_weights
from antidote_fast.models.targets import ALL_LINEAR, find_targets, select_keys
from antidote_fast.norms.activation_norms import ActivationNorms, counts_of
from antidote_fast.pruning.prune import prune_state_
from antidote_fast.pruning.report import PruneReport
from antidote_fast.stages.inputs import Inputs, learner_of, load_folders


def gather(inputs: Inputs, run: Run | None = None) -> None:
    """Run a model over the data that are still to be seen, and add what it says to the inputs.

    Norms are collected, or scores are learned where the config's score is one of those. With
    ``run``, which goes on where it was interrupted, the model runs block by block.

    Raises:
        DataError, AntidoteError: data that become no tokens, a model that cannot be loaded, not
            enough memory.
        Interrupted: a signal came while a model ran block by block.
    """
    config, model, learner = inputs.config, inputs.model, learner_of(inputs.config)
    if not inputs.records:
        return
    if run is not None:
        from antidote_fast.streaming import job

        options = {"tokenizer": inputs.given_tokenizer, "progress": inputs.progress}
        about = (config, inputs.base, inputs.adapter, inputs.records["dataset"], run)
        inputs.add_norms("dataset", *job.collect_norms(*about, **options))
        return
    if learner is not None:
        scores, inputs.counts["gate"] = learner.learn_scores(inputs)
        inputs.evidence = dataclasses.replace(inputs.evidence, scores=scores)
        return
    with inputs.world.together():
        if model is None:
            model_config = inputs.base.config
        else:
            model_config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
        batches = {
            name: batches_of(config, records, inputs.tokenizer, model_config)
            for name, records in inputs.records.items()
        }
        fingerprint = None
        if model is None:
            check_memory(config, [inputs.base, inputs.adapter])
            model = load_folders(config, inputs.base, inputs.adapter)
            # Weights that accelerate keeps elsewhere cannot be looked at; the files can.
            if any(parameter.is_meta for parameter in model.parameters()):
                fingerprint = inputs.base.fingerprint()
    options = {"progress": inputs.progress, "world": inputs.world, "fingerprint": fingerprint}
    for name, some in batches.items():
        inputs.add_norms(name, *collect(config, model, some, **options))


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

    Args as of :meth:`ActivationNorms.collect`; ``fingerprint`` is that of the base's files, where
    its weights cannot be looked at.
    """
    norms = ActivationNorms.collect(
        model,
        world.shard(batches),
        progress=progress,
        fingerprint=fingerprint,
        backend=getattr(config, "backend", None),
        world=world,
        **config.picked("targets", "ignore", "response_only", "aggregation"),
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
    weights = inputs.source.read(keys, inputs.progress)
    weights = {key: tensor.to(inputs.device) for key, tensor in weights.items()}
    roles["base_weights"] = inputs.base_weights(keys)
    inputs.evidence = dataclasses.replace(inputs.evidence, **roles)
    return weights


def prune_weights(
    inputs: Inputs, weights: dict[str, torch.Tensor], *, together: bool = False
) -> PruneReport:
    """Prune tensors as saved, in place, by the inputs' evidence and the config's settings.

    ``together`` is as of :func:`antidote_fast.pruning.prune.prune_state_`, whose errors are raised.
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
