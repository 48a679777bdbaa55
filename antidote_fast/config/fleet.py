"""What ``fleet`` takes: a manifest of adapters, and the settings of each."""

import re
from dataclasses import dataclass, field
from typing import Literal

from antidote_fast.config.base import StageConfig, aside, check_left_out, contents, number, one_of
from antidote_fast.config.scores import computed_scores
from antidote_fast.errors import UsageError


def parse_shard(text) -> tuple[int, int]:
    """(i, n) of ``"i/n"``, 0 <= i < n.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if index >= count:
        raise UsageError(f"shard={text!r:.60}: must be i/n with 0 <= i < n, such as 0/4")
    return index, count


@dataclass(frozen=True, kw_only=True)
class FleetConfig(StageConfig):
    """Prune many adapters of one base model, which stays in memory.

    Args:
        model_name_or_path: the base model of all adapters (--base for short).
        output_dir: the folder in which each job writes its own; may exist.
        overwrite: replace a job's folder that was made with other settings or from other files.
        manifest: JSONL file of jobs, one a line: adapter (a folder, seen from the manifest's), name
            (of the job's folder in output_dir; default the adapter folder's) and flags of this
            command that are other for this adapter, such as ratio or dataset.
        shard: i/n, 0 <= i < n: take every n-th job from the i-th on, for n processes or machines
            that share output_dir.
        engine: local is this process and one device; ray spreads jobs over Ray actors.
        num_workers: Ray actors; default as many as there are GPUs, on CPUs 1.
        dataset: harmful records; not needed where the score uses none or every job names its own.
        num_calibration_samples: records used, from the start of the data.
        response_only: count only response tokens.
        aggregation: rms (the official code) or mean of per-sequence norms (the paper's eq. 1).
        targets: names or re: patterns of adapted modules to prune; default all LoRA A and B.
        ignore: module names or re: patterns left alone.
        ratio: fraction of each row (tensor, model) removed, in (0, 1].
        scope: compare along a row, over a tensor, or over all targets.
        score: what weights are ordered by, the highest removed.
        save_norms: also write each job's norms.
        save_masks: also write each job's masks, one bit a weight.
        backend: kernels to use; default the fastest available.
        preserve_dataset: task or ordinary records; a weight among the top preserve_ratio by its
            norms on these is kept.
        preserve_ratio: fraction of each row (tensor, model) protected, in [0, 1]; default ratio.
    """

    manifest: str = aside(is_path=True)
    shard: str = aside("0/1")
    engine: Literal["local", "ray"] = aside("local")
    num_workers: int | None = aside(None, "greater than 0")
    dataset: str | None = contents(None)
    num_calibration_samples: int = number(2000)
    response_only: bool = False
    aggregation: Literal["rms", "mean"] = "rms"
    targets: list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    ratio: float = number(0.1, "in (0, 1]")
    scope: Literal["row", "tensor", "global"] = "row"
    score: str = one_of(computed_scores, "wanda")
    save_norms: bool = False
    save_masks: bool = False
    backend: str | None = None
    preserve_dataset: str | None = contents(None)
    preserve_ratio: float | None = number(None, "in [0, 1]")

    def __post_init__(self):
        super().__post_init__()
        if self.engine == "local":
            check_left_out(self, ["num_workers"], "with engine local, which is one worker")
        parse_shard(self.shard)
