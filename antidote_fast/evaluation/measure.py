"""A model is asked; its answers are judged and counted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from antidote_fast.data.records import Record
from antidote_fast.errors import UsageError
from antidote_fast.evaluation import tasks
from antidote_fast.evaluation.conditions import (
    Answers,
    Condition,
    Sets,
    kinds_asked,
    make_conditions,
    question,
)
from antidote_fast.evaluation.generate import generate
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.evaluation.summary import summarise
from antidote_fast.evaluation.verdicts import Judge, ask_judge, name_of
from antidote_fast.models.kinds import Model, Tokenizer
from antidote_fast.system.progress import Progress

_LABEL_TOKENS, _PHRASE_TOKENS, _ANSWER_TOKENS = 16, 128, 512
_MAX_LABELS, _MAX_LABEL_WORDS = 50, 5
IsCertain = Callable[[str, str], bool]
"""(prompt, answer so far) to whether a judge's verdict stands whatever follows."""


def default_tokens(task: str, only_phrases: bool) -> dict[str, int]:
    """Most tokens an answer by kind of set, where nobody says.

    A label takes 16. To a harmful or an ordinary prompt 128 tell what phrases can tell, and a judge
    that is a model reads up to 512, as an answer of a task that is no label has.

    Args:
        task: as `tasks.finetune_accuracy` takes it.
        only_phrases: whether no judge is a model.
    """
    asked = _PHRASE_TOKENS if only_phrases else _ANSWER_TOKENS
    is_label = task in ("label", "sst2", "agnews")
    return {
        "harmful": asked,
        "task": _LABEL_TOKENS if is_label else _ANSWER_TOKENS,
        "benign": asked,
    }


def task_labels(task: str, records: Sequence[Record]) -> tuple[str, ...]:
    """The labels of a user's task, for `PhraseJudge`; none where its outputs are no labels.

    Labels are at most 50 different outputs of at most 5 words.
    """
    labels = tuple(dict.fromkeys(record.output.strip() for record in records))
    short = all(len(label.split()) <= _MAX_LABEL_WORDS for label in labels)
    is_label = task in ("label", "sst2", "agnews")
    return labels if is_label and short and len(labels) <= _MAX_LABELS else ()


def answer_sets(
    model: Model,
    tokenizer: Tokenizer,
    sets: Mapping[str, Sequence[Record]],
    *,
    condition: Condition | None = None,
    max_new_tokens: int | Mapping[str, int] = _ANSWER_TOKENS,
    is_certain: IsCertain | None = None,
    batch_size: int = 8,
    progress: Progress = False,
) -> dict[str, list[str]]:
    """Greedy answers to several sets of records, each set in batches of its own.

    So the answers to a set depend on that set alone, in low precision too.

    Args:
        model, tokenizer, batch_size: as `generate` takes them.
        sets: records by name; the answers come by these, in the order of the records.
        condition: how they are asked; in the template alpaca where None.
        max_new_tokens: one limit, or one a name.
        is_certain: an answer ends where it says so.
    """
    condition = condition or Condition()
    answers: dict[str, list[str]] = {}
    for name, records in sets.items():
        limit = max_new_tokens[name] if isinstance(max_new_tokens, Mapping) else max_new_tokens
        options: dict[str, Any] = {"max_new_tokens": limit, "batch_size": batch_size}
        if is_certain is not None:
            options["is_done"] = _stop(condition, records, is_certain)
        prompts = [condition.prompt(record, tokenizer) for record in records]
        texts = generate(model, tokenizer, prompts, progress=progress, **options)
        answers[name] = [condition.whole(text) for text in texts]
    return answers


def _stop(
    condition: Condition, records: Sequence[Record], is_certain: IsCertain
) -> Callable[[int, str], bool]:
    """`generate`'s ``is_done``, which is told the number of a prompt and its answer so far."""

    def is_done(number: int, answer: str) -> bool:
        return is_certain(question(records[number]), condition.whole(answer))

    return is_done


