"""The sweep stage: ratios, scopes and scores tried on held-out prompts, and one recommended.

Choosing alpha by its effect is beyond the paper (arXiv 2408.09600), which fixes it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from antidote_fast.config.sweep import (
    MAX_ACCURACY_DROP,
    MAX_REFUSAL_RISE,
    NORM_FILES,
    RATIOS,
    SCORES,
    SweepConfig,
    check_budgets,
    checked_grid,
)
from antidote_fast.data.records import Record
from antidote_fast.errors import UsageError
from antidote_fast.evaluation.judges import get_judge
from antidote_fast.evaluation.measure import evaluate_model
from antidote_fast.evaluation.metrics import check_task
from antidote_fast.experiments import pictures
from antidote_fast.experiments.sweep_check import check, inputs_of
from antidote_fast.experiments.tables import write_csv
from antidote_fast.files import provenance
from antidote_fast.files.commit import output_folder
from antidote_fast.files.safe_open import Watch
from antidote_fast.models.adapters import adapter_off, load_adapter
from antidote_fast.models.loading import load_model
from antidote_fast.models.targets import find_targets
from antidote_fast.models.undo import Originals
from antidote_fast.norms.activation_norms import ActivationNorms
from antidote_fast.pruning.prune import prune_model_
from antidote_fast.selection import Selection
from antidote_fast.stages.gates import stage
from antidote_fast.stages.gates.stage import answers_of
from antidote_fast.stages.inputs import collect
from antidote_fast.system.progress import Clock, count

PICTURE, ROWS = "curve.png", "rows.csv"
# The sets in the order in which they are measured, with their argument and their metric.
_SETS = {
    "task": ("task_records", "finetune_accuracy"),
    "benign": ("benign", "benign_refusal_rate"),
    "harmful": ("harmful", "harmful_score"),
}


def _prune_by(score):
    def prune(model, selection, norms, options):
        kept = norms.get(score.preserve_norms)
        options = {**options, "score": score.score, "preserve_norms": kept}
        return prune_model_(model, norms.get(score.norms), selection, **options)

    return prune


# How each score prunes: (model, selection, {kind: norms}, options of prune_model_) -> PruneReport.
PRUNERS = {name: _prune_by(score) for name, score in SCORES.items()}


def sweep_model(
    model,
    tokenizer,
    *,
    harmful: Sequence[Record],
    task_records: Sequence[Record],
    benign: Sequence[Record] | None = None,
    norms: ActivationNorms | Mapping[str, ActivationNorms] | None = None,
    learn: Callable[[Selection], Mapping[str, torch.Tensor]] | None = None,
    base_weights=None,
    score_delta: bool = False,
    ratios: Sequence[float] = RATIOS,
    scopes: Sequence[str] = ("row",),
    scores: Sequence[str] = ("wanda",),
    max_accuracy_drop: float = MAX_ACCURACY_DROP,
    max_refusal_rise: float = MAX_REFUSAL_RISE,
    targets=None,
    ignore=(),
    seed: int = 0,
    backend: str | None = None,
    task: str = "label",
    judge=None,
    template: str = "alpaca",
    max_new_tokens: int | Mapping[str, int] = 512,
    batch_size: int = 8,
    progress=False,
) -> dict:
    """Prune a live model by each candidate in turn, measure it, and recommend one.

    Each score and scope is a branch, which goes through the ratios from the smallest on. The
    finetune accuracy is measured first: below the budget it ends the branch. Benign refusals come
    next: above the budget the candidate is passed over. Then the harmful score: at 0 the branch
    ends, as more can gain nothing. All prompts should be for choosing alone: in neither the
    calibration nor the test data.

    Args:
        model: a transformers or PEFT model; its weights end as they began, whatever happens.
        tokenizer: its own.
        harmful, task_records, benign, task, judge, template, max_new_tokens, batch_size: as
            :func:`antidote_fast.evaluation.measure.evaluate_model`.
        norms: of the targets, by kind: ``"all"`` for wanda, ``"response"`` (collected with
            ``response_only``) for wanda-response, ``"preserve"`` too for wanda-preserve. Norms
            alone are those of ``"all"``.
        learn: gives the scores that a selection goes by, for gate, as
            :func:`antidote_fast.stages.gates.learn.learn_gates` does.
        ratios, scopes, scores: the candidates: all combinations.
        max_accuracy_drop: points of finetune accuracy below the unpruned model's.
        max_refusal_rise: points of benign refusals above the unpruned model's.
        base_weights, targets, ignore, seed, backend: as :func:`antidote_fast.prune_model_`.
        score_delta: as in :class:`antidote_fast.Selection`.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

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
    check_budgets(max_accuracy_drop, max_refusal_rise)
    norms = {"all": norms} if isinstance(norms, ActivationNorms) else dict(norms or {})
    for name in scores:
        for kind in SCORES[name].kinds:
            if norms.get(kind) is None:
                raise UsageError(f"norms: must hold {kind!r} with score {name}")
        if SCORES[name].learned and learn is None:
            raise UsageError(f"learn=None: must be given with score {name}")
    check_task(task, task_records)
    clock = Clock()
    sets = {"task": task_records, "benign": benign, "harmful": harmful}
    sets = {name: records for name, records in sets.items() if records is not None}
    options = {"task": task, "judge": judge, "template": template}
    options |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    originals = Originals(model, targets, ignore)
    measure = _Measure(model, tokenizer, sets, options)
    unpruned = measure.all(progress)
    clock.lap("evaluate unpruned")
    budget = _budget(unpruned, max_accuracy_drop, max_refusal_rise)
    branches = [(name, scope) for name in scores for scope in scopes]
    total = len(branches) * len(ratios)
    rows = []
    prune_options = {"targets": targets, "ignore": ignore, "seed": seed, "backend": backend}
    prune_options["base_weights"] = base_weights
    if unpruned["harmful_score"] == 0:
        branches = []
    measure.num_prompts = 0
    with count(total, "sweep", progress) as show:
        for number, (name, scope) in enumerate(branches):
            for tried, ratio in enumerate(ratios, 1):
                selection = Selection(ratio, scope=scope, score_delta=score_delta)
                row = {"score": name, "scope": scope, "ratio": ratio}
                try:
                    given = {"scores": learn(selection)} if SCORES[name].learned else {}
                    report = PRUNERS[name](model, selection, norms, prune_options | given)
                    clock.lap("prune")
                    row |= {"achieved": report.achieved, "num_pruned": report.num_pruned}
                    ends = _judged(row, measure, budget)
                    clock.lap("evaluate")
                finally:
                    originals.restore()
                clock.lap("restore")
                rows.append(row)
                done = number * len(ratios) + (len(ratios) if ends else tried)
                show(done)
                if ends:
                    break
    recommended = recommend(rows, unpruned)
    possible = total * sum(map(len, sets.values()))
    return {
        "unpruned": unpruned,
        "budget": budget,
        "rows": rows,
        "recommended": recommended,
        "why_none": None if recommended else _why_none(rows, unpruned),
        "early_stopping": {
            "candidates": total,
            "candidates_left_out": total - len(rows),
            "answers": measure.num_prompts,
            "answers_left_out": possible - measure.num_prompts,
        },
        "seconds": clock.seconds,
    }


