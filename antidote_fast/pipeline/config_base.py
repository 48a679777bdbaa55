"""What the configs of all stages share: the checks of values, and the flags that each one takes."""

from dataclasses import dataclass
from typing import Literal

from antidote_fast.errors import UsageError

DType = Literal["auto", "bfloat16", "float16", "float32"]
Template = Literal["alpaca", "chat"]


def check(condition, name, value, accepted):
    """Refuse a value in one line that names the argument and what is accepted."""
    if not condition:
        raise UsageError(f"{name}={value!r}: must be {accepted}")


def check_positive(config, *names):
    """Refuse fields that are not above 0; None is passed over."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            check(value > 0, name, value, "greater than 0")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage takes.

    Args:
        model_name_or_path: the base model: a local folder or a hub name.
        output_dir: the folder to write; must not exist or be empty unless overwrite is given.
        overwrite: replace output_dir, if this tool wrote it.
        dtype: dtype the model is loaded in; auto takes the checkpoint's.
        device: torch device; auto takes cuda where there is one.
        seed: seed of every random choice.
        max_seq_length: tokens kept of one prompt with its response.
        template: prompt template, the same in training and evaluation.
        batch_size: sequences a forward pass.
        trust_remote_code: allow code that a checkpoint ships to run.
    """

    model_name_or_path: str
    output_dir: str
    overwrite: bool = False
    dtype: DType = "auto"
    device: str = "auto"
    seed: int = 0
    max_seq_length: int = 512
    template: Template = "alpaca"
    batch_size: int = 8
    trust_remote_code: bool = False

    def __post_init__(self):
        check_positive(self, "max_seq_length", "batch_size")
        check(self.seed >= 0, "seed", self.seed, "an integer >= 0")
