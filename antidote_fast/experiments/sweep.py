"""The sweep stage: ratios, scopes and scores tried on held-out prompts, and one recommended."""

import importlib
import itertools
from dataclasses import dataclass
from typing import Any

from antidote_fast.config.sweep import NORM_FILES, SweepConfig
from antidote_fast.data.batches import batches_of
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.judges import get_judge
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.experiments import pictures
from antidote_fast.experiments.candidates import SETS, Prompts, SweepEvidence, sweep_model
from antidote_fast.experiments.tables import headline, interval_of, write_csv
from antidote_fast.files import provenance
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.files.commit import output_folder
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.adapters import adapter_off, check_adapter, load_adapter
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import load_model, open_model, pick_device
from antidote_fast.models.targets import find_targets
from antidote_fast.stages import evaluate
from antidote_fast.stages.evidence import collect
from antidote_fast.stages.gates import stage
from antidote_fast.stages.gates.answers import check_texts
from antidote_fast.stages.inputs import (
    data_of,
    describe_backend,
    load_data,
    open_aligned,
    open_folders,
    unseen_data,
)
from antidote_fast.system.progress import Clock, Progress

PICTURE, ROWS = "curve.png", "rows.csv"


def run(config: SweepConfig, *, progress: Progress = False) -> dict:
    """Sweep a model of a folder or the hub; writes report.json, rows.csv, curve.png and norms.

    The model is pruned as it is loaded: with a ``dtype`` other than that of its files, ``prune`` of
    the files may remove other weights where scores are nearly equal.

    Returns:
        The contents of report.json: as :func:`sweep_model`, with ``clean``, the metrics of
        ``clean_adapter`` or None, ``command``, the line that makes the recommended model,
        ``datasets``, ``calibration`` and ``data``: what became of the records of each data set, by
        the kind of norms or the score that they were for. No text of a prompt is in it.

    Raises:
        DataError, UsageError, NothingPruned, BackendUnavailable: data, a model or an adapter that
            is refused, prompts to choose on that are in the calibration data, an output folder that
            is taken. AntidoteError: not enough memory.
    """
    clock = Clock()
    files = provenance.input_files(config)
    watch = Watch(*files)
    checked = check(config, progress)
    asked = checked.asked
    clock.lap("check")
    with output_folder(config.output_dir, config.overwrite) as folder:
        answers = None
        if checked.prompts:
            about = (checked.aligned, config.device, asked.tokenizer, checked.prompts, progress)
            answers = stage.answers_of(config.learning(), *about)
            clock.lap("ask the aligned model")
        judges = _judges(config, asked)
        how = config.picked("template", "max_new_tokens", "batch_size")
        prompts = Prompts(**asked.sets, task_name=config.task, judges=judges, **how)
        clean = None
        if checked.clean is not None:
            model = load_adapter(
                load_model(checked.base.folder, **config.load_options), checked.clean
            )
            clean = prompts.measure_all(model, asked.tokenizer, progress)
            del model  # before another is loaded
            clock.lap("evaluate clean")
        model = load_model(checked.base.folder, **config.load_options)
        if checked.adapter is not None:
            model = load_adapter(model, checked.adapter)
        bases = None
        if checked.aligned is not None:
            keys = [t.key for t in find_targets(model, config.targets, config.ignore)]
            bases = checked.aligned.read(keys, progress)
        clock.lap("load")
        data: dict[str, Any] = {}
        learn = _learner(config, model, checked, answers, bases, data, progress)
        norms, counts = {}, {}
        for kind in config.kinds:  # a pass over the data for each
            field = "preserve_dataset" if kind == "preserve" else "dataset"
            told, batches = config.collecting(kind), checked.batches[field]
            norms[kind], counts[kind] = collect(told, model, batches, progress=progress)
            data[kind] = {field: data_of(counts[kind])}
            if config.save_norms:
                norms[kind].save(folder / NORM_FILES[kind])
        clock.lap("calibrate")
        evidence = SweepEvidence(norms, bases, config.score_delta, learn)
        names = ("ratios", "scopes", "scores")
        names += ("max_accuracy_drop", "max_refusal_rise", "max_helped_drop")
        names += ("targets", "ignore", "seed", "backend")
        options = {name: getattr(config, name) for name in names} | {"progress": progress}
        results = sweep_model(model, asked.tokenizer, prompts, evidence, **options)
        best = results["recommended"]
        where = best and (best["score"], best["scope"], best["ratio"])
        results |= {
            "clean": clean,
            "command": where and config.command(*where),
            "datasets": asked.datasets,
            "calibration": counts,
            "data": data,
            "task": config.task,
            "judge": config.evaluation().judge,
            **checked.backend,
            "seconds": clock.seconds | results["seconds"],
        }
        models = {"clean": clean, "unpruned": results["unpruned"]}
        whole = dict.fromkeys(("score", "scope", "ratio", "achieved", "num_pruned"))
        rows = [{"model": name, **whole, **row} for name, row in models.items() if row is not None]
        rows += [{"model": "pruned", **row} for row in results["rows"]]
        write_csv([_flat(row) for row in rows], folder / ROWS)
        pictures.plot_sweep({"config": vars(config), **results}, folder / PICTURE)
        written = provenance.write_report(folder, "sweep", config, results, inputs=files)
        watch.check()
        return written