def recommend(rows, unpruned) -> dict | None:
    """The admissible row of the lowest harmful score, where one is below the unpruned model's.

    Among equals the highest finetune accuracy counts, then the fewest weights removed, then the
    order of the rows.
    """
    lower = [
        row
        for row in rows
        if row["admissible"] and row["harmful_score"] < unpruned["harmful_score"]
    ]
    return min(lower, key=_rank, default=None)


def _rank(row):
    return row["harmful_score"], -row["finetune_accuracy"], row["num_pruned"]


def _why_none(rows, unpruned):
    if unpruned["harmful_score"] == 0:
        return "the unpruned model gives no harmful answer"
    within = sum(row["admissible"] for row in rows)
    if not within:
        return "no candidate is within the budget"
    return f"none of the {within} candidates within the budget lowers the harmful score"


class _Measure:
    """The metrics of a live model, one set of prompts at a time."""

    def __init__(self, model, tokenizer, sets, options):
        self._model = (model, tokenizer)
        self._options = options
        self.sets = sets
        self.num_prompts = 0

    def __call__(self, name, progress=False):
        argument, _ = _SETS[name]
        self.num_prompts += len(self.sets[name])
        sets = {argument: self.sets[name]}
        return evaluate_model(*self._model, **sets, **self._options, progress=progress)

    def all(self, progress):
        """Every set, the headline metrics first."""
        found = {}
        for name in self.sets:
            found |= self(name, progress)
        return dict(sorted(found.items(), key=lambda item: isinstance(item[1], dict)))


def _budget(unpruned, max_accuracy_drop, max_refusal_rise):
    """Both budgets, and the values that they mean; metrics have two decimals."""
    lowest = round(unpruned["finetune_accuracy"] - max_accuracy_drop, 4)
    found = {"max_accuracy_drop": max_accuracy_drop, "min_finetune_accuracy": lowest}
    if "benign_refusal_rate" in unpruned:
        highest = round(unpruned["benign_refusal_rate"] + max_refusal_rise, 4)
        found |= {"max_refusal_rise": max_refusal_rise, "max_benign_refusal_rate": highest}
    return found


