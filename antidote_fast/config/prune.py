"""The configs of what collects norms and prunes: calibrate, prune and fleet."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from antidote_fast.config.base import StageConfig, aside, check, check_positive, contents
from antidote_fast.errors import UsageError
from antidote_fast.selection import Selection
from antidote_fast.system.memory import parse_bytes

_BEYOND_THE_PAPER = (
    *("preserve_dataset", "preserve_norms", "preserve_ratio"),
    *("base_model", "score_delta"),
)

# What score gate has no use for, and what each is then.
_NOT_WITH_GATE = {
    "norms": None,
    "preserve_norms": None,
    "preserve_ratio": None,
    "score_delta": False,
    "stream": False,
    "device_map": None,
    "response_only": False,
    "aggregation": "rms",
}
GATE_STEPS, GATE_LEARNING_RATE = 32, 0.08


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
    answer_tokens: int = 6


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
    num_calibration_samples: int = 2000
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
        check_positive(self, "num_calibration_samples")
        if self.max_memory is not None:
            parse_bytes(self.max_memory, "max_memory")
            check(self.stream, "max_memory", self.max_memory, "given with stream")
        if self.device_map is not None:
            check(self.device == "auto", "device", self.device, "left out with device_map")
            check(not self.stream, "stream", self.stream, "left out with device_map")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(CalibrateConfig):
    """Remove the harmful weights of an adapter or a model, once.

    Args:
        dataset: harmful records; not needed where norms are given or the score uses no data. With
            score gate harmful prompts, whose outputs are not looked at.
        norms: norms saved by calibrate; no forward pass is run then.
        ratio: fraction of each row (tensor, model) removed, in (0, 1]; score gate wants about 0.5.
        scope: compare along a row, over a tensor, or over all targets.
        score: wanda = |W| * activation norm; magnitude = |W|; random; gate = gates on the weights,
            learned to give back the aligned model's refusals and to keep what preserve_dataset
            shows.
        save_norms: also write the norms, as norms.safetensors; those of the data to preserve as
            preserve-norms.safetensors.
        save_masks: also write the masks, one bit a weight, as masks.safetensors.
        backend: kernels to use; default the fastest available.
        cross_check: compare a few rows of the first weight of each shape with the reference.
        preserve_dataset: task or ordinary records; a weight among the top preserve_ratio by its
            norms on these is kept. As many are used as of dataset. With score gate, which needs it,
            records with an output are the task, and those without are ordinary prompts.
        preserve_norms: such norms saved by calibrate; no forward pass is run for them then.
        preserve_ratio: fraction of each row (tensor, model) protected, in [0, 1]; default ratio.
        base_model: the aligned model, a folder or hub name: removed weights take its values instead
            of zero. For whole models, a full fine-tune or a merged one; score gate needs it there.
        score_delta: score the difference from base_model, |W - base| instead of |W|.
        gate_steps: steps in which score gate learns.
        gate_learning_rate: step size of score gate.
        paper: the paper's method: score wanda, scope row, aggregation rms.
    """

    dataset: str | None = contents(None)
    norms: str | None = contents(None)
    ratio: float = 0.1
    scope: Literal["row", "tensor", "global"] = "row"
    score: Literal["wanda", "magnitude", "random", "gate"] = "wanda"
    save_norms: bool = False
    save_masks: bool = False
    backend: str | None = None
    cross_check: bool = True
    preserve_dataset: str | None = contents(None)
    preserve_norms: str | None = contents(None)
    preserve_ratio: float | None = None
    base_model: str | None = contents(None)
    score_delta: bool = False
    gate_steps: int = GATE_STEPS
    gate_learning_rate: float = GATE_LEARNING_RATE
    paper: bool = False

    def __post_init__(self):
        super().__post_init__()
        check(0 < self.ratio <= 1, "ratio", self.ratio, "in (0, 1]")
        if self.paper:
            for name, value in (("score", "wanda"), ("scope", "row"), ("aggregation", "rms")):
                check(
                    getattr(self, name) == value, name, getattr(self, name), f"{value} with paper"
                )
            for name in _BEYOND_THE_PAPER:
                value = getattr(self, name)
                check(value is None or value is False, name, value, "left out with paper")
        if self.score == "wanda" and self.dataset is None and self.norms is None:
            raise UsageError("dataset=None: must be a file or hub name unless norms is given")
        self._check_gate()
        self._check_preserve()
        if self.base_model is not None and self.adapter is not None:
            raise UsageError(
                f"base_model={self.base_model!r}: must be left out with adapter, whose zero "
                "already falls back to the aligned model"
            )
        with_base = self.base_model is not None
        check(with_base or not self.score_delta, "score_delta", True, "left out without base_model")
        delta = self.score_delta and self.score == "random"
        check(not delta, "score_delta", self.score_delta, "left out with score random")

    @property
    def preserves(self) -> bool:
        """Whether something is kept for its norms on other data."""
        given = self.preserve_dataset is not None or self.preserve_norms is not None
        return given and self.score != "gate"

    @property
    def selection(self) -> Selection:
        """What is removed of the weights."""
        return Selection(
            self.ratio,
            scope=self.scope,
            preserve_ratio=self.preserve_ratio,
            score_delta=self.score_delta,
        )

    @property
    def prune_options(self) -> dict[str, Any]:
        """The further arguments of a prune, of tensors or of a model."""
        return {
            "seed": self.seed,
            "backend": self.backend,
            "return_masks": self.save_masks,
            "cross_check": self.cross_check,
        }

    def check_aligned(self, is_adapter):
        """Refuse score gate where no aligned model could answer.

        Args:
            is_adapter: what is pruned is an adapter, and without it the model is the aligned one.
        """
        if self.score == "gate" and not is_adapter and self.base_model is None:
            raise UsageError(
                "base_model=None: must be the aligned model with score gate, unless an adapter is "
                "pruned"
            )

    def _check_gate(self):
        defaults = {"gate_steps": GATE_STEPS, "gate_learning_rate": GATE_LEARNING_RATE}
        if self.score != "gate":
            for name, default in defaults.items():
                value = getattr(self, name)
                check(value == default, name, value, "left out without score gate")
            return
        for name in ("dataset", "preserve_dataset"):
            if getattr(self, name) is None:
                raise UsageError(f"{name}=None: must be a file or hub name with score gate")
        for name, value in _NOT_WITH_GATE.items():
            given = getattr(self, name)
            check(given == value, name, given, "left out with score gate")
        check_positive(self, *defaults)
        rate = self.gate_learning_rate
        check(math.isfinite(rate), "gate_learning_rate", rate, "a finite number")

    def _check_preserve(self):
        for name in ("preserve_dataset", "preserve_norms"):
            absent = self.score != "random" or getattr(self, name) is None
            check(absent, name, getattr(self, name), "left out with score random")
        alone = self.preserve_dataset is None or self.preserve_norms is None
        check(alone, "preserve_norms", self.preserve_norms, "left out with preserve_dataset")
        if self.preserve_ratio is not None:
            check(0 <= self.preserve_ratio <= 1, "preserve_ratio", self.preserve_ratio, "in [0, 1]")
            accepted = "given with preserve_dataset or preserve_norms"
            check(self.preserves, "preserve_ratio", self.preserve_ratio, accepted)
        if self.stream and self.preserve_dataset is not None:
            raise UsageError(
                f"preserve_dataset={self.preserve_dataset!r}: must be left out with stream; "
                "calibrate --stream on it first, and give that folder as preserve_norms"
            )