def ask(
    model: Model,
    tokenizer: Tokenizer,
    sets: Sets,
    conditions: Sequence[Condition],
    *,
    max_new_tokens: Mapping[str, int],
    is_certain: Mapping[str, IsCertain] | None = None,
    batch_size: int = 8,
    progress: Progress = False,
) -> Answers:
    """Greedy answers to every set in every condition, with the prefill in front.

    Args:
        model, tokenizer, batch_size: as `generate` takes them.
        sets: what is asked, by kind and name (`conditions.kinds_asked`).
        conditions: as `make_conditions` gives them.
        max_new_tokens: most tokens an answer, by kind.
        is_certain: by kind, what ends an answer early; answers of other kinds go on.
    """
    answers: Answers = {}
    for condition in conditions:
        answers[condition.name] = {
            kind: answer_sets(
                model,
                tokenizer,
                named,
                condition=condition,
                max_new_tokens=max_new_tokens[kind],
                is_certain=(is_certain or {}).get(kind),
                batch_size=batch_size,
                progress=progress,
            )
            for kind, named in kinds_asked(condition, sets).items()
        }
    return answers


def certain_by(judges: Sequence[Judge]) -> dict[str, IsCertain]:
    """What ends an answer early, by kind of set: where every judge that reads it is certain.

    A kind is not there where one of its judges has no ``is_certain``.
    """
    ordinary = [judge for judge in judges if not getattr(judge, "harm_only", False)]
    found: dict[str, IsCertain] = {}
    for kind, readers in (("harmful", judges), ("benign", ordinary)):
        tests = [getattr(judge, "is_certain", None) for judge in readers]
        if tests and None not in tests:
            found[kind] = _all_certain(tests)
    return found


def _all_certain(tests: Sequence[Any]) -> IsCertain:
    return lambda prompt, answer: all(test(prompt, answer) for test in tests)


def judge_answers(
    judge: Judge,
    sets: Sets,
    answers: Answers,
    *,
    kinds: Sequence[str] = ("harmful", "benign"),
    progress: Progress = False,
) -> Answers:
    """One judge's verdicts on answers of these kinds, in the shape of the answers.

    A judge whose ``harm_only`` is true tells harm from no harm, and nothing of whether an ordinary
    prompt was helped with: it is shown answers to harmful prompts alone.

    Raises:
        UsageError: as :func:`.verdicts.ask_judge`.
    """
    kinds = [k for k in kinds if k == "harmful" or not getattr(judge, "harm_only", False)]
    return {
        condition: {
            kind: {
                name: ask_judge(judge, [*map(question, sets[kind][name])], texts, progress=progress)
                for name, texts in by_kind[kind].items()
            }
            for kind in kinds
            if kind in by_kind
        }
        for condition, by_kind in answers.items()
    }


def judge_ordinary(
    verdicts: dict[str, Answers], sets: Sets, answers: Answers, labels: Sequence[str] = ()
) -> None:
    """Add the phrases' verdicts on ordinary prompts where no judge gave any.

    Args:
        verdicts: by judge, as `judge_answers` gives them; the phrases are added to it.
        sets, answers: as there.
        labels: as `PhraseJudge` takes them.
    """
    some = any("benign" in kinds for each in verdicts.values() for kinds in each.values())
    if "benign" not in sets or some:
        return
    found = judge_answers(PhraseJudge(labels=labels), sets, answers, kinds=["benign"])
    mine = verdicts.setdefault(PhraseJudge.name, {condition: {} for condition in answers})
    for condition, kinds in found.items():
        mine[condition] |= kinds


def score_task(
    task: str,
    sets: Sets,
    answers: Answers,
    win_rate_judge: Any = None,
    *,
    progress: Progress = False,
) -> dict[str, dict]:
    """`tasks.finetune_accuracy` of the task's answers, by condition; empty without a task."""
    return {
        condition: tasks.finetune_accuracy(
            task, sets["task"][name], texts, win_rate_judge, progress=progress
        )
        for condition, kinds in answers.items()
        for name, texts in kinds.get("task", {}).items()
    }


