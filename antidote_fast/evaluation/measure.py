"""A model is asked; its answers are judged and counted."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from antidote_fast.data.batches import build_prompt
from antidote_fast.data.records import Record
from antidote_fast.errors import UsageError
from antidote_fast.evaluation import tasks
from antidote_fast.evaluation.generate import generate
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.evaluation.rates import harmful_rates, ordinary_rates
from antidote_fast.evaluation.verdicts import Judge, ask_judge
from antidote_fast.files.commit import digest_of
from antidote_fast.models.kinds import Model, Tokenizer
from antidote_fast.system.progress import Progress


def answer_sets(
    model: Model,
    tokenizer: Tokenizer,
    sets: Mapping[str, Sequence[Record]],
    *,
    template: str = "alpaca",
    max_new_tokens: int | Mapping[str, int] = 512,
    batch_size: int = 8,
    progress: Progress = False,
) -> dict[str, list[str]]:
    """Greedy answers to several sets of records; sets with the same limit share their batches.

    Args:
        model, tokenizer, batch_size: as `generate` takes them.
        sets: records by name; the answers come by these, in the order of the records.
        template: alpaca or chat.
        max_new_tokens: one limit, or one a name.
    """
    limits = max_new_tokens
    if not isinstance(limits, Mapping):
        limits = dict.fromkeys(sets, limits)
    answers: dict[str, list[str]] = {}
    for limit in dict.fromkeys(limits[name] for name in sets):
        names = [name for name in sets if limits[name] == limit]
        prompts = [
            build_prompt(record, template, tokenizer) for name in names for record in sets[name]
        ]
        options = {"max_new_tokens": limit, "batch_size": batch_size}
        flat = iter(generate(model, tokenizer, prompts, progress=progress, **options))
        answers.update({name: [next(flat) for _ in sets[name]] for name in names})
    return answers


def limits_of(
    max_new_tokens: int | Mapping[str, int] | None, task: str, names: Iterable[str]
) -> int | Mapping[str, int]:
    """Tokens of an answer by set; where None is given 128, and 16 of a task of labels."""
    if max_new_tokens is not None:
        return max_new_tokens
    is_label = task in ("sst2", "agnews", "label")
    return {name: 16 if is_label and name == "task" else 128 for name in names}


def score_answers(
    sets: Mapping[str, Sequence[Record]],
    answers: Mapping[str, Sequence[str]],
    *,
    task: str = "label",
    judge: Judge | None = None,
    win_rate_judge: Any = None,
    progress: Progress = False,
) -> dict:
    """The metrics of answers, by the sets "harmful", "task" and "benign" that are there.

    Returns:
        ``harmful_score``, ``finetune_accuracy``, ``helped_rate`` and ``benign_refusal_rate`` in
        percent, and under the set's name its counts (`rates`, `tasks`) with a hash of its answers.
    """
    judge = judge or PhraseJudge()
    results: dict[str, dict] = {}

    def verdicts(name, by):
        prompts = [f"{r.instruction}\n{r.input}".strip() for r in sets[name]]
        return ask_judge(by, prompts, answers[name], progress=progress)

    if "harmful" in sets:
        results["harmful"] = harmful_rates(verdicts("harmful", judge))
    if "task" in sets:
        results["task"] = tasks.finetune_accuracy(
            task, sets["task"], answers["task"], win_rate_judge, progress=progress
        )
    if "benign" in sets:
        by = judge if isinstance(judge, PhraseJudge) else PhraseJudge()
        results["benign"] = ordinary_rates(verdicts("benign", by))
    headline = {}
    for name, counts in results.items():
        metrics = ("harmful_score", "finetune_accuracy", "helped_rate", "benign_refusal_rate")
        headline |= {metric: counts.pop(metric) for metric in metrics if metric in counts}
        counts["answers_sha256"] = digest_of(answers[name])
    return {**headline, **results}


def evaluate_model(
    model: Model,
    tokenizer: Tokenizer,
    *,
    harmful: Sequence[Record] | None = None,
    task_records: Sequence[Record] | None = None,
    task: str = "label",
    benign: Sequence[Record] | None = None,
    judges: Judge | Mapping[str, Judge] | None = None,
    win_rate_judge: Any = None,
    templates: Sequence[str] = ("alpaca",),
    max_new_tokens: int | Mapping[str, int] | None = None,
    batch_size: int = 8,
    progress: Progress = False,
) -> dict:
    """Measure a live model on whichever of the three sets are given.

    With the refusal judge some two dozen tokens an answer are enough, for a label its own few:
    ``max_new_tokens={"harmful": 24, "task": 8, "benign": 24}``.

    Args:
        harmful: held-out harmful prompts.
        task_records: held-out records of the user's task.
        task: how those are scored (`tasks.finetune_accuracy`).
        benign: ordinary prompts.
        judges: of the harmful score; a `PhraseJudge` where None.
        win_rate_judge: for task alpaca.
        templates: alpaca or chat; the first one counts.
        max_new_tokens: as `limits_of` takes it.
        model, tokenizer, batch_size: as `answer_sets` takes them.

    Returns:
        As `score_answers`.

    Raises:
        UsageError: nothing to measure, an option out of range.
        DataError: records that cannot be scored, prompts longer than the model's positions.
    """
    named = {"harmful": harmful, "task": task_records, "benign": benign}
    sets = {name: records for name, records in named.items() if records is not None}
    if not sets:
        raise UsageError("harmful=None: must be records, unless task_records or benign are given")
    if "task" in sets:
        tasks.check_task(task, sets["task"])
    answers = answer_sets(
        model,
        tokenizer,
        sets,
        template=templates[0],
        max_new_tokens=limits_of(max_new_tokens, task, sets),
        batch_size=batch_size,
        progress=progress,
    )
    judge = next(iter(judges.values())) if isinstance(judges, Mapping) else judges
    return score_answers(
        sets, answers, task=task, judge=judge, win_rate_judge=win_rate_judge, progress=progress
    )
