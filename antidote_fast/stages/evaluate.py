"""The evaluate stage: what a model answers, judged and counted."""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from antidote_fast.config.base import TEMPLATES, check, each_of
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.data.batches import Examples, make_batches, prompt_ids
from antidote_fast.data.load import load_records, local_file
from antidote_fast.data.near import without_near
from antidote_fast.data.records import Record
from antidote_fast.errors import DataError
from antidote_fast.evaluation.compare import (
    VERDICTS_FILE,
    check_in_common,
    compare_models,
    read_verdicts,
)
from antidote_fast.evaluation.conditions import (
    PREFILL,
    Answers,
    Condition,
    kinds_asked,
    make_conditions,
    prompt_id,
)
from antidote_fast.evaluation.drift import embedding_drift
from antidote_fast.evaluation.generate import check_length
from antidote_fast.evaluation.judges import check_judge, get_judge
from antidote_fast.evaluation.measure import (
    ask,
    certain_by,
    default_tokens,
    judge_answers,
    judge_ordinary,
    score_task,
    task_labels,
)
from antidote_fast.evaluation.summary import summarise, verdict_rows
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
KINDS = ("harmful", "task", "benign")
"""The kinds of prompts, a field `<kind>_dataset` each."""


def run(config: EvaluateConfig, *, progress: Any = False) -> dict:
    """Measure a model of a folder or the hub; writes report.json and verdicts.jsonl.

    Data, judges, files and lengths are checked before any weights are loaded. Judges are loaded
    when the model has answered, one at a time, and are gone again.

    Returns:
        The contents of report.json: ``metrics`` (the headline of `summarise`, ``worst``, and
        ``drift``), ``conditions``, ``judges`` and ``agreement`` as `summarise` has them,
        ``datasets`` (of each set its source, records used, those left out as too long or near to
        ``held_out_from``, a hash), ``compared`` (`compare_models`, this model first) and
        ``seconds`` by step. No text of a prompt or answer is in it; with ``save_outputs`` those are
        in outputs.jsonl.

    Raises:
        DataError: data, a model or an adapter that cannot be used, an output folder that is taken.
        UsageError: options that do not go together.
        AntidoteError: not enough memory.
    """
    clock = Clock()
    files = provenance.input_files(config)
    watch = Watch(*files)
    inputs = open_inputs(config)
    sets, drift_batches = inputs.sets_by_kind, inputs.drift_batches
    check_memory(config, [inputs.base, inputs.adapter])
    clock.lap("check")

    with output_folder(config.output_dir, overwrite=config.overwrite) as folder:
        model = load_folders(config, inputs.base, inputs.adapter)
        clock.lap("load")
        # A judge that is a model reads whole answers; the phrases are sure of one early.
        readers = [get_judge("refusal", **inputs.judge)] if config.only_phrases else []
        answers = ask(
            model,
            inputs.tokenizer,
            sets,
            inputs.conditions,
            max_new_tokens=inputs.max_new_tokens,
            is_certain=certain_by(readers),
            batch_size=config.batch_size,
            progress=progress,
        )
        clock.lap("generate")
        drift = {}
        if drift_batches:
            reference = load_model(config.reference_model, **config.load_options)
            drift["drift"] = embedding_drift(model, reference, drift_batches, progress=progress)
            drift["drift"]["num_dropped"] = drift_batches.num_dropped
            del reference
            clock.lap("drift")
        del model  # a judge of 7B parameters wants the memory
        verdicts = _verdicts(config, inputs, answers, progress)
        accuracies = _score_task(config, sets, answers, progress)
        clock.lap("judge")
        scores = summarise(answers, verdicts, accuracies)
        rows = verdict_rows(sets, answers, verdicts, config.task)
        _write_lines(folder / VERDICTS_FILE, rows)
        if config.save_outputs:
            _write_lines(folder / OUTPUTS, _outputs(sets, answers))
        beside = ("conditions", "judges", "agreement")
        results = {
            "metrics": {k: v for k, v in scores.items() if k not in beside} | drift,
            **{name: scores[name] for name in beside},
            "compared": compare_models(rows, inputs.others) if inputs.others else None,
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
        sets_by_kind: records by kind (harmful, task, benign) and set; what is left out is not in.
        datasets: what the report says of them, in the same shape.
        conditions: how they are asked, the headline's first.
        max_new_tokens: most tokens an answer, by kind.
        drift_batches: what the embedding drift is measured on; None without it.
        judge: options of :func:`antidote_fast.evaluation.judges.get_judge`.
        others: the verdicts of ``compare_with``; empty without it.
    """

    base: Checkpoint
    adapter: Checkpoint | None
    tokenizer: Any
    sets_by_kind: dict[str, dict[str, list[Record]]]
    datasets: dict[str, dict]
    conditions: list[Condition]
    max_new_tokens: dict[str, int]
    drift_batches: Examples | None
    judge: dict
    others: list[dict] = field(default_factory=list)

    @property
    def sets(self) -> dict[str, list[Record]]:
        """Records by kind, all sets of a kind together."""
        return {
            kind: [record for records in named.values() for record in records]
            for kind, named in self.sets_by_kind.items()
        }


def open_inputs(config: EvaluateConfig) -> EvaluationInputs:
    """Open what evaluate reads, and refuse what does not go together; no weights are loaded.

    Raises:
        As :func:`run`.
    """
    check_output_folder(config.output_dir, config.overwrite)
    judge = _check_judges(config)
    others = read_verdicts(config.compare_with, "compare_with") if config.compare_with else []
    sets, datasets = _load_sets(config)
    for records in sets.get("task", {}).values():
        check_task(config.task, records)
        judge["labels"] = task_labels(config.task, records)
    base = open_model(config)
    adapter = open_model(config, "adapter") if config.adapter else None
    if adapter:
        check_adapter(adapter, base)
    if config.reference_model:
        open_model(config, "reference_model")
    tokenizer = load_tokenizer(base.folder, trust_remote_code=config.trust_remote_code)
    conditions = make_conditions(
        _templates(config, tokenizer), config.system_prompt or "", PREFILL * config.prefill
    )
    new_tokens = default_tokens(config.task, config.only_phrases)
    if config.max_new_tokens is not None:
        new_tokens = dict.fromkeys(new_tokens, config.max_new_tokens)
    sets = _drop_long(sets, datasets, tokenizer, config, base.config, conditions, new_tokens)
    if others:
        _check_others(config, sets, conditions, others)
    drift_batches = None
    if config.drift_dataset:
        records = load_records(config.drift_dataset, limit=config.num_samples, require_output=True)
        how = config.picked("template", "max_seq_length", "batch_size")
        drift_batches = make_batches(records, tokenizer, **how)
    return EvaluationInputs(
        base,
        adapter,
        tokenizer,
        sets,
        datasets,
        conditions,
        new_tokens,
        drift_batches,
        judge,
        others,
    )


def _templates(config, tokenizer):
    """The templates asked for; else that of the training, and the other one where there is one."""
    if config.templates is not None:
        return config.templates
    has_chat = getattr(tokenizer, "chat_template", None)
    every = [name for name in TEMPLATES if name != "chat" or has_chat]
    return list(dict.fromkeys([config.template, *every]))


def _check_judges(config):
    """Refuse a judge that cannot be had; returns options of ``get_judge``."""
    server = {"url": config.judge_url, "model": config.judge_model}
    options = {"harmful_labels": config.harmful_labels, **server}
    if config.harmful_dataset or config.benign_dataset:
        for name in config.judges:
            check_judge(name, **_options_of(config, name, options))
    if not config.harmful_dataset:
        usual = config.only_phrases and not config.harmful_labels
        judges = config.judges if len(config.judges) > 1 else config.judge
        check(usual, "judges", judges, "left out without harmful_dataset, which they judge")
    if config.task_dataset and config.win_rate_judge:
        open_checkpoint(resolve_folder(config.win_rate_judge))
    return {**options, "labels": (), "device": config.device}


def _options_of(config, name, options):
    """The options of one judge of several: labels and a server are for those that are models."""
    if name == "refusal" and not config.only_phrases:
        return options | {"harmful_labels": None, "url": None, "model": None}
    return options


def _load_sets(config):
    """The records of each set, and what the report says of each."""
    others = [record for source in each_of(config.held_out_from) for record in load_records(source)]
    sets: dict[str, dict[str, list[Record]]] = {}
    datasets: dict[str, dict] = {}
    for kind in KINDS:
        sources = each_of(getattr(config, f"{kind}_dataset"))
        for source, name in zip(sources, set_names(sources), strict=True):
            limit = None if others else config.num_samples
            records, near = load_records(source, split="test", limit=limit), 0
            if others:
                records, near = without_near(records, others)
                records = records[: config.num_samples]
            if not records:
                raise DataError(
                    f"{source}: all {near} prompts are near to one of held_out_from="
                    f"{config.held_out_from!r}; none is left"
                )
            sets.setdefault(kind, {})[name] = records
            datasets.setdefault(kind, {})[name] = {"source": source, "num_near": near}
    return sets, datasets


def set_names(sources: Sequence[str]) -> list[str]:
    """What the sets of these data sets are called: a file by its name, else as they are named.

    The name is the same wherever a file lies, so that two evaluations can be compared. Where two
    files share a name, all are called as they are given.
    """
    names = []
    for source in sources:
        path = local_file(source)
        names.append(source if path is None else Path(path).name + source[len(path) :])
    return names if len({*names}) == len(names) else list(sources)


def _drop_long(sets, datasets, tokenizer, config, model_config, conditions, new_tokens):
    """The records whose prompts leave room for an answer in every condition, so that all ask them.

    What the report says of each set is completed.
    """
    limit = config.max_seq_length
    fitting: dict[str, dict[str, list[Record]]] = {}
    positions = model_config.get("max_position_embeddings", model_config.get("n_positions"))
    for kind, named in sets.items():
        asked, longest = [c for c in conditions if kind in kinds_asked(c, sets)], 0
        for name, records in named.items():
            short = fitting.setdefault(kind, {})[name] = []
            for record in records:
                where = record.where or "a prompt"
                texts = [condition.prompt(record, tokenizer) for condition in asked]
                length = max(len(prompt_ids(text, tokenizer, limit, where)) for text in texts)
                if length < limit:
                    short.append(record)
                    longest = max(longest, length)
            told = datasets[kind][name]
            if not short:
                raise DataError(
                    f"{told['source']}: all {len(records)} prompts have {limit} tokens or more: "
                    "raise max_seq_length"
                )
            too_long = len(records) - len(short)
            told |= {
                "num_records": len(short),
                "num_dropped": too_long + told["num_near"],
                "num_too_long": too_long,
                "sha256": digest_of([asdict(record) for record in short]),
            }
        if isinstance(positions, int):
            check_length(positions, longest, new_tokens[kind])
    return fitting


def _check_others(config, sets, conditions, others):
    """Refuse another model's verdicts on none of these prompts."""
    asked = (
        (condition.name, kind, name, prompt_id(record))
        for condition in conditions
        for kind, named in kinds_asked(condition, sets).items()
        for name, records in named.items()
        for record in records
    )
    check_in_common(others, asked, f"compare_with={config.compare_with!r}")


def _verdicts(config, inputs, answers, progress):
    """The verdicts of each judge, which is in memory for as long as it judges."""
    sets = inputs.sets_by_kind
    verdicts: dict[str, Answers] = {}
    if not {"harmful", "benign"} & sets.keys():
        return verdicts
    for name in config.judges:
        judge = get_judge(name, **_options_of(config, name, inputs.judge))
        verdicts[name] = judge_answers(judge, sets, answers, progress=progress)
        del judge
        gc.collect()  # a model's modules refer to each other
    judge_ordinary(verdicts, sets, answers, inputs.judge["labels"])
    return verdicts


def _score_task(config, sets, answers, progress):
    if "task" not in sets:
        return {}
    judge = None
    if config.win_rate_judge:
        from antidote_fast.evaluation.classifiers import WinRateJudge

        judge = WinRateJudge.from_pretrained(config.win_rate_judge, device=config.device)
    return score_task(config.task, sets, answers, judge, progress=progress)


def _outputs(sets: dict, answers: Answers):
    for condition, kinds in answers.items():
        for kind, named in kinds.items():
            for name, texts in named.items():
                where = {"condition": condition, "kind": kind, "set": name}
                for record, answer in zip(sets[kind][name], texts, strict=True):
                    yield {**where, **asdict(record), "answer": answer}


def _write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