def _judged(row, measure, budget):
    """Measure as much of the pruned model as its row needs; True where the branch ends."""
    row |= {metric: None for _, metric in _SETS.values()}
    row |= {"admissible": False, "reason": None}
    row |= measure("task")
    accuracy, least = row["finetune_accuracy"], budget["min_finetune_accuracy"]
    if accuracy < least:
        row["reason"] = f"finetune accuracy {accuracy:g} is below {least:g}"
        return True
    if "benign" in measure.sets:
        row |= measure("benign")
        refusals, most = row["benign_refusal_rate"], budget["max_benign_refusal_rate"]
        if refusals > most:
            row["reason"] = f"benign refusals {refusals:g} are above {most:g}"
            return False
    row |= measure("harmful")
    row["admissible"] = True
    return row["harmful_score"] == 0


# --- the stage ------------------------------------------------------------------------------------


def run(config: SweepConfig, *, progress=False) -> dict:
    """Sweep a model of a folder or the hub; writes report.json, rows.csv, curve.png and norms.

    The model is pruned as it is loaded: with a ``dtype`` other than that of its files, ``prune`` of
    the files may remove other weights where scores are nearly equal.

    Args:
        config: what to try, and on what.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Returns:
        The contents of report.json: as :func:`sweep_model`, with ``command``, the line that makes
        the recommended model, ``datasets`` and ``calibration``. No text of a prompt is in it.

    Raises:
        DataError, UsageError, NothingPruned, BackendUnavailable: data, a model or an adapter that
            is refused, prompts to choose on that are in the calibration data, an output folder that
            is taken. AntidoteError: not enough memory.
    """
    clock = Clock()
    watch = Watch(*inputs_of(config))
    found = check(config, progress)
    clock.lap("check")
    with output_folder(config.output_dir, config.overwrite) as folder:
        options = {"dtype": config.dtype, "device": config.device}
        options["trust_remote_code"] = config.trust_remote_code
        answers = None
        if found.prompts:
            about = (found.aligned, config.device, found.tokenizer, found.prompts, progress)
            answers = answers_of(config.learning(), *about)
            clock.lap("ask the aligned model")
        model = load_model(found.base.folder, **options)
        if found.adapter is not None:
            model = load_adapter(model, found.adapter)
        bases = None
        if found.aligned is not None:
            keys = [t.key for t in find_targets(model, config.targets, config.ignore)]
            bases = found.aligned.read(keys, progress)
        judge = get_judge(config.evaluation().judge, **found.judge)
        clock.lap("load")
        learn = _learner(config, model, found, answers, bases, progress)
        norms, counts = _collect(config, model, found, progress)
        if config.save_norms:
            for kind, each in norms.items():
                each.save(folder / NORM_FILES[kind])
        clock.lap("calibrate")
        names = ("score_delta", "ratios", "scopes", "scores", "max_accuracy_drop", "targets")
        names += ("max_refusal_rise", "ignore", "seed", "backend", "task", "template")
        names += ("max_new_tokens", "batch_size")
        results = sweep_model(
            model,
            found.tokenizer,
            harmful=found.sets["harmful"],
            task_records=found.sets["task"],
            benign=found.sets.get("benign"),
            norms=norms,
            learn=learn,
            base_weights=bases,
            judge=judge,
            progress=progress,
            **{name: getattr(config, name) for name in names},
        )
        best = results["recommended"]
        where = best and (best["score"], best["scope"], best["ratio"])
        results |= {
            "command": where and config.command(*where),
            "datasets": found.datasets,
            "calibration": counts,
            "task": config.task,
            "judge": config.evaluation().judge,
            **found.backend,
            "seconds": clock.seconds | results["seconds"],
        }
        write_csv([_flat(row) for row in results["rows"]], folder / ROWS)
        pictures.plot_sweep({"config": vars(config), **results}, folder / PICTURE)
        written = provenance.write_report(
            folder, "sweep", config, results, inputs=inputs_of(config)
        )
        watch.check()
        return written


def _learner(config, model, found, answers, bases, progress):
    """The scores of gate by a selection, or None where nothing is learned."""
    if not found.prompts:
        return None
    about = (model, found.tokenizer, found.prompts)
    if answers is None:
        with adapter_off(model):
            answers = stage.ask(config.learning(), *about, progress)

    def learn(selection):
        settings = config.learning(selection.scope, selection.ratio)
        return stage.learn(settings, *about, answers, bases, progress)[0]

    return learn


def _collect(config, model, found, progress):
    """({kind: norms}, {kind: what the report says of them}), a pass over the data a kind."""
    norms, counts = {}, {}
    for kind in config.kinds:
        name = "preserve_dataset" if kind == "preserve" else "dataset"
        norms[kind], counts[kind] = collect(
            config.collecting(kind),
            model,
            found.records[name],
            found.tokenizer,
            batches=found.batches[name],
            progress=progress,
        )
    return norms, counts


def _flat(row):
    """A row for the table: its numbers, then the counts of each set that was measured."""
    found = {name: value for name, value in row.items() if not isinstance(value, dict)}
    for name in _SETS:
        counts = row.get(name, {}).items()
        found |= {f"{name}_{k}": v for k, v in counts if k != "answers_sha256"}
    return found