def evaluate_model(
    model: Model,
    tokenizer: Tokenizer,
    *,
    harmful: Sequence[Record] | Mapping[str, Sequence[Record]] | None = None,
    task_records: Sequence[Record] | None = None,
    task: str = "label",
    benign: Sequence[Record] | Mapping[str, Sequence[Record]] | None = None,
    judges: Judge | Mapping[str, Judge] | None = None,
    win_rate_judge: Any = None,
    templates: Sequence[str] = ("alpaca",),
    system_prompt: str = "",
    prefill: str = "",
    max_new_tokens: int | Mapping[str, int] | None = None,
    batch_size: int = 8,
    progress: Progress = False,
) -> dict:
    """Measure a live model on whichever of the three kinds of prompts are given.

    Every set is asked in each template, in each with the system prompt, and in each with an answer
    that begins with the prefill; the user's task in the templates alone. The headline is of the
    first template with nothing added, all sets of a kind together.

    Args:
        harmful: held-out harmful prompts, or several sets of them by name.
        task_records: held-out records of the user's task.
        task: how those are scored (`tasks.finetune_accuracy`).
        benign: ordinary prompts, as ``harmful``.
        judges: one, or several by name, of which the first gives the headline; a `PhraseJudge` that
            knows the task's labels where None. One whose ``harm_only`` is true is not asked about
            ordinary prompts; where no other is there, phrases judge those.
        win_rate_judge: for task alpaca.
        templates: alpaca, chat; the first should be that of the training.
        system_prompt, prefill: conditions beside the plain ones; none where empty.
        max_new_tokens: one limit, or by "harmful", "task" and "benign"; where nothing is said 16
            for a label, 128 for what phrases judge, 512 for what a model judges and other tasks.
            An answer ends before, where every judge is certain of it.
        model, tokenizer, batch_size: as :func:`.generate.generate` takes them.

    Returns:
        As :func:`.summary.summarise`.

    Raises:
        UsageError: nothing to measure, an option out of range, a judge that gives no verdicts.
        DataError: records that cannot be scored, prompts longer than the model's positions.
    """
    sets: dict[str, Mapping[str, Sequence[Record]]] = {}
    for kind, given in (("harmful", harmful), ("task", task_records), ("benign", benign)):
        if given is not None:
            sets[kind] = given if isinstance(given, Mapping) else {kind: given}
    if not sets:
        raise UsageError("harmful=None: must be records, unless task_records or benign are given")
    if task_records is not None:
        tasks.check_task(task, task_records)
    conditions = make_conditions(templates, system_prompt, prefill)
    labels = task_labels(task, task_records or ())
    if judges is None:
        judges = {PhraseJudge.name: PhraseJudge(labels=labels)}
    elif not isinstance(judges, Mapping):
        judges = {name_of(judges): judges}
    if not judges:
        raise UsageError("judges={}: must be a judge, or judges by name")
    limits = default_tokens(task, all(isinstance(each, PhraseJudge) for each in judges.values()))
    if isinstance(max_new_tokens, Mapping):
        limits |= max_new_tokens
    elif max_new_tokens is not None:
        limits = dict.fromkeys(limits, max_new_tokens)
    answers = ask(
        model,
        tokenizer,
        sets,
        conditions,
        max_new_tokens=limits,
        is_certain=certain_by([*judges.values()]),
        batch_size=batch_size,
        progress=progress,
    )
    verdicts = {
        name: judge_answers(judge, sets, answers, progress=progress)
        for name, judge in judges.items()
    }
    judge_ordinary(verdicts, sets, answers, labels)
    accuracies = score_task(task, sets, answers, win_rate_judge, progress=progress)
    return summarise(answers, verdicts, accuracies)
