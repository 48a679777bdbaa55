"""Learning gates inside the prune stage: from folders, or on a live model."""

from typing import Any

import torch

from antidote_fast.config.prune import GateMixture, PruneConfig
from antidote_fast.data.records import Record
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import load_model, load_tokenizer
from antidote_fast.models.targets import find_targets
from antidote_fast.stages.gates.answers import Answers, answer_prompts, check_texts
from antidote_fast.stages.gates.learn import learn_gates
from antidote_fast.system.progress import Progress

_MIXTURE = GateMixture()
Sets = dict[str, list[Record]]
Learned = tuple[dict[str, torch.Tensor], dict[str, Any]]


def check_stage(
    config: PruneConfig, base: Checkpoint | None, is_adapter: bool, world: World = ALONE
) -> None:
    """Refuse, before weights are loaded, what gates cannot be learned on.

    Args:
        config: a :class:`PruneConfig`, of any score.
        base: checkpoint of the model, or None where it is live.
        is_adapter: what is pruned is an adapter.
        world: the ranks; only a process alone can learn.

    Raises:
        UsageError, DataError: naming the argument.
    """
    if config.scoring.learner is None:
        return
    config.check_aligned(is_adapter)
    if world.size > 1:
        raise UsageError(
            f"score={config.score!r}: must be left out with torchrun; start one process"
        )
    if base is not None and "quantization_config" in base.config:
        raise DataError(f"{base.folder}: is quantised; with score gate it must not be")


def learn_folder(
    config: PruneConfig,
    base: Checkpoint,
    adapter: Checkpoint | None,
    aligned: Checkpoint | None,
    sets: Sets,
    *,
    tokenizer: Any = None,
    progress: Progress = False,
) -> Learned:
    """(scores, what the report says of them), as :func:`learn_gates` gives them, from folders.

    Args:
        config: a :class:`PruneConfig` of score gate.
        base, adapter: checkpoints of :func:`antidote_fast.stages.inputs.open_folders`.
        aligned: checkpoint of the aligned model, or None with an adapter. It is loaded for its
            answers alone, and let go before the model to prune is loaded.
        sets: {"dataset": harmful prompts, "preserve_dataset": records}.
        tokenizer: instead of the base's own.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
    """
    tokenizer = tokenizer or load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    check_texts(tokenizer, *sets.values(), **texts_of(config))
    check_memory(config, [base, adapter])
    bases = None
    answers = answers_of(config, aligned, config.device, tokenizer, sets, progress)
    model = load_model(base.folder, **config.load_options)
    if adapter is not None:
        model = load_adapter(model, adapter)
    else:
        # In the dtype that is learned in; the prune itself reads both as they are saved.
        targets = find_targets(model, config.targets, config.ignore)
        dtypes = {target.key: target.weight.dtype for target in targets}
        bases = {key: base.to(dtypes[key]) for key, base in aligned.read(dtypes, progress).items()}
    return learn(config, model, tokenizer, sets, answers, bases, progress)


def texts_of(config: PruneConfig) -> dict:
    """How a config's texts become tokens."""
    return {"template": config.template, "max_seq_length": config.max_seq_length}


def learn_live(
    config: PruneConfig,
    model: Any,
    aligned: Checkpoint | None,
    bases: dict[str, torch.Tensor] | None,
    sets: Sets,
    tokenizer: Any,
) -> Learned:
    """:func:`learn_folder` for a live model, beside which ``aligned`` is loaded where it is one.

    ``bases`` are the weights of ``aligned`` that removed ones take, or None with an adapter.
    """
    device = str(next(model.parameters()).device)
    answers = answers_of(config, aligned, device, tokenizer, sets)
    return learn(config, model, tokenizer, sets, answers, bases)


def answers_of(
    config: PruneConfig,
    aligned: Checkpoint | None,
    device: str,
    tokenizer: Any,
    sets: Sets,
    progress: Progress = False,
) -> Answers | None:
    """Answers of the checkpoint ``aligned``, which is loaded for them alone; None without one."""
    if aligned is None:
        return None
    model = load_model(aligned.folder, **config.load_options | {"device": device})
    return ask(config, model, tokenizer, sets, progress)


def ask(
    config: PruneConfig, model: Any, tokenizer: Any, sets: Sets, progress: Progress = False
) -> Answers:
    """Answers of a live model, by the config's settings."""
    return answer_prompts(
        model,
        tokenizer,
        sets["dataset"],
        sets["preserve_dataset"],
        answer_tokens=_MIXTURE.answer_tokens,
        template=config.template,
        max_seq_length=config.max_seq_length,
        batch_size=config.batch_size,
        progress=progress,
    )


def learn(
    config: PruneConfig,
    model: Any,
    tokenizer: Any,
    sets: Sets,
    answers: Answers | None,
    bases: dict[str, torch.Tensor] | None,
    progress: Progress = False,
) -> Learned:
    """:func:`learn_gates` by the config's settings; ``answers`` and ``bases`` may be None."""
    return learn_gates(
        model,
        tokenizer,
        sets["dataset"],
        sets["preserve_dataset"],
        config.selection,
        aligned=answers,
        base_weights=bases,
        targets=config.targets,
        ignore=config.ignore,
        steps=config.gate_steps,
        learning_rate=config.gate_learning_rate,
        mixture=_MIXTURE,
        seed=config.seed,
        template=config.template,
        max_seq_length=config.max_seq_length,
        batch_size=config.batch_size,
        backend=config.backend,
        progress=progress,
    )
