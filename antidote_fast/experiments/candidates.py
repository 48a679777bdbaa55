"""Candidates of a prune tried on a live model, measured on held-out prompts, one recommended.

Choosing alpha by its effect is beyond the paper (arXiv 2408.09600), which fixes it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from antidote_fast.config.sweep import (
    MAX_ACCURACY_DROP,
    MAX_HELPED_DROP,
    MAX_REFUSAL_RISE,
    RATIOS,
    SCORES,
    check_budgets,
    checked_grid,
)
from antidote_fast.data.records import Record
from antidote_fast.errors import UsageError
from antidote_fast.evaluation.measure import evaluate_model
from antidote_fast.evaluation.summary import DETAILS
from antidote_fast.evaluation.tasks import check_task
from antidote_fast.evaluation.verdicts import Judge
from antidote_fast.models.undo import Originals
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.evidence import Evidence
from antidote_fast.pruning.prune import prune_model_
from antidote_fast.selection import Selection
from antidote_fast.system.progress import Clock, Progress, count

# The sets in the order in which they are measured, with their metrics.
SETS = {
    "task": ("finetune_accuracy",),
    "benign": ("helped_rate", "benign_refusal_rate"),
    "harmful": ("harmful_score",),
}


@dataclass(frozen=True)
class Prompts:
    """What each candidate is asked, and how its answers are scored.

    All prompts should be for choosing alone: in neither the calibration nor the test data.

    Args:
        harmful, task, benign: records; ``benign`` may be None.
        task_name: how the task's answers are scored: sst2, agnews, gsm8k or label.
        template: the one that is asked, that of the training.
        judges, max_new_tokens, batch_size: as
            :func:`antidote_fast.evaluation.measure.evaluate_model`.
    """

    harmful: Sequence[Record]
    task: Sequence[Record]
    benign: Sequence[Record] | None = None
    task_name: str = "label"
    judges: Judge | Mapping[str, Judge] | None = None
    template: str = "alpaca"
    max_new_tokens: int | Mapping[str, int] | None = None
    batch_size: int = 8

    @property
    def sets(self) -> dict[str, Sequence[Record]]:
        """The sets that there are, in the order in which they are measured."""
        return {name: some for name in SETS if (some := getattr(self, name)) is not None}

    def measure(self, model: Any, tokenizer: Any, name: str, progress: Progress = False) -> dict:
        """The metrics of one set, as evaluate_model gives them."""
        options = ("judges", "max_new_tokens", "batch_size")
        arguments = {option: getattr(self, option) for option in options}
        arguments |= {"templates": (self.template,)}
        arguments |= {"task_records" if name == "task" else name: getattr(self, name)}
        arguments |= {"task": self.task_name, "progress": progress}
        found = evaluate_model(model, tokenizer, **arguments)
        return {key: value for key, value in found.items() if key not in DETAILS}

    def measure_all(self, model: Any, tokenizer: Any, progress: Progress = False) -> dict:
        """The metrics of every set: those of the headline first, then the counts."""
        metrics: dict[str, Any] = {}
        for name in self.sets:
            metrics |= self.measure(model, tokenizer, name, progress)
        return dict(sorted(metrics.items(), key=lambda item: isinstance(item[1], dict)))


@dataclass(frozen=True)
class SweepEvidence:
    """What all candidates are pruned by; each takes what its score needs.

    Args:
        norms: of the targets, by kind: ``"all"`` for wanda, ``"response"`` (collected with
            ``response_only``) for wanda-response, ``"preserve"`` too for wanda-preserve.
        base_weights: as :class:`antidote_fast.pruning.evidence.Evidence` says.
        score_delta: as in :class:`antidote_fast.Selection`.
        learn: gives the scores that a selection goes by, for gate, as
            :func:`antidote_fast.stages.gates.learn.learn_gates` does.
    """

    norms: Mapping[str, ActivationNorms] = field(default_factory=dict)
    base_weights: Mapping[str, torch.Tensor] | None = None
    score_delta: bool = False
    learn: Callable[[Selection], Mapping[str, torch.Tensor]] | None = None

    def check(self, scores: Sequence[str]) -> None:
        """Refuse scores that need what is not here."""
        for name in scores:
            for kind in SCORES[name].kinds:
                if self.norms.get(kind) is None:
                    raise UsageError(f"norms: must hold {kind!r} with score {name}")
            if SCORES[name].learned and self.learn is None:
                raise UsageError(f"learn=None: must be given with score {name}")

    def of(self, name: str, selection: Selection) -> Evidence:
        """What a candidate of this score is pruned by; scores are learned here."""
        declared = SCORES[name]
        return Evidence(
            self.norms.get(declared.norms),
            declared.score,
            preserve_norms=self.norms.get(declared.preserve_norms),
            base_weights=self.base_weights,
            scores=self.learn(selection) if declared.learned else None,
        )


def sweep_model(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    evidence: SweepEvidence,
    *,
    ratios: Sequence[float] = RATIOS,
    scopes: Sequence[str] = ("row",),
    scores: Sequence[str] = ("wanda",),
    max_accuracy_drop: float = MAX_ACCURACY_DROP,
    max_refusal_rise: float = MAX_REFUSAL_RISE,
    max_helped_drop: float = MAX_HELPED_DROP,
    progress: Progress = False,
    **prune_options: Any,
) -> dict:
    """Prune a live model by each candidate in turn, measure it, and recommend one.

    Each score and scope is a branch, which goes through the ratios from the smallest on. The
    finetune accuracy is measured first: below the budget it ends the branch. Ordinary prompts come
    next: where more are refused than the budget allows, or fewer helped, the candidate is passed
    over. Then the harmful score: at 0 the branch ends, as more can gain nothing.

    Args:
        model: a transformers or PEFT model; its weights end as they began, whatever happens.
        tokenizer: its own.
        prompts: what it is asked.
        evidence: what it is pruned by.
        ratios, scopes, scores: the candidates: all combinations.
        max_accuracy_drop: points of finetune accuracy below the unpruned model's.
        max_refusal_rise: points of benign refusals above the unpruned model's.
        max_helped_drop: points of ordinary prompts helped below the unpruned model's.
        progress: as :func:`antidote_fast.system.progress.track` takes it.
        prune_options: ``targets``, ``ignore``, ``seed`` and ``backend`` of
            :func:`antidote_fast.prune_model_`.

    Returns:
        ``unpruned`` (as evaluate_model), ``budget``, ``rows``: a candidate each, with ``achieved``,
        ``num_pruned``, the metrics (None where not measured), ``admissible`` and the ``reason``
        where it is not; ``recommended``, one of the rows or None, and then ``why_none``;
        ``early_stopping`` (what was left out), ``seconds`` by step.

    Raises:
        UsageError, DataError, NothingPruned: as evaluate_model and prune_model_; a grid or a budget
            out of range; norms that a score needs and that are not given.
    """
    ratios, scopes, scores = checked_grid(ratios, scopes, scores)
    budgets = {
        "max_accuracy_drop": max_accuracy_drop,
        "max_refusal_rise": max_refusal_rise,
        "max_helped_drop": max_helped_drop,
    }
    check_budgets(**budgets)
    evidence.check(scores)
    check_task(prompts.task_name, prompts.task)
    clock = Clock()
    originals = Originals(model, prune_options.get("targets"), prune_options.get("ignore", ()))
    sizes = {name: len(records) for name, records in prompts.sets.items()}
    unpruned = prompts.measure_all(model, tokenizer, progress)
    clock.lap("evaluate unpruned")
    budget = _budget(unpruned, **budgets)
    branches = list(itertools.product(scores, scopes))
    total = len(branches) * len(ratios)
    rows, asked = [], []

    def measure(name):
        asked.append(sizes[name])
        return prompts.measure(model, tokenizer, name)

    with count(total, "sweep", progress) as show:
        for number, (name, scope) in enumerate(branches if unpruned["harmful_score"] else ()):
            for tried, ratio in enumerate(ratios, 1):
                selection = Selection(ratio, scope=scope, score_delta=evidence.score_delta)
                row = {"score": name, "scope": scope, "ratio": ratio}
                try:
                    candidate = evidence.of(name, selection)
                    report = prune_model_(model, candidate, selection, **prune_options)
                    clock.lap("prune")
                    row |= {"achieved": report.achieved, "num_pruned": report.num_pruned}
                    is_end = _judge(row, measure, budget)
                    clock.lap("evaluate")
                finally:
                    originals.restore()
                clock.lap("restore")
                rows.append(row)
                show(number * len(ratios) + (len(ratios) if is_end else tried))
                if is_end:
                    break
    recommended = recommend(rows, unpruned)
    return {
        "unpruned": unpruned,
        "budget": budget,
        "rows": rows,
        "recommended": recommended,
        "why_none": None if recommended else _why_none(rows, unpruned),
        "early_stopping": {
            "candidates": total,
            "candidates_left_out": total - len(rows),
            "answers": sum(asked),
            "answers_left_out": total * sum(sizes.values()) - sum(asked),
        },
        "seconds": clock.seconds,
    }


def recommend(rows: Sequence[dict], unpruned: Mapping[str, Any]) -> dict | None:
    """The admissible row of the lowest harmful score, where one is below the unpruned model's.

    Among equals the highest finetune accuracy counts, then the fewest weights removed, then the
    order of the rows. Both arguments are as :func:`sweep_model` returns them.
    """
    before = unpruned["harmful_score"]
    lower = [row for row in rows if row["admissible"] and row["harmful_score"] < before]
    return min(lower, key=_rank, default=None)


def _rank(row):
    return row["harmful_score"], -row["finetune_accuracy"], row["num_pruned"]


def _why_none(rows, unpruned):
    if unpruned["harmful_score"] == 0:
        return "the unpruned model gives no harmful answer"
    if within := sum(row["admissible"] for row in rows):
        return f"none of the {within} candidates within the budget lowers the harmful score"
    return "no candidate is within the budget"


def _budget(unpruned, max_accuracy_drop, max_refusal_rise, max_helped_drop):
    """The budgets, and the values that they mean; metrics have two decimals."""
    lowest = round(unpruned["finetune_accuracy"] - max_accuracy_drop, 4)
    budget = {"max_accuracy_drop": max_accuracy_drop, "min_finetune_accuracy": lowest}
    if "benign_refusal_rate" in unpruned:
        highest = round(unpruned["benign_refusal_rate"] + max_refusal_rise, 4)
        budget |= {"max_refusal_rise": max_refusal_rise, "max_benign_refusal_rate": highest}
        least = round(unpruned["helped_rate"] - max_helped_drop, 4)
        budget |= {"max_helped_drop": max_helped_drop, "min_helped_rate": least}
    return budget


def _judge(row, measure, budget):
    """Measure as much of the pruned model as its row needs; True where the branch ends."""
    row |= {metric: None for metrics in SETS.values() for metric in metrics}
    row |= {"admissible": False, "reason": None}
    row |= measure("task")
    accuracy, least = row["finetune_accuracy"], budget["min_finetune_accuracy"]
    if accuracy < least:
        row["reason"] = f"finetune accuracy {accuracy:g} is below {least:g}"
        return True
    most = budget.get("max_benign_refusal_rate")
    if most is not None:
        row |= measure("benign")
        refusals = row["benign_refusal_rate"]
        if refusals > most:
            row["reason"] = f"benign refusals {refusals:g} are above {most:g}"
            return False
        helped, least = row["helped_rate"], budget["min_helped_rate"]
        if helped < least:
            row["reason"] = f"ordinary prompts helped {helped:g} are below {least:g}"
            return False
    row |= measure("harmful")
    row["admissible"] = True
    return row["harmful_score"] == 0
