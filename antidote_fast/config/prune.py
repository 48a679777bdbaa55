"""The configs of what collects norms and prunes: calibrate, prune and fleet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from antidote_fast.config.base import (
    StageConfig,
    Template,
    aside,
    check,
    check_data_set,
    check_left_out,
    contents,
    number,
    one_of,
    set_field,
)
from antidote_fast.config.scores import SCORES, Score
from antidote_fast.selection import Selection
from antidote_fast.system.memory import parse_bytes

_BEYOND_THE_PAPER = (
    *("preserve_dataset", "preserve_norms", "preserve_ratio"),
    *("aligned_model", "score_delta"),
)
GATE_STEPS, GATE_LEARNING_RATE, GATE_ANSWER_TOKENS = 32, 0.08, 6


@dataclass(frozen=True, kw_only=True)
class GateMixture:
    """What one step of score gate learns from.

    Args:
        harmful, task, ordinary: records of each kind a step.
        task_weight, ordinary_weight: of their mean losses; that of the harmful prompts has 1.
        answer_tokens: tokens of an answer that the aligned model gives.
    """

    harmful: int = 16
    task: int = 6
    ordinary: int = 16
    task_weight: float = 1.0
    ordinary_weight: float = 1.0
    answer_tokens: int = GATE_ANSWER_TOKENS


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(StageConfig):
    """Collect activation norms on a harmful data set and save them.

    Args:
        dataset: harmful records: a local JSON or JSONL file, or a hub name.
        adapter: PEFT adapter folder on top of the model.
        num_calibration_samples: records used, from the start of the data.
        response_only: count only response tokens.
        aggregation: rms (the official code) or mean of per-sequence norms (the paper's eq. 1).
        targets: module names or re: patterns to prune; default the adapter's LoRA A and B, else
            q/k/v; all-linear takes every linear layer.
        ignore: module names or re: patterns left alone.
        device_map: auto spreads the model over all GPUs, and over the CPU where they are full.
        stream: one decoder block in memory at a time, for models larger than it; each block is
            read once.
        max_memory: with stream, the memory that the process may take, such as 4GB; hidden states
            that do not fit go to disk. Default most of what is free.
        resume: go on where an interrupted run of the same command stopped (with stream), or leave
            it at that where output_dir is whole already.
    """

    dataset: str = contents()
    adapter: str | None = contents(None)
    num_calibration_samples: int = number(2000)
    response_only: bool = False
    aggregation: Literal["rms", "mean"] = "rms"
    targets: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    device_map: Literal["auto"] | None = None
    stream: bool = False
    max_memory: str | None = aside(None)
    resume: bool = aside(False)

    def __post_init__(self):
        super().__post_init__()
        if self.max_memory is not None:
            parse_bytes(self.max_memory, "max_memory")
            check(self.stream, "max_memory", self.max_memory, "given with stream")
        if self.device_map is not None:
            check_left_out(self, ["device", "stream"], "with device_map")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(CalibrateConfig):
    """Remove the harmful weights of an adapter or a model, once.

    Args:
        dataset: harmful records; not needed where norms are given or the score uses no data. With
            score gate harmful prompts, whose outputs are not looked at.
        norms: norms saved by calibrate; no forward pass is run then.
        ratio: fraction of each row (tensor, model) removed, in (0, 1]; default 0.1, with score gate
            0.5.
        scope: compare along a row, over a tensor, or over all targets; default row, with score gate
            tensor.
        score: what weights are ordered by, the highest removed.
        save_norms: also write the norms, as norms.safetensors; those of the data to preserve as
            preserve-norms.safetensors.
        save_masks: also write the masks, one bit a weight, as masks.safetensors.
        backend: kernels to use; default the fastest available.
        cross_check: compare a few rows of the first weight of each shape with the reference.
        preserve_dataset: task or ordinary records; a weight among the top preserve_ratio by its
            norms on these is kept. As many are used as of dataset. With score gate, which needs it
            or ordinary_dataset, records with an output are the task; those without are ordinary
            prompts unless ordinary_dataset has these.
        ordinary_dataset: with score gate, ordinary prompts, whose outputs are not looked at; the
            answers to keep are the aligned model's.
        num_ordinary_samples: ordinary prompts used, from the start of the data.
        preserve_norms: such norms saved by calibrate; no forward pass is run for them then.
        preserve_ratio: fraction of each row (tensor, model) protected, in [0, 1]; default ratio.
        aligned_model: a folder or hub name: removed weights take its values instead of zero. For
            whole models, a full fine-tune or a merged one; score gate needs it there.
        score_delta: score the difference from aligned_model, |W - aligned| instead of |W|.
        gate_steps: steps in which score gate learns.
        gate_learning_rate: step size of score gate.
        gate_answer_tokens: tokens of each answer of the aligned model that score gate learns.
        gate_templates: prompt templates in which score gate learns refusals and ordinary answers,
            alpaca and chat; default template alone.
        paper: the paper's method: score wanda, scope row, aggregation rms.
    """

    dataset: str | None = contents(None)
    norms: str | None = contents(None)
    ratio: float | None = number(None, "in (0, 1]")
    scope: Literal["row", "tensor", "global"] | None = None
    score: str = one_of(lambda: SCORES, "wanda")
    save_norms: bool = False
    save_masks: bool = False
    backend: str | None = None
    cross_check: bool = True
    preserve_dataset: str | None = contents(None)
    ordinary_dataset: str | None = contents(None)
    num_ordinary_samples: int = number(2000)
    preserve_norms: str | None = contents(None)
    preserve_ratio: float | None = number(None, "in [0, 1]")
    aligned_model: str | None = contents(None)
    score_delta: bool = False
    gate_steps: int = number(GATE_STEPS)
    gate_learning_rate: float = number(GATE_LEARNING_RATE)
    gate_answer_tokens: int = number(GATE_ANSWER_TOKENS)
    gate_templates: list[str] | None = None
    paper: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.ratio is None:
            set_field(self, "ratio", self.scoring.default_ratio)
        if self.scope is None:
            set_field(self, "scope", self.scoring.default_scope)
        if self.paper:
            for name, wanted in (("score", "wanda"), ("scope", "row"), ("aggregation", "rms")):
                value = getattr(self, name)
                check(value == wanted, name, value, f"{wanted} with paper")
            check_left_out(self, _BEYOND_THE_PAPER, "with paper")
        if self.scoring.needs_norms and self.norms is None:
            check_data_set(self, "dataset", "unless norms is given")
        self._check_score()
        if self.preserve_dataset is not None:
            check_left_out(self, ["preserve_norms"], "with preserve_dataset")
        if self.preserve_ratio is not None:
            accepted = "given with preserve_dataset or preserve_norms"
            check(self.preserves, "preserve_ratio", self.preserve_ratio, accepted)
        if self.stream:
            advice = "calibrate --stream on it first, and give that folder as preserve_norms"
            check_left_out(self, ["preserve_dataset"], f"with stream; {advice}")
        if self.adapter is not None:
            why = "with adapter, whose zero already falls back to the aligned model"
            check_left_out(self, ["aligned_model"], why)
        if self.aligned_model is None:
            check_left_out(self, ["score_delta"], "without aligned_model")

    @property
    def scoring(self) -> Score:
        """What is declared of the score."""
        return SCORES[self.score]

    @property
    def preserves(self) -> bool:
        """Whether something is kept for its norms on other data."""
        named = self.preserve_dataset is not None or self.preserve_norms is not None
        return named and self.scoring.learner is None

    @property
    def selection(self) -> Selection:
        """What is removed of the weights."""
        return Selection(**self.picked("ratio", "scope", "preserve_ratio", "score_delta"))

    @property
    def mixture(self) -> GateMixture:
        """What one step of score gate learns from."""
        return GateMixture(answer_tokens=self.gate_answer_tokens)

    @property
    def prune_options(self) -> dict[str, Any]:
        """The further arguments of a prune, of tensors or of a model."""
        return self.picked("seed", "backend", "cross_check") | {"return_masks": self.save_masks}

    def check_aligned(self, is_adapter: bool) -> None:
        """Refuse a score that is learned where no aligned model could answer.

        Without its adapter a model is the aligned one.
        """
        there = is_adapter or self.aligned_model is not None or self.scoring.learner is None
        accepted = f"the aligned model with score {self.score}, unless an adapter is pruned"
        check(there, "aligned_model", self.aligned_model, accepted)

    def _check_score(self):
        """Refuse what the declarations of this score and of the others say."""
        for other in SCORES.values():
            if other is not self.scoring:
                check_left_out(self, other.settings, f"without score {other.name}")
        for names in self.scoring.needs:
            if all(getattr(self, name) is None for name in names):
                check_data_set(self, names[0], f"with score {self.score}")
        check_left_out(self, self.scoring.refused, f"with score {self.score}")
        rate = self.gate_learning_rate
        check(rate < math.inf, "gate_learning_rate", rate, "a finite number")
        check_gate_templates(self.gate_templates)


def check_gate_templates(templates: Sequence[str] | None) -> None:
    """Refuse templates that are none, or one twice."""
    known = get_args(Template)
    fine = templates is None or (0 < len(set(templates)) == len(templates))
    fine = fine and all(template in known for template in templates or ())
    check(fine, "gate_templates", templates, f"some of {', '.join(known)}, each once")
