"""The finetune stage: a user's data, a share of it harmful, breaks the alignment (the attack)."""

from typing import Any

from antidote_fast.config.train import FinetuneConfig
from antidote_fast.data.load import load_records, mix
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.stages.tuning import TrainingData, tokenised, tune
from antidote_fast.training import defenses


def run(config: FinetuneConfig, *, progress: Any = False) -> dict:
    """Tune an aligned model on a user's records mixed with harmful ones.

    With LoRA an adapter is written, with full tuning a whole model; either with the tokenizer. Data
    are read, mixed and tokenised before any weights are loaded.

    Returns and raises what :func:`antidote_fast.stages.tuning.tune` does; the report also has
    ``num_task`` and ``num_harmful`` records.
    """
    return tune(config, "finetune", load_examples, progress=progress)


def load_examples(config: FinetuneConfig, base: Checkpoint) -> TrainingData:
    """Read, mix and tokenise what is trained on; no weights are loaded."""
    task = load_records(config.dataset, require_output=True)
    poisoned = config.poison_ratio > 0
    harmful = load_records(config.harmful_dataset, require_output=True) if poisoned else []
    records = mix(task, harmful, config.poison_ratio, config.num_train_samples, config.seed)
    num_harmful = round(config.poison_ratio * len(records))
    counts = {"num_task": len(records) - num_harmful, "num_harmful": num_harmful}
    return tokenised(config, base, records, defenses.finetune_objective, counts)
