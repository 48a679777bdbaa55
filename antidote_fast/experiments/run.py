"""align -> finetune -> prune -> evaluate, in one go, from one file.

Beside the attacked model one is tuned on as many records of the task alone (p = 0): what it does is
the measure of what the attack did, and of what a repair leaves.
"""

import time
from pathlib import Path

from antidote_fast.config.base import StageConfig
from antidote_fast.config.experiment import SECTIONS, RunConfig
from antidote_fast.errors import UsageError
from antidote_fast.experiments.chain import (
    Chain,
    Maker,
    at_work,
    check_clean,
    check_own_folder,
    shared_flags,
)
from antidote_fast.experiments.tables import metrics_of
from antidote_fast.files.commit import check_output_folder
from antidote_fast.files.manifest import read_manifest
from antidote_fast.files.provenance import REPORT, write_report
from antidote_fast.stages.inputs import check_data
from antidote_fast.system.progress import Progress, track

_SET_HERE = ("model_name_or_path", "output_dir", "adapter", "overwrite", "reference_model")


def run(config: RunConfig, *, progress: Progress = False) -> dict:
    """Run every stage, each in its own folder of ``config.output_dir``.

    A stage's folder that is whole and was made with the same settings from files that have not
    changed since is kept, so an interrupted run goes on where it stopped.

    Returns:
        What ``report.json`` holds: the metrics of each model, its worst among them, and the
        seconds of each stage.

    Raises:
        UsageError: a section's flag is unknown or out of range.
        DataError: output_dir holds something else, or a data set or a stage's input is refused.
    """
    out = Path(config.output_dir)
    stages, scores = stages_of(config)
    check(config, stages, scores)
    with at_work(config.output_dir, "run"):
        maker, seconds, reused = Maker(progress), {}, []

        def make(name, kind, stage):
            start = time.monotonic()
            if maker.is_done(stage):
                reused.append(name)
            report = maker.make(kind, stage)
            seconds[name] = round(time.monotonic() - start, 3)
            return report

        for kind, stage in stages.items():
            make(Path(stage.output_dir).name, "finetune" if kind == "clean" else kind, stage)
        metrics = {
            model: metrics_of(make(f"scores/{model}", "evaluate", score))
            for model, score in track(list(scores.items()), "evaluate", progress)
        }
        results = {
            "models": metrics,
            "seconds": round(sum(seconds.values()), 3),
            "stage_seconds": seconds,
            "reused": reused,
        }
        return write_report(out, "run", config, results, grows=True)


def stages_of(config: RunConfig) -> tuple[dict[str, StageConfig], dict[str, StageConfig]]:
    """What a run does, in order; every flag is checked here.

    Returns:
        ({kind: dataclass} of the stages that make a model, {model: dataclass} of its evaluation);
        as :class:`antidote_fast.experiments.chain.Chain` has them.

    Raises:
        UsageError: a section's flag is unknown, set by the run itself, or out of range.
        DataError: data that have to be counted for the clean model, and cannot be read.
    """
    out = Path(config.output_dir)
    sections = {kind: flags for kind in SECTIONS if (flags := getattr(config, kind)) is not None}
    for kind, flags in sections.items():
        for name in _SET_HERE:
            if name in flags:
                raise UsageError(f"{kind}.{name}={flags[name]!r}: is set by the run itself")

    def folder_of(kind, stage, model):
        return out / "scores" / model if kind == "evaluate" else out / model

    base = config.model_name_or_path
    about = (base, shared_flags(config), config.batch_size, sections, folder_of)
    chain = Chain(*about, clean=config.clean)
    return chain.stages, {model: chain.evaluation(model) for model in chain.models}


def check(config: RunConfig, stages: dict, scores: dict) -> None:
    """Refuse data that cannot be read and folders that cannot be written, before the first stage.

    ``stages`` and ``scores`` are those of :func:`stages_of`.

    Raises:
        DataError: naming what is refused.
    """
    names = ("aligned", "clean", "attacked", "pruned", "scores", REPORT)
    check_own_folder(config.output_dir, names, "run")
    every = [*stages.values(), *scores.values()]
    check_data(every)
    check_clean([stages["clean"]] if "clean" in stages else [])
    for stage in every:
        if read_manifest(stage.output_dir) is None:  # else it is kept, or refused for its settings
            check_output_folder(stage.output_dir, stage.overwrite)
