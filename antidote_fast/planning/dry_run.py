"""``--dry_run``: what a stage would read, write, compute and hold, and how long it may take.

Everything is checked that can be without loading weights, in the stage's own order and by its own
functions, so a mistake ends a plan as it would end the stage. Nothing is left on the disk.
"""

import functools
from dataclasses import replace
from pathlib import Path

from antidote_fast.config import experiment, sweep
from antidote_fast.config import train as configs
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.fleet import FleetConfig
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.errors import UsageError
from antidote_fast.files.checkpoint import open_checkpoint
from antidote_fast.models.adapters import load_adapter
from antidote_fast.models.loading import resolve_folder
from antidote_fast.models.targets import find_targets
from antidote_fast.planning.gates import learning
from antidote_fast.planning.plan import Builder, Plan
from antidote_fast.planning.prune import plan_calibrate, plan_fleet, plan_prune, pruned_later
from antidote_fast.planning.train import evaluation, plan_evaluate, plan_train, training


def plan(config) -> Plan:
    """Check and estimate a stage, or a whole run, without loading weights or writing.

    Args:
        config: the dataclass of align, finetune, calibrate, prune, evaluate, fleet, sweep or run.

    Raises:
        What the stage itself raises for the same flags, files and data.
        UsageError: a command that has no plan.
    """
    for kind, make in _PLANNERS.items():
        if type(config) is kind:
            return make(config)
    raise UsageError("--dry_run: must be with a command that prunes, trains or evaluates")


def _plan_run(config) -> Plan:
    """The sum of the stages; what they will make is planned as of the base model's size."""
    from antidote_fast.experiments import run
    from antidote_fast.files.provenance import is_done
    from antidote_fast.stages import evaluate
    from antidote_fast.training import sft

    out = Path(config.output_dir)
    stages, scores = run.stages_of(config)
    run.check(config, stages, scores)
    stages = {Path(stage.output_dir).name: stage for stage in stages.values()}
    parts = {}
    kept = [name for name, stage in stages.items() if is_done(out / name, stage)]
    base_name = config.model_name_or_path
    attack = stages["attacked"]
    adapt = (lambda model: sft.add_lora(model, attack)) if attack.tuning == "lora" else None
    base = None
    for name, stage in stages.items():
        stand_in = replace(stage, model_name_or_path=base_name)
        if getattr(stage, "aligned_model", None) == attack.model_name_or_path:  # made by the run
            stand_in = replace(stand_in, aligned_model=base_name)
        if name in kept:  # its folder is there, and is not written
            stand_in = replace(stand_in, output_dir=str(out / ".planned"))
        if name != "pruned":
            base = sft.check_config(stand_in, merged=name == "aligned")
        if name in kept:
            continue
        if name == "pruned":
            parts[name] = pruned_later(stand_in, base, adapt)
        else:
            parts[name] = training(stage, base)
    for name, score in scores.items():
        if is_done(Path(score.output_dir), score):
            kept.append(f"scores/{name}")
            continue
        with_adapter = adapt if name in ("attacked", "pruned") else None
        sets = evaluate.load_sets(score)
        evaluate.check_judges(score)
        parts[f"scores/{name}"] = evaluation(score, sets, base, None, with_adapter)
    return _sum("run", config, base, parts, kept)


