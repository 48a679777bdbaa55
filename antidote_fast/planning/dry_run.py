"""``--dry_run``: what a stage would read, write, compute and hold, and how long it may take.

Everything is checked that can be without loading weights, in the stage's own order and by its own
functions, so a mistake ends a plan as it would end the stage. Nothing is left on the disk.
"""

import functools
from dataclasses import replace
from pathlib import Path

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.experiment import ExperimentConfig, RunConfig
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.config.sweep import SweepConfig
from antidote_fast.config.train import AlignConfig, FinetuneConfig
from antidote_fast.errors import UsageError
from antidote_fast.experiments import experiment, run, sweep_check
from antidote_fast.experiments.chain import Maker
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.files.commit import check_output_folder
from antidote_fast.models.loading import resolve_folder
from antidote_fast.models.targets import find_targets
from antidote_fast.planning.fleet import plan_fleet
from antidote_fast.planning.gates import learning
from antidote_fast.planning.plan import Builder, Plan, file_bytes
from antidote_fast.planning.prune import plan_calibrate, plan_prune, pruned_later
from antidote_fast.planning.train import evaluation, plan_evaluate, plan_train, training
from antidote_fast.stages import evaluate
from antidote_fast.training import sft

# What a stage takes is the same whatever these are.
_NO_SIZE = ("seed", "learning_rate", "output_dir", "model_name_or_path", "adapter")


def plan(config) -> Plan:
    """Check and estimate a stage, or a whole run, without loading weights or writing.

    Args:
        config: the dataclass of align, finetune, calibrate, prune, evaluate, fleet, sweep or run.

    Raises:
        What the stage itself raises for the same flags, files and data.
        UsageError: a command that has no plan.
    """
    planner = _PLANNERS.get(type(config))
    if planner is None:
        raise UsageError("--dry_run: must be with a command that prunes, trains or evaluates")
    return planner(config)


def _plan_run(config):
    stages, scores = run.stages_of(config)
    run.check(config, stages, scores)
    named = {Path(stage.output_dir).name: (kind, stage) for kind, stage in stages.items()}
    named |= {f"scores/{model}": ("evaluate", score) for model, score in scores.items()}
    base, attack = config.model_name_or_path, stages["finetune"]
    return _plan_stages(config, {name: (*stage, base, attack) for name, stage in named.items()})


def _plan_experiment(config):
    trials, cells = experiment.check(config)
    tried = [cell for options in trials.values() for _, cell in options]
    stages = {
        Path(stage.output_dir).name: (kind, stage, cell.base, cell.stages["finetune"])
        for cell in (*tried, *cells)
        for kind, stage in cell.stages.items()
    }
    whole = _plan_stages(config, stages)
    whole.notes.append(f"{len(cells)} cells, {len(tried)} strengths to try, {len(stages)} stages")
    return whole


def _plan_stages(config, stages):
    """The sum of stages that are not there yet, each as if on its base model.

    Args:
        config: of the run or the experiment.
        stages: {name: (kind, dataclass, the first base model, the dataclass of its finetune)}.
    """
    maker, parts, sizes, whole = Maker(), {}, {}, []
    open_base = functools.cache(
        lambda name: open_checkpoint(
            resolve_folder(name), trust_remote_code=config.trust_remote_code
        )
    )
    for name, (kind, stage, base_name, attack) in stages.items():
        base = open_base(base_name)
        if maker.is_done(stage):
            whole.append(name)
            continue
        check_output_folder(stage.output_dir, stage.overwrite)
        stand_in = replace(stage, model_name_or_path=base_name)
        if getattr(stage, "base_model", None) == attack.model_name_or_path:
            stand_in = replace(stand_in, base_model=base_name)
        adapt = None
        if getattr(stage, "adapter", None) is not None:
            adapt = functools.partial(sft.add_lora, config=attack)
        same = {k: v for k, v in vars(stage).items() if k not in _NO_SIZE}
        size = str((kind, base_name, adapt is None, same))  # planned once
        if size not in sizes:
            sizes[size] = _plan_stage(kind, stand_in, base, adapt)
        parts[name] = sizes[size]
    total = Builder("run", config, base).plan
    total.sum_up(parts)
    if whole:
        total.notes.append(f"whole already, and kept: {', '.join(whole)}")
    return total


def _plan_stage(kind, config, base, adapt):
    if kind == "prune":
        return pruned_later(config, base, adapt)
    if kind == "evaluate":
        evaluate._check_judges(config)
        return evaluation(config, evaluate._load_sets(config), base, None, adapt)
    return training(config, sft.check_config(config, merged=kind == "align"))


def _plan_sweep(config):
    """Norms of each kind, and as many evaluations as there can be."""
    checked = sweep_check.check(config)
    base, adapter = checked.base, checked.adapter
    evaluations = 1 + len(config.candidates())
    parts = {"evaluate": evaluation(config.evaluation(), checked.sets, base, adapter)}
    parts["evaluate"].repeat(evaluations)
    for kind in config.kinds:
        name = "preserve_dataset" if kind == "preserve" else "dataset"
        places = {"output_dir": config.output_dir, "overwrite": config.overwrite}
        part = plan_calibrate(
            replace(config.collecting(kind), dataset=getattr(config, name), **places)
        )
        part.bytes_written *= config.save_norms
        parts[f"norms, {kind}"] = part
    if checked.prompts:
        stand_in = replace(config.learning(), output_dir=config.output_dir)
        made = Builder("gates", stand_in, base, adapter)
        learning(made, checked.prompts, checked.aligned)
        parts["gates"] = made.finish()
        parts["gates"].repeat(sum(name == config.learned for name, _, _ in config.candidates()))
    for part in list(parts.values())[1:]:  # weights are loaded once
        weights = sum(file_bytes(source) for source in (base, adapter) if source)
        part.seconds["read"] *= 1 - weights / part.bytes_read
        part.bytes_read -= weights
    whole = Builder("sweep", config, base, adapter)
    targets = find_targets(whole.load().model, config.targets, config.ignore)
    whole = whole.plan
    whole.sum_up(parts)
    size = sum(target.weight.nbytes for target in targets)
    whole.memory["copy of the targets"] = size
    if checked.aligned is not None:
        whole.memory["base weights"] = size
        whole.bytes_read += size
    sizes = [target.weight.numel() for target in targets]
    whole.pruned = {"layers": len(sizes), "weights": sum(sizes)}
    whole.data = {"candidates": evaluations - 1, **parts["evaluate"].data}
    whole.notes.append(
        f"at most {evaluations} evaluations, of the unpruned model and each candidate; a score and "
        "scope ends early where it costs too much or no harmful answer is left"
    )
    if config.evaluation().judge != "refusal":
        whole.notes.append("the judge stays in memory beside the model, and is not counted")
    return whole


_PLANNERS = {
    AlignConfig: plan_train,
    FinetuneConfig: plan_train,
    CalibrateConfig: plan_calibrate,
    PruneConfig: plan_prune,
    FleetConfig: plan_fleet,
    EvaluateConfig: plan_evaluate,
    SweepConfig: _plan_sweep,
    RunConfig: _plan_run,
    ExperimentConfig: _plan_experiment,
}
