"""``--dry_run``: what a stage would read, write, compute and hold, and how long it may take.

Everything is checked that can be without loading weights, in the stage's own order and by its own
functions, so a mistake ends a plan as it would end the stage. Nothing is left on the disk.
"""

import functools
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.experiment import ExperimentConfig, RunConfig
from antidote_fast.config.fleet import FleetConfig, parse_shard
from antidote_fast.config.prune import CalibrateConfig, PruneConfig
from antidote_fast.config.sweep import SweepConfig
from antidote_fast.config.train import AlignConfig, FinetuneConfig
from antidote_fast.errors import AntidoteError, UsageError
from antidote_fast.experiments import experiment, run, sweep
from antidote_fast.experiments.chain import Maker
from antidote_fast.files.commit import check_output_folder, check_parent
from antidote_fast.files.manifest import read_manifest
from antidote_fast.fleet.jobs import read_jobs
from antidote_fast.fleet.worker import AHEAD, Worker
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.loading import open_model
from antidote_fast.models.targets import find_targets
from antidote_fast.planning.plan import Plan
from antidote_fast.planning.prune import plan_calibrate, plan_prune
from antidote_fast.planning.train import plan_evaluate, plan_train
from antidote_fast.stages.inputs import unseen_data
from antidote_fast.training import sft


def plan(config: Any) -> Plan:
    """Check and estimate a stage, or a whole run, without loading weights or writing.

    Args:
        config: the dataclass of align, finetune, calibrate, prune, evaluate, fleet, sweep, run or
            experiment.

    Raises:
        What the stage itself raises for the same flags, files and data.
        UsageError: a command that has no plan.
    """
    if type(config) not in _PLANNERS:
        raise UsageError("--dry_run: must be with a command that prunes, trains or evaluates")
    return _PLANNERS[type(config)](config)


def _plan_fleet(config):
    """As if nothing were done yet."""
    index, count = parse_shard(config.shard)
    jobs = read_jobs(config)[index::count]
    check_parent(config.output_dir)
    worker = Worker(config)
    worker.check_data(jobs)
    whole = Plan("fleet", config, worker.base)
    whole.read(worker.base, config.dataset, config.preserve_dataset)
    sizes, refused, done, flops, factors = [], [], 0, {}, []
    for job in jobs:
        try:
            adapter = worker.open_adapter(job.config)
            check_adapter(adapter, worker.base)
            names = unseen_data(job.config)
            batches = [batch for name in names for batch in worker.data_of(job.config, name)]
        except AntidoteError as error:
            refused.append(f"would be set aside: {job.name}: {error}")
            continue
        done += read_manifest(job.config.output_dir) is not None
        sizes.append(sum(entry.num_bytes for entry in adapter.tensors.values()))
        factors = factors or [e.shape for e in adapter.tensors.values() if len(e.shape) == 2]
        if not names:
            continue
        if whole.cost is None:
            whole.adapt = functools.partial(load_adapter, adapter=adapter)
            whole.load()
        chosen = str((job.config.targets, job.config.ignore))
        if chosen not in flops:
            targets = find_targets(whole.cost.model, job.config.targets, job.config.ignore)
            flops[chosen] = whole.cost.forward_until([target.input_module for target in targets])
        whole.forward("calibrate", [batch["input_ids"].shape for batch in batches], flops[chosen])
    whole.data = {"jobs": len(jobs), "refused": len(refused), "with a folder already": done}
    whole.notes += refused[:3]
    whole.bytes_read += 2 * sum(sizes)  # read, and copied before it is written into
    whole.bytes_written = sum(sizes)
    whole.prunes = len(sizes) * sum(map(math.prod, factors))
    whole.columns = max((shape[-1] for shape in factors), default=1)
    if whole.cost is not None:
        whole.hold("weights", whole.cost.weight_bytes)
        whole.hold("activations", whole.cost.peak_bytes(*whole.shape))
    whole.hold("adapters on their way", 2 * (1 + AHEAD) * max(sizes, default=0))
    return whole.finish()


def _plan_run(config):
    stages, scores = run.stages_of(config)
    run.check(config, stages, scores)
    base, attack = config.model_name_or_path, stages["finetune"]
    named = {Path(stage.output_dir).name: stage for stage in stages.values()}
    named |= {f"scores/{model}": score for model, score in scores.items()}
    return _plan_stages(config, {name: (stage, base, attack) for name, stage in named.items()})


def _plan_experiment(config):
    trials, cells = experiment.check(config)
    tried = [cell for options in trials.values() for _, cell in options]
    stages = {
        Path(stage.output_dir).name: (stage, cell.base, cell.stages["finetune"])
        for cell in (*tried, *cells)
        for stage in cell.stages.values()
    }
    whole = _plan_stages(config, stages)
    whole.notes.append(f"{len(cells)} cells, {len(tried)} strengths to try, {len(stages)} stages")
    return whole


