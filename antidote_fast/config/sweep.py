"""The config of sweep: what is tried, on which data, and the flags of prune that make each try."""

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from antidote_fast.config.base import (
    StageConfig,
    check,
    check_left_out,
    contents,
    number,
    path,
)
from antidote_fast.config.evaluate import EvaluateConfig
from antidote_fast.config.prune import GATE_ANSWER_TOKENS, PruneConfig
from antidote_fast.config.scores import SCORES as PRUNE_SCORES
from antidote_fast.errors import UsageError

RATIOS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
SCOPES = ("row", "tensor", "global")
MAX_ACCURACY_DROP, MAX_REFUSAL_RISE, MAX_HELPED_DROP = 10.0, 5.0, 10.0


@dataclass(frozen=True)
class SweepScore:
    """What a score of the sweep is to prune.

    Args:
        score: prune's score.
        norms: the kind of norms it goes by, a key of ``NORM_FILES``; None where it needs none.
        preserve_norms: the kind of norms whose top weights are kept, or None.
    """

    score: str
    norms: str | None = None
    preserve_norms: str | None = None

    @property
    def learned(self) -> bool:
        """Whether it is learned on dataset and preserve_dataset, for each ratio and scope."""
        return PRUNE_SCORES[self.score].learner is not None

    @property
    def formula(self) -> str:
        """What it is, for ``--help``."""
        variant = ", of response tokens alone" if self.norms == "response" else ""
        variant += ", but the top weights on preserve_dataset" if self.preserve_norms else ""
        return PRUNE_SCORES[self.score].formula + variant

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of norms that are collected for it."""
        return tuple(filter(None, (self.norms, self.preserve_norms)))


def _variants(declared):
    """The sweep's scores by one of prune's: as it is, and by norms on other tokens."""
    name = declared.name
    if not declared.needs_norms:
        return {name: SweepScore(name)}
    variants = {name: SweepScore(name, "all"), f"{name}-response": SweepScore(name, "response")}
    if not declared.own_matrix:
        variants[f"{name}-preserve"] = SweepScore(name, "all", "preserve")
    return variants


SCORES: dict[str, SweepScore] = {}
for _declared in PRUNE_SCORES.values():
    SCORES |= _variants(_declared)
# The norms over all tokens of the harmful data, over its response tokens, and of data to preserve.
NORM_FILES = {
    "all": "norms.safetensors",
    "response": "norms-response.safetensors",
    "preserve": "preserve-norms.safetensors",
}


def checked_grid(
    ratios: Sequence[float], scopes: Sequence[str], scores: Sequence[str]
) -> tuple[list[float], list[str], list[str]]:
    """(ratios in ascending order, scopes, scores), each value once.

    Raises:
        UsageError: an empty list, a ratio out of range, a scope or score that is not known.
    """
    for name, values in (("ratios", ratios), ("scopes", scopes), ("scores", scores)):
        check(len(values) > 0, name, list(values), "at least one value")
    for ratio in ratios:
        check(0 < ratio <= 1, "ratios", ratio, "in (0, 1]")
    for name, values, accepted in (("scopes", scopes, SCOPES), ("scores", scores, SCORES)):
        for value in values:
            check(value in accepted, name, value, f"among {', '.join(accepted)}")
    return sorted(set(ratios)), list(dict.fromkeys(scopes)), list(dict.fromkeys(scores))


def check_budgets(**budgets: float) -> None:
    """Refuse budgets, by name, that are no points of a percentage."""
    for name, value in budgets.items():
        check(0 <= value <= 100, name, value, "in [0, 100]")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(StageConfig):
    """Try ratios, scopes and scores on held-out prompts, and recommend one.

    Norms are collected once. Each score and scope goes through the ratios from the smallest on, and
    stops where the finetune accuracy falls below the budget or no harmful answer is left.

    Args:
        adapter: PEFT adapter folder on top of the model.
        clean_adapter: an adapter tuned from the same model on clean data alone (p = 0), which is
            measured once and drawn beside: what a repair can reach at best.
        dataset: harmful records for calibration: a local JSON or JSONL file, or a hub name; not
            needed for magnitude and random.
        num_calibration_samples: records used, from the start of the data.
        aggregation: rms (the official code) or mean of per-sequence norms (the paper's eq. 1).
        targets: module names or re: patterns to prune; default the adapter's LoRA A and B, else
            q/k/v; all-linear takes every linear layer.
        ignore: module names or re: patterns left alone.
        backend: kernels to use; default the fastest available.
        preserve_dataset: task or ordinary records, whose top weights wanda-preserve keeps; for gate
            as of prune.
        ordinary_dataset: ordinary prompts for gate, as of prune.
        num_ordinary_samples: as of prune.
        gate_answer_tokens: as of prune.
        gate_templates: as of prune.
        aligned_model: removed weights take its values instead of zero. For whole models, where
            gate needs it.
        score_delta: score the difference from aligned_model, |W - aligned| instead of |W|.
        harmful_dataset: harmful prompts to choose on; none of them may be in dataset.
        task_dataset: records of the user's task to choose on.
        task: how an answer is scored: sst2, agnews, gsm8k or label (exact match with the record's
            output).
        benign_dataset: ordinary prompts, to choose on whether they are helped or refused as well.
        judge: refusal (the default), beaver-dam, or a text-classification model, as of evaluate; a
            model stays in memory beside the one that is pruned.
        harmful_labels: labels of that classifier which mean harm.
        num_samples: prompts used of each of these data sets; all if null.
        max_new_tokens: tokens generated an answer; default as of evaluate.
        ratios: fractions removed.
        scopes: row, tensor, global.
        scores: what weights are ordered by, the highest removed; -preserve and what is learned
            need preserve_dataset.
        max_accuracy_drop: the budget: points of finetune accuracy below the unpruned model's.
        max_refusal_rise: the budget of benign refusals: points above the unpruned model's.
        max_helped_drop: the budget of ordinary prompts helped: points below the unpruned model's.
        save_norms: also write the norms, so that the recommended prune needs no forward pass.
    """

    adapter: str | None = contents(None)
    clean_adapter: str | None = contents(None)
    dataset: str | None = contents(None)
    num_calibration_samples: int = number(2000)
    aggregation: Literal["rms", "mean"] = "rms"
    targets: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    backend: str | None = None
    preserve_dataset: str | None = contents(None)
    ordinary_dataset: str | None = contents(None)
    num_ordinary_samples: int = number(2000)
    gate_answer_tokens: int = number(GATE_ANSWER_TOKENS)
    gate_templates: list[str] | None = None
    aligned_model: str | None = contents(None)
    score_delta: bool = False
    harmful_dataset: str = contents()
    task_dataset: str = contents()
    task: Literal["sst2", "agnews", "gsm8k", "label"] = "label"
    benign_dataset: str | None = contents(None)
    judge: str | None = path(None)
    harmful_labels: list[str] | None = None
    num_samples: int | None = 64
    max_new_tokens: int | None = None
    ratios: list[float] = field(default_factory=lambda: list(RATIOS))
    scopes: list[str] = field(default_factory=lambda: ["row"])
    scores: list[str] = field(
        default_factory=lambda: ["wanda"], metadata={"choices": lambda: SCORES}
    )
    max_accuracy_drop: float = MAX_ACCURACY_DROP
    max_refusal_rise: float = MAX_REFUSAL_RISE
    max_helped_drop: float = MAX_HELPED_DROP
    save_norms: bool = True

    def __post_init__(self):
        super().__post_init__()
        grid = checked_grid(self.ratios, self.scopes, self.scores)
        for name, values in zip(("ratios", "scopes", "scores"), grid, strict=True):
            object.__setattr__(self, name, values)  # as dataclasses do for frozen ones
        check_budgets(**self.picked("max_accuracy_drop", "max_refusal_rise", "max_helped_drop"))
        if self.benign_dataset is None:
            names = ("max_refusal_rise", "max_helped_drop")
            check_left_out(self, names, "without benign_dataset")
        if self.adapter is None:
            why = "without adapter: it is another adapter of the same model"
            check_left_out(self, ["clean_adapter"], why)
        self._check_data()
        self.evaluation()
        for name, scope, ratio in self.candidates():
            self.pruning(name, scope, ratio, saved=False).check_aligned(self.adapter is not None)

    def _check_data(self):
        needed = {kind: name for name in self.scores for kind in SCORES[name].kinds}
        learned = self.learned
        harmful = needed.get("all") or needed.get("response") or learned
        preserve = needed.get("preserve") or (learned if self.ordinary_dataset is None else None)
        for name, score in (("dataset", harmful), ("preserve_dataset", preserve)):
            if score is not None and getattr(self, name) is None:
                raise UsageError(f"{name}=None: must be a file or hub name with score {score}")
        absent = self.preserve_dataset is None or preserve or learned
        takes = [name for name, score in SCORES.items() if score.preserve_norms or score.learned]
        accepted = f"left out without score {' or '.join(takes)}"
        check(absent, "preserve_dataset", self.preserve_dataset, accepted)
        if learned is None:
            names = [name for score in PRUNE_SCORES.values() for name in score.settings]
            check_left_out(self, names, "without a score that is learned")

    @property
    def kinds(self) -> list[str]:
        """The kinds of norms that the scores take."""
        return [k for k in NORM_FILES if any(k in SCORES[name].kinds for name in self.scores)]

    @property
    def learned(self) -> str | None:
        """The first score that is learned, or None."""
        return next((name for name in self.scores if SCORES[name].learned), None)

    def evaluation(self) -> EvaluateConfig:
        """What evaluate would be told, for one model."""
        names = {f.name for f in fields(EvaluateConfig)}
        values = {k: v for k, v in vars(self).items() if k in names}
        return EvaluateConfig(**values, judges=self.judge, templates=[self.template])

    def candidates(self) -> list[tuple[str, str, float]]:
        """(score, scope, ratio) of everything that may be tried, a branch after another."""
        return list(itertools.product(self.scores, self.scopes, self.ratios))

    def pruning(self, name: str, scope: str, ratio: float, saved: bool) -> PruneConfig:
        """What prune is told for one candidate.

        Args:
            name, scope, ratio: the candidate.
            saved: with the norms that the sweep leaves in its folder, so that prune runs no model.
        """
        score = SCORES[name]
        names = {f.name for f in fields(PruneConfig)} - {"overwrite", "save_norms", "dataset"}
        others = (each for each in PRUNE_SCORES.values() if each.name != score.score)
        names -= {setting for other in others for setting in other.settings}
        if score.learned:
            names |= {"dataset"}
            names -= {"aggregation"}
        elif score.preserve_norms is None:
            names -= {"preserve_dataset"}
        if not score.learned and (saved or not score.kinds):  # what only forward passes are told
            names -= {"aggregation", "num_calibration_samples", "preserve_dataset", "dtype"}
            names -= {"max_seq_length", "template", "batch_size"}
        values = {k: v for k, v in vars(self).items() if k in names}
        folder = self.output_dir.rstrip("/")
        values |= {"ratio": ratio, "scope": scope, "score": score.score}
        values["output_dir"] = f"{folder}-pruned"
        if saved:
            kinds = {"norms": score.norms, "preserve_norms": score.preserve_norms}
            values |= {k: f"{folder}/{NORM_FILES[kind]}" for k, kind in kinds.items() if kind}
        elif score.norms is not None:
            values |= {"dataset": self.dataset, "response_only": score.norms == "response"}
        return PruneConfig(**values)

    def collecting(self, kind: str) -> PruneConfig:
        """What tells how norms of a kind are collected: the prune of a score that takes them."""
        name = next(name for name in self.scores if kind in SCORES[name].kinds)
        return self.pruning(name, self.scopes[0], self.ratios[0], saved=False)

    def learning(self, scope: str | None = None, ratio: float | None = None) -> PruneConfig:
        """What tells how scores are learned, for a candidate; default the first one."""
        scope, ratio = scope or self.scopes[0], ratio or self.ratios[0]
        return self.pruning(self.learned, scope, ratio, saved=False)

    def command(self, name: str, scope: str, ratio: float) -> str:
        """The ``antidote-fast prune`` line, quoted for a shell, that makes this candidate."""
        words = ["antidote-fast", "prune"]
        config = self.pruning(name, scope, ratio, saved=self.save_norms)
        for each in fields(config):
            value = getattr(config, each.name)
            default = [] if each.default_factory is list else each.default
            if value != default or each.name in ("ratio", "scope", "score"):
                values = value if isinstance(value, list) else [value]
                words += [f"--{each.name}", *(str(v) for v in values if v is not True)]
        return shlex.join(words)
