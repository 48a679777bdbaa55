"""The evaluate stage, and the same measurements on a live model."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from antidote_fast import checkpoint
from antidote_fast.errors import DataError, UsageError
from antidote_fast.pipeline import stage
from antidote_fast.pipeline.config import EvaluateConfig
from antidote_fast.pipeline.data import (
    Record,
    build_prompt,
    load_records,
    local_file,
    make_batches,
    prompt_ids,
)
from antidote_fast.pipeline.drift import embedding_drift
from antidote_fast.pipeline.estimate import check_memory
from antidote_fast.pipeline.generate import check_length, generate
from antidote_fast.pipeline.judges import check_judge, get_judge
from antidote_fast.pipeline.metrics import (
    benign_refusal_rate,
    check_task,
    finetune_accuracy,
    harmful_score,
)
from antidote_fast.pipeline.refusals import RefusalJudge
from antidote_fast.safe_open import Watch

OUTPUTS = "outputs.jsonl"


def answer_sets(
    model,
    tokenizer,
    sets: Mapping[str, Sequence[Record]],
    *,
    template: str = "alpaca",
    max_new_tokens: int | Mapping[str, int] = 512,
    batch_size: int = 8,
    progress=False,
) -> dict[str, list[str]]:
    """Greedy answers to several sets of records; sets with the same limit share their batches.

    Args:
        model: a causal language model.
        tokenizer: its own.
        sets: records by name.
        template: alpaca or chat.
        max_new_tokens: one limit, or one a name.
        batch_size: prompts at once.
        progress: as `antidote_fast.progress.track` takes it.

    Returns:
        The answers by name, in the order of the records.
    """
    limits = {
        name: max_new_tokens[name] if isinstance(max_new_tokens, Mapping) else max_new_tokens
        for name in sets
    }
    answers: dict[str, list[str]] = {}
    for limit in dict.fromkeys(limits.values()):
        names = [name for name in sets if limits[name] == limit]
        prompts = [
            build_prompt(record, template, tokenizer) for name in names for record in sets[name]
        ]
        flat = iter(
            generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=limit,
                batch_size=batch_size,
                progress=progress,
            )
        )
        answers.update({name: [next(flat) for _ in sets[name]] for name in names})
    return answers


def score_answers(
    sets: Mapping[str, Sequence[Record]],
    answers: Mapping[str, Sequence[str]],
    *,
    task: str = "label",
    judge=None,
    win_rate_judge=None,
    progress=False,
) -> dict:
    """The metrics of answers, by the sets "harmful", "task" and "benign" that are there.

    Returns:
        ``harmful_score``, ``finetune_accuracy``, ``benign_refusal_rate`` in percent, and under the
        set's name its counts (`metrics`) with a hash of its answers.
    """
    judge = judge or RefusalJudge()
    results = {}
    if "harmful" in sets:
        prompts = [f"{r.instruction}\n{r.input}".strip() for r in sets["harmful"]]
        results["harmful"] = harmful_score(answers["harmful"], judge, prompts, progress=progress)
    if "task" in sets:
        results["task"] = finetune_accuracy(
            task, sets["task"], answers["task"], win_rate_judge, progress=progress
        )
    if "benign" in sets:
        results["benign"] = benign_refusal_rate(answers["benign"], judge)
    headline = {}
    for name, counts in results.items():
        metric = next(iter(counts))
        headline[metric] = counts.pop(metric)
        counts["answers_sha256"] = _hash(answers[name])
    return {**headline, **results}


def evaluate_model(
    model,
    tokenizer,
    *,
    harmful: Sequence[Record] | None = None,
    task_records: Sequence[Record] | None = None,
    task: str = "label",
    benign: Sequence[Record] | None = None,
    judge=None,
    win_rate_judge=None,
    template: str = "alpaca",
    max_new_tokens: int | Mapping[str, int] = 512,
    batch_size: int = 8,
    progress=False,
) -> dict:
    """Measure a live model on whichever of the three sets are given.

    With the refusal judge some two dozen tokens an answer are enough, for a label its own few:
    ``max_new_tokens={"harmful": 24, "task": 8, "benign": 24}``.

    Args:
        model: a causal language model, PEFT-wrapped or not; its mode is restored.
        tokenizer: its own.
        harmful: held-out harmful prompts.
        task_records: held-out records of the user's task.
        task: how those are scored (`metrics.finetune_accuracy`).
        benign: ordinary prompts.
        judge: of the harmful score; a `RefusalJudge` where None.
        win_rate_judge: for task alpaca.
        template: alpaca or chat.
        max_new_tokens: one limit, or one for each of harmful, task, benign.
        batch_size: prompts at once.
        progress: as `antidote_fast.progress.track` takes it.

    Returns:
        As `score_answers`.

    Raises:
        UsageError: nothing to measure, an option out of range.
        DataError: records that cannot be scored, prompts longer than the model's positions.
    """
    sets = {"harmful": harmful, "task": task_records, "benign": benign}
    sets = {name: records for name, records in sets.items() if records is not None}
    if not sets:
        raise UsageError("harmful=None: must be records, unless task_records or benign are given")
    if "task" in sets:
        check_task(task, sets["task"])
    options = {"template": template, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers = answer_sets(model, tokenizer, sets, progress=progress, **options)
    return score_answers(
        sets, answers, task=task, judge=judge, win_rate_judge=win_rate_judge, progress=progress
    )


# --- the stage ------------------------------------------------------------------------------------


def run(config: EvaluateConfig, *, progress=False) -> dict:
    """Measure a model of a folder or the hub and write a folder with report.json.

    Data, judges, files and lengths are checked before any weights are loaded. The judge is loaded
    when the model has answered and is gone again.

    Args:
        config: what to measure.
        progress: as `antidote_fast.progress.track` takes it.

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
    watch = Watch(*_inputs(config))
    checkpoint.check_output_folder(config.output_dir, config.overwrite)
    judge_options = _check_judges(config)
    sets = _load_sets(config)
    base, adapter = _check_models(config)
    tokenizer = checkpoint.load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    sets, datasets = _drop_long(sets, tokenizer, config, base.config)
    drift_batches = None
    if config.drift_dataset:
        drift_batches = make_batches(
            load_records(config.drift_dataset, limit=config.num_samples, require_output=True),
            tokenizer,
            template=config.template,
            max_seq_length=config.max_seq_length,
            batch_size=config.batch_size,
        )
    check_memory(config, [base, adapter])
    clock.lap("check")

    with checkpoint.output_folder(config.output_dir, overwrite=config.overwrite) as folder:
        options = {
            "dtype": config.dtype,
            "device": config.device,
            "trust_remote_code": config.trust_remote_code,
        }
        model = checkpoint.load_model(base.folder, **options)
        if adapter:
            model = checkpoint.load_adapter(model, adapter)
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
            reference = checkpoint.load_model(config.reference_model, **options)
            metrics["drift"] = embedding_drift(model, reference, drift_batches, progress=progress)
            metrics["drift"]["num_dropped"] = drift_batches.num_dropped
            del reference
            clock.lap("drift")
        del model  # a judge of 7B parameters wants the memory
        judge = win_rate_judge = None
        if "harmful" in sets:
            judge = get_judge(config.judge, **judge_options)
        if "task" in sets and config.win_rate_judge:
            from antidote_fast.pipeline.classifiers import WinRateJudge

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
            "datasets": datasets,
            "seconds": clock.seconds,
        }
        report = stage.write_report(folder, "evaluate", config, results, inputs=_inputs(config))
        watch.check()
        return report


