"""The evaluate stage: what a model answers, judged and counted."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from antidote_fast.config.base import check
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.data.batches import Examples, build_prompt, make_batches, prompt_ids
from antidote_fast.data.load import load_records
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.drift import embedding_drift
from antidote_fast.evaluation.generate import check_length
from antidote_fast.evaluation.judges import check_judge, get_judge
from antidote_fast.evaluation.measure import answer_sets, limits_of, score_answers
from antidote_fast.evaluation.tasks import check_task
from antidote_fast.files import provenance
from antidote_fast.files.checkpoint import Checkpoint, open_checkpoint
from antidote_fast.files.commit import check_output_folder, digest_of, output_folder
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.adapters import check_adapter
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import load_model, load_tokenizer, open_model, resolve_folder
from antidote_fast.stages.inputs import load_folders
from antidote_fast.system.progress import Clock

OUTPUTS = "outputs.jsonl"


def run(config: EvaluateConfig, *, progress: Any = False) -> dict:
    """Measure a model of a folder or the hub and write a folder with report.json.

    Data, judges, files and lengths are checked before any weights are loaded. The judge is loaded
    when the model has answered and is gone again.

    Returns:
        The contents of report.json: ``metrics`` (as `score_answers`, and ``drift``), ``datasets``
        (source, records used, dropped for length, a hash of them) and ``seconds`` by step. No text
        of a prompt or answer is in it; with ``save_outputs`` those are in outputs.jsonl.

    Raises:
        DataError: data, a model or an adapter that cannot be used, an output folder that is taken.
        UsageError: options that do not go together.
        AntidoteError: not enough memory.
    """
    clock = Clock()
    files = provenance.input_files(config)
    watch = Watch(*files)
    inputs = open_inputs(config)
    sets, drift_batches = inputs.sets, inputs.drift_batches
    check_memory(config, [inputs.base, inputs.adapter])
    clock.lap("check")

    with output_folder(config.output_dir, overwrite=config.overwrite) as folder:
        model = load_folders(config, inputs.base, inputs.adapter)
        clock.lap("load")
        how = config.picked("template", "batch_size") | {"progress": progress}
        limits = limits_of(config.max_new_tokens, config.task, sets)
        answers = answer_sets(model, inputs.tokenizer, sets, max_new_tokens=limits, **how)
        clock.lap("generate")
        metrics = {}
        if drift_batches:
            reference = load_model(config.reference_model, **config.load_options)
            metrics["drift"] = embedding_drift(model, reference, drift_batches, progress=progress)
            metrics["drift"]["num_dropped"] = drift_batches.num_dropped
            del reference
            clock.lap("drift")
        del model  # a judge of 7B parameters wants the memory
        judges: dict[str, Any] = {}
        if "harmful" in sets:
            judges["judge"] = get_judge(config.judge, **inputs.judge)
        if "task" in sets and config.win_rate_judge:
            from antidote_fast.evaluation.classifiers import WinRateJudge

            path, options = config.win_rate_judge, {"device": config.device}
            judges["win_rate_judge"] = WinRateJudge.from_pretrained(path, **options)
        scores = score_answers(sets, answers, task=config.task, **judges, progress=progress)
        clock.lap("judge")
        if config.save_outputs:
            _write_outputs(folder / OUTPUTS, sets, answers)
        results = {
            "metrics": {**scores, **metrics},
            "task": config.task if "task" in sets else None,
            "judge": config.judge if "harmful" in sets else None,
            "datasets": inputs.datasets,
            "seconds": clock.seconds,
        }
        report = provenance.write_report(folder, "evaluate", config, results, inputs=files)
        watch.check()
        return report


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation starts from, opened and checked.

    Args:
        base, adapter: checkpoints; the adapter is None without one.
        tokenizer: the base's.
        sets: records by harmful, task and benign; those too long are left out.
        datasets: what the report says of them.
        drift_batches: what the embedding drift is measured on; None without it.
        judge: options of :func:`antidote_fast.evaluation.judges.get_judge`.
    """

    base: Checkpoint
    adapter: Checkpoint | None
    tokenizer: Any
    sets: dict[str, list[Record]]
    datasets: dict[str, dict]
    drift_batches: Examples | None
    judge: dict


def open_inputs(config: EvaluateConfig) -> EvaluationInputs:
    """Open what evaluate reads, and refuse what does not go together; no weights are loaded.

    Raises:
        As :func:`run`.
    """
    check_output_folder(config.output_dir, config.overwrite)
    judge = _check_judges(config)
    sets = {
        name: load_records(source, split="test", limit=config.num_samples)
        for name in ("harmful", "task", "benign")
        if (source := getattr(config, f"{name}_dataset"))
    }
    if "task" in sets:
        check_task(config.task, sets["task"])
    base = open_model(config)
    adapter = open_model(config, "adapter") if config.adapter else None
    if adapter:
        check_adapter(adapter, base)
    if config.reference_model:
        open_model(config, "reference_model")
    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    sets, datasets = _drop_long(sets, tokenizer, config, base.config)
    drift_batches = None
    if config.drift_dataset:
        records = load_records(config.drift_dataset, limit=config.num_samples, require_output=True)
        how = config.picked("template", "max_seq_length", "batch_size")
        drift_batches = make_batches(records, tokenizer, **how)
    return EvaluationInputs(base, adapter, tokenizer, sets, datasets, drift_batches, judge)


def _check_judges(config):
    """Refuse a judge that cannot be had; returns options of ``get_judge``."""
    options = {"harmful_labels": config.harmful_labels}
    if config.harmful_dataset:
        check_judge(config.judge, **options)
    else:
        usual = config.judge == "refusal" and not config.harmful_labels
        check(usual, "judge", config.judge, "left out without harmful_dataset, which it judges")
    if config.task_dataset and config.win_rate_judge:
        open_checkpoint(resolve_folder(config.win_rate_judge))
    return {**options, "device": config.device}


def _drop_long(sets, tokenizer, config, model_config):
    """The records whose prompts leave room for an answer, and what the report says of each set."""
    fitting: dict[str, list[Record]] = {}
    described, limit, longest = {}, config.max_seq_length, 0
    for name, records in sets.items():
        source = getattr(config, f"{name}_dataset")
        short = fitting[name] = []
        for record in records:
            text = build_prompt(record, config.template, tokenizer)
            length = len(prompt_ids(text, tokenizer, limit, record.where or "a prompt"))
            if length < limit:
                short.append(record)
                longest = max(longest, length)
        if not short:
            raise DataError(
                f"{source}: all {len(records)} prompts have {limit} tokens or more: raise "
                "max_seq_length"
            )
        described[name] = {
            "source": source,
            "num_records": len(short),
            "num_dropped": len(records) - len(short),
            "sha256": digest_of([asdict(record) for record in short]),
        }
    positions = model_config.get("max_position_embeddings", model_config.get("n_positions"))
    if fitting and isinstance(positions, int):
        check_length(positions, longest, config.max_new_tokens or 128)
    return fitting, described


def _write_outputs(path, sets, answers):
    with open(path, "w", encoding="utf-8") as file:
        for name, records in sets.items():
            for record, answer in zip(records, answers[name], strict=True):
                row = {"set": name, **asdict(record), "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
