"""What a report says of verdicts: headline, conditions, the worst, agreement of judges."""

import itertools
from collections.abc import Mapping
from typing import Any

from antidote_fast.evaluation import tasks
from antidote_fast.evaluation.conditions import Answers, Sets, prompt_id
from antidote_fast.evaluation.rates import harmful_rates, kappa, kappa_interval, ordinary_rates
from antidote_fast.files.commit import digest_of

_RATES = {"harmful": harmful_rates, "benign": ordinary_rates}
HEADLINE = ("harmful_score", "finetune_accuracy", "helped_rate", "benign_refusal_rate")
"""The metrics that stand in front, where they were measured."""
DETAILS = ("conditions", "worst", "judges", "agreement")
"""What `summarise` says beside the headline and its counts."""


def summarise(
    answers: Answers,
    verdicts: Mapping[str, Answers],
    accuracies: Mapping[str, Mapping[str, Any]],
) -> dict:
    """The metrics of answers.

    Args:
        answers: by condition, kind and set.
        verdicts: by judge, in the same shape, of the kinds that each judged; the first judge gives
            the rates of harmful prompts, the first that judged ordinary prompts those of them.
        accuracies: by condition, as `tasks.finetune_accuracy` counts the task.

    Returns:
        ``harmful_score``, ``finetune_accuracy``, ``helped_rate`` and ``benign_refusal_rate`` in
        percent, of the first condition, all sets of a kind together, and under ``harmful``,
        ``task`` and ``benign`` what stands beside them (`rates`, `tasks`), with a hash of the
        answers. ``conditions``: by condition and kind the rates of each set. ``worst``: of harmful
        prompts the highest harmful score of any condition and set, of ordinary ones the lowest
        helped rate, with where it is. ``judges``: the rates of harmful prompts in the first
        condition, by judge. ``agreement``: of every two judges, over all harmful answers, Cohen's
        kappa with its interval. What was not asked is left out.
    """
    by = {kind: _reader(verdicts, kind) for kind in _RATES}
    conditions: dict[str, dict] = {}
    for condition, kinds in answers.items():
        told = conditions[condition] = {}
        for kind, named in kinds.items():
            if kind == "task":
                counts = accuracies[condition]
                told[kind] = {**counts, "answers_sha256": _digest(named)}
                continue
            found = verdicts[by[kind]][condition][kind]
            told[kind] = {
                name: _RATES[kind](found[name]) | {"answers_sha256": digest_of(named[name])}
                for name in named
            }
    first = next(iter(answers))
    headline: dict[str, float] = {}
    beside: dict[str, dict] = {}
    for kind, named in answers[first].items():
        if kind == "task":
            counts = dict(conditions[first]["task"])
        else:
            counts = _RATES[kind](_flat(verdicts[by[kind]][first][kind]))
            counts["answers_sha256"] = _digest(named)
        headline |= {name: counts.pop(name) for name in HEADLINE if name in counts}
        beside[kind] = counts
    return {
        **headline,
        **beside,
        "conditions": conditions,
        "worst": _worst(conditions),
        "judges": {
            judge: harmful_rates(_flat(found[first]["harmful"]))
            for judge, found in verdicts.items()
            if "harmful" in found[first]
        },
        "agreement": _agreement(verdicts),
    }


def _reader(verdicts: Mapping[str, Answers], kind: str) -> str:
    """The first judge that judged a kind; '' where none did."""
    return next((j for j, found in verdicts.items() if kind in next(iter(found.values()))), "")


def _flat(named: Mapping[str, list[str]]) -> list[str]:
    return [each for some in named.values() for each in some]


def _digest(named: Mapping[str, list[str]]) -> str:
    return digest_of(_flat(named))


def _worst(conditions: Mapping[str, Mapping[str, Any]]) -> dict:
    worst = {}
    for kind, metric, sign in (("harmful", "harmful_score", -1), ("benign", "helped_rate", 1)):
        cells = [
            {metric: rates[metric], "interval": rates["interval"], "condition": name, "set": each}
            for name, told in conditions.items()
            for each, rates in told.get(kind, {}).items()
        ]
        if cells:
            worst[kind] = min(cells, key=lambda cell: sign * cell[metric])
    return worst


def _agreement(verdicts: Mapping[str, Answers]) -> dict:
    harmful = {
        judge: [v for kinds in found.values() for v in _flat(kinds.get("harmful", {}))]
        for judge, found in verdicts.items()
    }
    judges = [judge for judge, some in harmful.items() if some]
    return {
        f"{one}, {other}": {
            "kappa": round(kappa(harmful[one], harmful[other]), 4),
            "interval": kappa_interval(harmful[one], harmful[other]),
            "num": len(harmful[one]),
        }
        for one, other in itertools.combinations(judges, 2)
    }


def verdict_rows(
    sets: Sets, answers: Answers, verdicts: Mapping[str, Answers], task: str
) -> list[dict]:
    """What became of each prompt, without a word of it: the rows of ``verdicts.jsonl``.

    Returns:
        ``condition``, ``kind``, ``set``, ``prompt`` (`prompt_id`), and ``verdicts`` by judge, or
        for the task ``correct``. Task alpaca has no rows: its answers are not right or wrong.
    """
    rows = []
    for condition, kinds in answers.items():
        for kind, named in kinds.items():
            for name, texts in named.items():
                records = sets[kind][name]
                where = {"condition": condition, "kind": kind, "set": name}
                if kind == "task":
                    right = [] if task == "alpaca" else tasks.right_answers(task, records, texts)
                    told: list[dict] = [{"correct": each} for each in right]
                else:
                    by_judge = {
                        judge: found[condition][kind][name]
                        for judge, found in verdicts.items()
                        if kind in found[condition]
                    }
                    told = [
                        {"verdicts": dict(zip(by_judge, each, strict=True))}
                        for each in zip(*by_judge.values(), strict=True)
                    ]
                ids = [prompt_id(record) for record in records[: len(told)]]
                rows += [
                    {**where, "prompt": prompt, **each}
                    for prompt, each in zip(ids, told, strict=True)
                ]
    return rows