class Clock:
    """Seconds by step: each lap is what passed since the one before, added to its name."""

    def __init__(self):
        self.seconds = {}
        self._last = time.perf_counter()

    def lap(self, name):
        """Add the time since the last lap to a step."""
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 3)
        self._last = now


def _check_judges(config) -> dict:
    options = {"harmful_labels": config.harmful_labels}
    if config.harmful_dataset:
        check_judge(config.judge, **options)
    elif config.judge != "refusal" or config.harmful_labels:
        raise UsageError(
            f"judge={config.judge!r}: must be left out without harmful_dataset, which it judges"
        )
    if config.task_dataset and config.win_rate_judge:
        checkpoint.open_checkpoint(checkpoint.resolve_folder(config.win_rate_judge))
    return {**options, "device": config.device}


def _load_sets(config) -> dict[str, list[Record]]:
    sources = {
        "harmful": config.harmful_dataset,
        "task": config.task_dataset,
        "benign": config.benign_dataset,
    }
    sets = {
        name: load_records(source, split="test", limit=config.num_samples)
        for name, source in sources.items()
        if source
    }
    if "task" in sets:
        check_task(config.task, sets["task"])
    return sets


def _check_models(config):
    """The checked folders of the base and, where there is one, of the adapter."""

    def opened(argument):
        name = getattr(config, argument)
        folder = checkpoint.resolve_folder(name, argument)
        found = checkpoint.open_checkpoint(folder, trust_remote_code=config.trust_remote_code)
        if found.is_adapter != (argument == "adapter"):
            is_, other = ("a PEFT adapter", "a whole model")[:: 1 if found.is_adapter else -1]
            raise DataError(f"{argument}={name!r}: is {is_}; give {other}")
        return found

    base = opened("model_name_or_path")
    adapter = opened("adapter") if config.adapter else None
    if adapter:
        checkpoint.check_adapter(adapter, base)
    if config.reference_model:
        opened("reference_model")
    return base, adapter


def _drop_long(sets, tokenizer, config, model_config):
    """The records whose prompts leave room for an answer, and what the report says of each set."""
    sources = {
        "harmful": config.harmful_dataset,
        "task": config.task_dataset,
        "benign": config.benign_dataset,
    }
    kept, described = {}, {}
    longest = 0
    for name, records in sets.items():
        lengths = [_length(record, tokenizer, config) for record in records]
        pairs = zip(records, lengths, strict=True)
        kept[name] = [record for record, n in pairs if n < config.max_seq_length]
        if not kept[name]:
            raise DataError(
                f"{sources[name]}: all {len(records)} prompts have {config.max_seq_length} tokens "
                "or more: raise max_seq_length"
            )
        longest = max([longest, *(n for n in lengths if n < config.max_seq_length)])
        described[name] = {
            "source": sources[name],
            "num_records": len(kept[name]),
            "num_dropped": len(records) - len(kept[name]),
            "sha256": _hash([asdict(record) for record in kept[name]]),
        }
    positions = model_config.get("max_position_embeddings", model_config.get("n_positions"))
    if kept and isinstance(positions, int):
        check_length(positions, longest, config.max_new_tokens)
    return kept, described


def _length(record, tokenizer, config) -> int:
    """Tokens of a record's prompt; of one that is too long at least as many as are too many."""
    text = build_prompt(record, config.template, tokenizer)
    return len(prompt_ids(text, tokenizer, config.max_seq_length, record.where or "a prompt"))


def _hash(value) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _inputs(config) -> list:
    data = (
        config.harmful_dataset,
        config.task_dataset,
        config.benign_dataset,
        config.drift_dataset,
    )
    models = (config.model_name_or_path, config.adapter, config.reference_model)
    return [*models, *(local_file(name) for name in data if name)]


def _write_outputs(path, sets, answers) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for name, records in sets.items():
            for record, answer in zip(records, answers[name], strict=True):
                row = {"set": name, **asdict(record), "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
