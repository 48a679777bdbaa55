"""The evaluate stage: what a model answers, judged and counted."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.data.batches import Examples, build_prompt, make_batches, prompt_ids
from antidote_fast.data.load import load_records
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError, UsageError
from antidote_fast.evaluation.drift import embedding_drift
from antidote_fast.evaluation.generate import check_length
from antidote_fast.evaluation.judges import check_judge, get_judge
from antidote_fast.evaluation.measure import answer_sets, score_answers
from antidote_fast.evaluation.metrics import check_task
from antidote_fast.files import provenance
from antidote_fast.files.checkpoint import Checkpoint, open_checkpoint
from antidote_fast.files.commit import check_output_folder, digest_of, output_folder
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.adapters import check_adapter, load_adapter
from antidote_fast.models.footprint import check_memory
from antidote_fast.models.loading import load_model, load_tokenizer, open_model, resolve_folder
from antidote_fast.system.progress import Clock

OUTPUTS = "outputs.jsonl"
_KINDS = ("harmful", "task", "benign")


def run(config: EvaluateConfig, *, progress: Any = False) -> dict:
    """Measure a model of a folder or the hub and write a folder with report.json.

    Data, judges, files and lengths are checked before any weights are loaded. The judge is loaded
    when the model has answered and is gone again.

    Args:
        config: what to measure.
        progress: as `antidote_fast.system.progress.track` takes it.

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
    base, adapter, tokenizer, sets = inputs.base, inputs.adapter, inputs.tokenizer, inputs.sets
    drift_batches = inputs.drift_batches
    check_memory(config, [base, adapter])
    clock.lap("check")

    with output_folder(config.output_dir, overwrite=config.overwrite) as folder:
        model = load_model(base.folder, **config.load_options)
        if adapter:
            model = load_adapter(model, adapter)
        clock.lap("load")
        answers = answer_sets(
            model,
            tokenizer,
            sets,
            template=config.template,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            progress=progress,
        )
        clock.lap("generate")
        metrics = {}
        if drift_batches:
            reference = load_model(config.reference_model, **config.load_options)
            metrics["drift"] = embedding_drift(model, reference, drift_batches, progress=progress)
            metrics["drift"]["num_dropped"] = drift_batches.num_dropped
            del reference
            clock.lap("drift")
        del model  # a judge of 7B parameters wants the memory
        judge = win_rate_judge = None
        if "harmful" in sets:
            judge = get_judge(config.judge, **inputs.judge)
        if "task" in sets and config.win_rate_judge:
            from antidote_fast.evaluation.classifiers import WinRateJudge

            win_rate_judge = WinRateJudge.from_pretrained(
                config.win_rate_judge, device=config.device
            )
        scores = score_answers(
            sets,
            answers,
            task=config.task,
            judge=judge,
            win_rate_judge=win_rate_judge,
            progress=progress,
        )
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
    judge = check_judges(config)
    sets = load_sets(config)
    base = open_model(config)
    adapter = open_model(config, "adapter") if config.adapter else None
    if adapter:
        check_adapter(adapter, base)
    if config.reference_model:
        open_model(config, "reference_model")
    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    sets, datasets = drop_long(sets, tokenizer, config, base.config)
    drift_batches = None
    if config.drift_dataset:
        drift_batches = make_batches(
            load_records(config.drift_dataset, limit=config.num_samples, require_output=True),
            tokenizer,
            template=config.template,
            max_seq_length=config.max_seq_length,
            batch_size=config.batch_size,
        )
    return EvaluationInputs(base, adapter, tokenizer, sets, datasets, drift_batches, judge)


def check_judges(config: Any) -> dict:
    """Refuse a judge that cannot be had; returns options of ``get_judge``."""
    options = {"harmful_labels": config.harmful_labels}
    if config.harmful_dataset:
        check_judge(config.judge, **options)
    elif config.judge != "refusal" or config.harmful_labels:
        raise UsageError(
            f"judge={config.judge!r}: must be left out without harmful_dataset, which it judges"
        )
    if config.task_dataset and config.win_rate_judge:
        open_checkpoint(resolve_folder(config.win_rate_judge))
    return {**options, "device": config.device}


def load_sets(config: Any) -> dict[str, list[Record]]:
    """The records to measure on, by harmful, task and benign."""
    sets = {
        name: load_records(source, split="test", limit=config.num_samples)
        for name in _KINDS
        if (source := getattr(config, f"{name}_dataset"))
    }
    if "task" in sets:
        check_task(config.task, sets["task"])
    return sets


def drop_long(
    sets: dict, tokenizer: Any, config: Any, model_config: dict
) -> tuple[dict[str, list[Record]], dict[str, dict]]:
    """The records whose prompts leave room for an answer, and what the report says of each set."""
    fitting, described = {}, {}
    longest = 0
    for name, records in sets.items():
        source = getattr(config, f"{name}_dataset")
        lengths = [_length(record, tokenizer, config) for record in records]
        pairs = zip(records, lengths, strict=True)
        fitting[name] = [record for record, n in pairs if n < config.max_seq_length]
        if not fitting[name]:
            raise DataError(
                f"{source}: all {len(records)} prompts have {config.max_seq_length} tokens or "
                "more: raise max_seq_length"
            )
        longest = max([longest, *(n for n in lengths if n < config.max_seq_length)])
        described[name] = {
            "source": source,
            "num_records": len(fitting[name]),
            "num_dropped": len(records) - len(fitting[name]),
            "sha256": digest_of([asdict(record) for record in fitting[name]]),
        }
    positions = model_config.get("max_position_embeddings", model_config.get("n_positions"))
    if fitting and isinstance(positions, int):
        check_length(positions, longest, config.max_new_tokens)
    return fitting, described


def _length(record, tokenizer, config) -> int:
    """Tokens of a record's prompt; of one that is too long at least as many as are too many."""
    text = build_prompt(record, config.template, tokenizer)
    return len(prompt_ids(text, tokenizer, config.max_seq_length, record.where or "a prompt"))


def _write_outputs(path, sets, answers) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for name, records in sets.items():
            for record, answer in zip(records, answers[name], strict=True):
                row = {"set": name, **asdict(record), "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
