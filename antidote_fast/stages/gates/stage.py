"""Learning gates inside the prune stage: from folders, or on a live model."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from antidote_fast.config.base import check_left_out
from antidote_fast.config.prune import PruneConfig
from antidote_fast.data.records import Record
from antidote_fast.distributed.ranks import ALONE, World
from antidote_fast.errors import DataError
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import load_model
from antidote_fast.models.targets import find_targets
from antidote_fast.stages.gates.answers import Answers, answer_prompts, check_texts
from antidote_fast.stages.gates.learn import learn_gates
from antidote_fast.stages.inputs import Inputs, load_folders
from antidote_fast.system.progress import Progress

Sets = dict[str, list[Record]]
_LOST = ("over_limit", "refused", "empty", "without_output")
Learned = tuple[dict[str, torch.Tensor], dict[str, Any]]


def check_stage(
    config: PruneConfig, base: Checkpoint | None, is_adapter: bool, world: World = ALONE
) -> None:
    """Refuse, before weights are loaded, what gates cannot be learned on; ``base`` may be None.

    Raises:
        UsageError, DataError: naming the argument.
    """
    config.check_aligned(is_adapter)
    if world.size > 1:
        check_left_out(config, ["score"], "with torchrun; start one process")
    if base is not None and "quantization_config" in base.config:
        raise DataError(f"{base.folder}: is quantised; with score gate it must not be")


def learn_scores(inputs: Inputs) -> Learned:
    """(scores, what the report says of them), as :func:`learn_gates` gives them, of a prune.

    An aligned model is loaded for its answers alone, and let go before a model of folders is
    loaded; beside a live one it is there meanwhile.
    """
    config, model, sets = inputs.config, inputs.model, inputs.records
    tokenizer, bases, device = inputs.tokenizer, inputs.evidence.base_weights, config.device
    if model is None:
        check_texts(tokenizer, **kinds(sets), **texts_of(config))
        check_memory(config, [inputs.base, inputs.adapter])
    else:
        device = str(next(model.parameters()).device)
    answers = answers_of(config, inputs.aligned, device, tokenizer, sets, inputs.progress)
    if model is None:
        model = load_folders(config, inputs.base, inputs.adapter)
        if inputs.adapter is None:
            # In the dtype that is learned in; the prune itself reads both as they are saved.
            targets = find_targets(model, config.targets, config.ignore)
            dtypes = {target.key: target.weight.dtype for target in targets}
            read = inputs.base_weights(dtypes).items()
            bases = {key: base.to(dtypes[key]) for key, base in read}
    learned = learn(config, model, tokenizer, sets, answers, bases, inputs.progress)
    inputs.data |= data_of(sets, learned[1])
    return learned


def kinds(sets: Sets) -> dict[str, Any]:
    """What gates learn from, as arguments, of {field of the config: its records}."""
    return {
        "harmful": sets["dataset"],
        "preserve": sets.get("preserve_dataset", ()),
        "ordinary": sets.get("ordinary_dataset"),
    }


def data_of(sets: Sets, told: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """{field of the config: what became of its records}, for the report.

    Args:
        sets: as :func:`antidote_fast.stages.inputs.load_data` gives each of them.
        told: what the report says of the gates, by kind of record.
    """
    holds = {"dataset": ["harmful"], "preserve_dataset": ["task"], "ordinary_dataset": ["ordinary"]}
    if "ordinary_dataset" not in sets:
        holds["preserve_dataset"].append("ordinary")
    found = {}
    for name, records in sets.items():
        sums = Counter({"num_over_limit": getattr(records, "num_over_limit", 0)})
        sums["num_without_output"] = getattr(records, "num_without_output", 0)
        for kind in holds[name]:
            sums.update(told.get(kind, {}))
        behind = sums["num_over_limit"] + sums["num_without_output"]
        found[name] = {
            "num_records": sums["num_records"] + behind,
            "num_used": sums["num_used"],
            "num_dropped_long": sums["num_dropped"],
            "num_truncated": sums["num_truncated"],
            **{f"num_{why}": sums[f"num_{why}"] for why in _LOST},
        }
    return found


def texts_of(config: PruneConfig) -> dict:
    """How a config's texts become tokens."""
    return config.picked("template", "max_seq_length") | {"templates": config.gate_templates}


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
        **kinds(sets),
        answer_tokens=config.gate_answer_tokens,
        batch_size=config.batch_size,
        progress=progress,
        **texts_of(config),
    )


def learn(
    config: PruneConfig,
    model: Any,
    tokenizer: Any,
    sets: Sets,
    answers: Answers | None,
    bases: Mapping[str, torch.Tensor] | None,
    progress: Progress = False,
) -> Learned:
    """:func:`learn_gates` by the config's settings; ``answers`` and ``bases`` may be None."""
    return learn_gates(
        model,
        tokenizer,
        selection=config.selection,
        aligned=answers,
        base_weights=bases,
        steps=config.gate_steps,
        learning_rate=config.gate_learning_rate,
        mixture=config.mixture,
        progress=progress,
        **kinds(sets),
        **texts_of(config),
        **config.picked("targets", "ignore", "seed", "batch_size", "backend"),
    )