def _plan_sweep(config) -> Plan:
    """Norms of each kind, and as many evaluations as there can be."""
    from antidote_fast.experiments import sweep as sweeping
    from antidote_fast.planning.cost import cost_of

    found = sweeping.check(config)
    base, adapter = found.base, found.adapter
    weights = sum(f.stat().st_size for c in (base, adapter) if c for f in c.weight_files)
    evaluations = 1 + len(config.candidates())
    parts = {"evaluate": evaluation(config.evaluation(), found.sets, base, adapter)}
    parts["evaluate"].repeat(evaluations)
    for kind in config.kinds:
        name = "preserve_dataset" if kind == "preserve" else "dataset"
        places = {"output_dir": config.output_dir, "overwrite": config.overwrite}
        stand_in = replace(config.collecting(kind), dataset=getattr(config, name), **places)
        part = plan_calibrate(stand_in)
        part.seconds["read"] *= 1 - weights / part.bytes_read  # they are loaded once
        part.bytes_read -= weights
        part.bytes_written *= config.save_norms
        parts[f"norms, {kind}"] = part
    if found.prompts:
        stand_in = replace(config.learning(), output_dir=config.output_dir)
        made = Builder("gates", stand_in, [base, adapter])
        cost, _ = learning(made, stand_in, base, adapter, found.prompts, aligned=found.aligned)
        part = made.finish(cost)
        part.seconds["read"] *= 1 - weights / part.bytes_read
        part.bytes_read -= weights
        part.repeat(sum(name == config.learned for name, _, _ in config.candidates()))
        parts["gates"] = part
    whole = _sum("sweep", config, base, parts, [])
    adapt = functools.partial(load_adapter, adapter=adapter) if adapter else None
    model = cost_of(config, base, adapt).model
    targets = find_targets(model, config.targets, config.ignore)
    size = sum(target.weight.nbytes for target in targets)
    whole.memory["copy of the targets"] = size
    if found.aligned is not None:
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


def _plan_experiment(config) -> Plan:
    """The sum of the stages that are not there yet; stages of the same size are planned once."""
    from antidote_fast.experiments import experiment
    from antidote_fast.files.provenance import is_done
    from antidote_fast.stages import evaluate
    from antidote_fast.training import sft

    trials, cells = experiment.check(config)
    tried = [cell for options in trials.values() for _, cell in options]
    stages = {
        stage.output_dir: (kind, stage, cell)
        for cell in (*tried, *cells)
        for kind, stage in cell.stages.items()
    }
    parts, kept, sizes, base = {}, [], {}, None
    for folder, (kind, stage, cell) in stages.items():
        name = Path(folder).name
        base_name = cell.base
        if base is None or str(base.folder) != str(resolve_folder(base_name)):
            base = open_checkpoint(resolve_folder(base_name))
        if is_done(folder, stage):
            kept.append(name)
            continue
        attack = cell.stages["finetune"]
        lora = attack.tuning == "lora"
        adapt = functools.partial(sft.add_lora, config=attack) if lora else None
        size = (kind, base_name, *_size_of(stage))
        if size not in sizes:
            stand_in = replace(stage, model_name_or_path=base_name)
            if kind in ("align", "finetune"):
                sizes[size] = training(stand_in, base)
            elif kind == "prune":
                sizes[size] = pruned_later(stand_in, base, adapt)
            else:
                evaluate.check_judges(stand_in)
                sizes[size] = evaluation(stand_in, evaluate.load_sets(stand_in), base, None, adapt)
        parts[name] = sizes[size]
    found = _sum("run", config, base, parts, kept)
    found.notes.append(f"{len(cells)} cells, {len(tried)} strengths to try, {len(stages)} stages")
    return found


def _size_of(stage):
    """What decides how much a stage takes."""
    left_out = ("seed", "learning_rate", "output_dir", "model_name_or_path", "adapter")
    return tuple(str(v) for k, v in vars(stage).items() if k not in left_out)


def _sum(stage, config, base, parts, kept):
    whole = Builder(stage, config, [base]).plan
    whole.parts = parts
    for name, part in parts.items():
        whole.bytes_read += part.bytes_read
        whole.bytes_written += part.bytes_written
        whole.flops += part.flops
        whole.seconds[name] = sum(part.seconds.values())
        whole.refusal = whole.refusal or part.refusal
    largest = max(parts.values(), key=lambda part: part.peak_memory, default=whole)
    whole.memory, whole.model = dict(largest.memory), dict(largest.model)
    if kept:
        whole.notes.append(f"whole already, and kept: {', '.join(kept)}")
    return whole


_PLANNERS = {
    configs.AlignConfig: plan_train,
    configs.FinetuneConfig: plan_train,
    CalibrateConfig: plan_calibrate,
    PruneConfig: plan_prune,
    FleetConfig: plan_fleet,
    EvaluateConfig: plan_evaluate,
    sweep.SweepConfig: _plan_sweep,
    experiment.RunConfig: _plan_run,
    experiment.ExperimentConfig: _plan_experiment,
}