def _judges(config, asked):
    """The judge by name; beside one that only tells harm the phrases, as in evaluate."""
    name = config.evaluation().judge
    judges = {name: get_judge(name, **asked.judges[name])}
    if getattr(judges[name], "harm_only", False):
        judges[PhraseJudge.name] = PhraseJudge(labels=asked.labels)
    return judges


def _learner(config, model, checked, answers, bases, data, progress):
    """The scores of gate by a selection, or None where nothing is learned.

    What became of the records is put into ``data``, by the score.
    """
    if not checked.prompts:
        return None
    about = (model, checked.asked.tokenizer, checked.prompts)
    if answers is None:
        with adapter_off(model):
            answers = stage.ask(config.learning(), *about, progress)

    def learn(selection):
        settings = config.learning(selection.scope, selection.ratio)
        scores, told = stage.learn(settings, *about, answers, bases, progress)
        data[config.learned] = stage.data_of(checked.prompts, told)
        return scores

    return learn


def _flat(row):
    """A row for the table: its numbers, their intervals, then the counts of each set."""
    numbers = {name: value for name, value in row.items() if not isinstance(value, dict)}
    for metric in itertools.chain.from_iterable(SETS.values()):
        interval = interval_of(headline(row), metric) or (None, None)
        numbers |= {f"{metric}_low": interval[0], f"{metric}_high": interval[1]}
    for name in SETS:
        counts = row.get(name, {}).items()
        numbers |= {f"{name}_{k}": v for k, v in counts if isinstance(v, int | float)}
    return numbers


@dataclass(frozen=True)
class Checked:
    """What a sweep needs, checked, before weights are loaded.

    Args:
        base, adapter, clean, aligned: checkpoints; the last three may be None.
        asked: the records to choose on, and what else an evaluation needs.
        batches: {field of the config: calibration records in batches}.
        prompts: {field of the config: records that gates are learned on}; empty without.
        backend: as :func:`antidote_fast.stages.inputs.describe_backend`.
    """

    base: Checkpoint
    adapter: Checkpoint | None
    clean: Checkpoint | None
    aligned: Checkpoint | None
    asked: evaluate.EvaluationInputs
    batches: dict[str, Any]
    prompts: dict[str, list[Record]]
    backend: dict[str, Any]


def check(config: SweepConfig, progress: Progress = False) -> Checked:
    """Everything that can be refused without weights.

    Raises:
        As :func:`run`.
    """
    importlib.import_module("matplotlib")  # for the picture, which is drawn last
    backend = describe_backend(config.backend, pick_device(config.device))
    asked = evaluate.open_inputs(config.evaluation())
    data = {"dataset": {"all", "response"}, "preserve_dataset": {"preserve"}}
    collected_on = [name for name, kinds in data.items() if kinds.intersection(config.kinds)]
    records = {name: load_data(config, None, name) for name in collected_on}
    learned_on = unseen_data(config.learning()) if config.learned else ()
    prompts = {name: load_data(config.learning(), None, name) for name in learned_on}
    for name, some in asked.sets.items():
        _check_apart(config, f"{name}_dataset", some, [*records.items(), *prompts.items()])
    base, adapter = open_folders(config, progress)
    clean = None
    if config.clean_adapter is not None:
        clean = open_model(config, "clean_adapter")
        check_adapter(clean, base)
    aligned = open_aligned(config, base, progress)
    about = (asked.tokenizer, base.config)
    batches = {name: batches_of(config, some, *about) for name, some in records.items()}
    if config.learned:
        stage.check_stage(config.learning(), base, adapter is not None)
        texts = stage.kinds(prompts) | stage.texts_of(config.learning())
        check_texts(asked.tokenizer, **texts)
    check_memory(config, [base, adapter])
    return Checked(base, adapter, clean, aligned, asked, batches, prompts, backend)


def _check_apart(config, field, records, calibration):
    """Refuse prompts to choose on that are calibrated on: what is chosen would look too good."""
    for name, others in calibration:
        seen = {record.prompt_key for record in others}
        common = sum(record.prompt_key in seen for record in records)
        if common:
            raise DataError(
                f"{field}={getattr(config, field)!r}: {common} of its {len(records)} prompts are "
                f"in {name}={getattr(config, name)!r}, which calibrates; must be held out from it"
            )
