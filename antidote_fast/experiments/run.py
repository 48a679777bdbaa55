"""align -> finetune -> prune -> evaluate, in one go, from one file."""

import time
from pathlib import Path

from antidote_fast.config.experiment import SECTIONS, RunConfig
from antidote_fast.config.flags import from_values
from antidote_fast.errors import DataError, UsageError
from antidote_fast.files.commit import check_output_folder
from antidote_fast.files.manifest import read_manifest
from antidote_fast.files.places import held
from antidote_fast.files.provenance import REPORT, is_done, read_report, replace_report
from antidote_fast.stages.inputs import check_data
from antidote_fast.system.progress import track

_SHARED = (
    "overwrite",
    "dtype",
    "device",
    "seed",
    "max_seq_length",
    "template",
    "trust_remote_code",
)
_OURS = ("model_name_or_path", "output_dir", "adapter", "overwrite", "reference_model")
_FOLDERS = ("aligned", "attacked", "pruned", "scores")


def run(config: RunConfig, *, progress=False) -> dict:
    """Run every stage, each in its own folder of ``config.output_dir``.

    A stage's folder that is whole and was made with the same settings from files that have not
    changed since is kept, so an interrupted run goes on where it stopped.

    Returns:
        What ``report.json`` holds: the metrics of each model and the seconds of each stage.

    Raises:
        UsageError: a section's flag is unknown or out of range.
        DataError: output_dir holds something else, or a data set or a stage's input is refused.
    """
    out = Path(config.output_dir)
    stages, scores = _plan(config, out)
    check(stages, scores, out)
    busy = DataError(f"output_dir={config.output_dir!r}: another run is at work there")
    with held(out / ".run.lock", busy, make=True):
        return _run(config, stages, scores, out, progress)


def check(stages, scores, out):
    """Refuse data that cannot be read and folders that cannot be written, before the first stage.

    Raises:
        DataError: naming what is refused.
    """
    _check_folder(out)
    check_data([*stages.values(), *scores.values()])
    for stage in (*stages.values(), *scores.values()):
        if read_manifest(stage.output_dir) is None:  # else it is kept, or refused for its settings
            check_output_folder(stage.output_dir, stage.overwrite)


def _run(config, stages, scores, out, progress):
    from antidote_fast.stages import align, evaluate, finetune, prune

    seconds, reused = {}, []
    runs = {"aligned": align.run, "attacked": finetune.run, "pruned": prune.run}
    for name, stage in stages.items():
        start = time.monotonic()
        if is_done(out / name, stage):
            reused.append(name)
        else:
            runs[name](stage, progress=progress)
        seconds[name] = round(time.monotonic() - start, 3)
    metrics = {}
    for name in track(list(scores), "evaluate", progress):
        start = time.monotonic()
        folder = Path(scores[name].output_dir)
        if is_done(folder, scores[name]):
            reused.append(f"scores/{name}")
            report = read_report(folder)
        else:
            report = evaluate.run(scores[name], progress=progress)
        metrics[name] = report["metrics"]
        seconds[f"scores/{name}"] = round(time.monotonic() - start, 3)
    results = {
        "models": metrics,
        "seconds": round(sum(seconds.values()), 3),
        "stage_seconds": seconds,
        "reused": reused,
    }
    return replace_report(out, "run", config, results)


def _plan(config, out):
    """({folder: stage dataclass}, {model: evaluate dataclass}); every flag is checked here."""
    shared = {name: getattr(config, name) for name in _SHARED}
    base = config.model_name_or_path
    aligned = base if config.align is None else str(out / "aligned")
    stages = {}
    if config.align is not None:
        places = {"model_name_or_path": base, "output_dir": aligned}
        stages["aligned"] = _section(config, "align", shared | places)
    places = {"model_name_or_path": aligned, "output_dir": str(out / "attacked")}
    stages["attacked"] = _section(config, "finetune", shared | places)
    batch = {"batch_size": config.batch_size}
    if stages["attacked"].tuning == "lora":
        attacked = {"model_name_or_path": aligned, "adapter": str(out / "attacked")}
        pruned = {"model_name_or_path": aligned, "adapter": str(out / "pruned")}
    else:
        attacked = {"model_name_or_path": str(out / "attacked")}
        pruned = {"model_name_or_path": str(out / "pruned")}
    places = attacked | {"output_dir": str(out / "pruned")}
    stages["pruned"] = _section(config, "prune", shared | batch | places)
    stages["pruned"].check_aligned(stages["pruned"].adapter is not None)
    models = {"base": {"model_name_or_path": base}}
    if config.align is not None:
        models["aligned"] = {"model_name_or_path": aligned}
    models |= {"attacked": attacked, "pruned": pruned}
    drift = {"reference_model": aligned} if config.evaluate.get("drift_dataset") else {}
    scores = {
        name: _section(
            config,
            "evaluate",
            shared | batch | drift | places | {"output_dir": str(out / "scores" / name)},
        )
        for name, places in models.items()
    }
    return stages, scores


def _section(config, section, values):
    given = dict(getattr(config, section))
    for name in _OURS:
        if name in given:
            raise UsageError(f"{section}.{name}={given[name]!r}: is set by the run itself")
    return from_values(SECTIONS[section], values | given, section)


def _check_folder(out):
    if out.exists() and not out.is_dir():
        raise DataError(f"output_dir={str(out)!r}: exists and is not a folder")
    for path in sorted(out.iterdir()) if out.exists() else ():
        # A killed stage leaves a staged folder, .aligned.partial, which the next one removes.
        ours = path.name in (*_FOLDERS, REPORT)
        if not ours and not path.name.startswith(
            (*(f".{name}." for name in _FOLDERS), ".run.", ".report.")
        ):
            raise DataError(
                f"output_dir={str(out)!r}: holds {path.name!r}, which no run made; name another "
                "folder"
            )