def _plan_stages(config, stages):
    """The sum of the stages that are not there yet, each as if on its base model.

    Args:
        config: of the run or the experiment.
        stages: {name: (dataclass, the first base model, the dataclass of its finetune)}.
    """
    maker, parts, same_size, whole = Maker(), {}, {}, []
    for name, (stage, base, attack) in stages.items():
        if maker.is_done(stage):
            whole.append(name)
            continue
        check_output_folder(stage.output_dir, stage.overwrite)
        # What is there is of the real inputs, so it is not gone on with.
        others = {"resume": False, "reference_model": base, "adapter": None}
        options = {name: value for name, value in others.items() if getattr(stage, name, None)}
        if getattr(stage, "aligned_model", None) == attack.model_name_or_path:
            options["aligned_model"] = base
        stand_in = replace(stage, model_name_or_path=base, overwrite=True, **options)
        adapt = functools.partial(sft.add_lora, config=attack) if "adapter" in options else None
        varied = {"seed": 0, "learning_rate": 0, "output_dir": ""}  # of no weight here
        size = str((type(stage), adapt is not None, vars(stand_in) | varied))
        if size not in same_size:
            more = {} if adapt is None else {"adapt": adapt}
            same_size[size] = _PLANNERS[type(stage)](stand_in, **more)
        parts[name] = same_size[size]
    [*_, (stage, base, _)] = stages.values()
    total = Plan("run", config, open_model(replace(stage, model_name_or_path=base)))
    total.sum_up(parts)
    if whole:
        total.notes.append(f"whole already, and kept: {', '.join(whole)}")
    return total


def _plan_sweep(config):
    """Norms of each kind, and as many evaluations as there can be."""
    checked, candidates = sweep.check(config), config.candidates()
    places = {"output_dir": config.output_dir, "overwrite": config.overwrite}
    evaluations = plan_evaluate(replace(config.evaluation(), **places))
    models = 1 + (checked.clean is not None)  # beside the candidates
    evaluations.repeat(models + len(candidates))
    parts = {"evaluate": evaluations}
    for kind in config.kinds:
        options = vars(config.collecting(kind)) | places
        if kind == "preserve":
            options["dataset"] = config.preserve_dataset
        calibration = {field.name: options[field.name] for field in fields(CalibrateConfig)}
        part = parts[f"norms, {kind}"] = plan_calibrate(CalibrateConfig(**calibration))
        part.bytes_written *= config.save_norms
    if checked.prompts:
        part = parts["gates"] = plan_prune(replace(config.learning(), **places))
        part.bytes_read -= part.bytes_written
        part.bytes_written = 0
        part.repeat(sum(name == config.learned for name, _, _ in candidates))
    whole = Plan("sweep", config, checked.base, checked.adapter)
    weights = sum(source.file_bytes for source in (checked.base, checked.adapter) if source)
    for part in list(parts.values())[1:]:  # weights are loaded once
        part.seconds["read"] *= 1 - weights / part.bytes_read
        part.bytes_read -= weights
    whole.sum_up(parts)
    targets = find_targets(whole.load().model, config.targets, config.ignore)
    size = sum(target.weight.nbytes for target in targets)
    whole.memory["copy of the targets"] = size
    if checked.aligned is not None:
        whole.memory["base weights"] = size
        whole.bytes_read += size
    weights = sum(target.weight.numel() for target in targets)
    whole.pruned = {"layers": len(targets), "weights": weights}
    if checked.clean is not None:
        whole.bytes_read += checked.base.file_bytes + checked.clean.file_bytes
    whole.data = {"candidates": len(candidates), **evaluations.data}
    others = "the unpruned model, the clean one" if checked.clean else "the unpruned model"
    whole.notes.append(
        f"at most {models + len(candidates)} evaluations, of {others} and each candidate; a score "
        "and scope ends early where it costs too much or no harmful answer is left"
    )
    if config.evaluation().judge != "refusal":
        whole.notes.append("the judge stays in memory beside the model, and is not counted")
    return whole


_PLANNERS = {
    **dict.fromkeys((AlignConfig, FinetuneConfig), plan_train),
    CalibrateConfig: plan_calibrate,
    PruneConfig: plan_prune,
    FleetConfig: _plan_fleet,
    EvaluateConfig: plan_evaluate,
    SweepConfig: _plan_sweep,
    RunConfig: _plan_run,
    ExperimentConfig: _plan_experiment,
}
