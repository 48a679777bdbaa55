"""The align stage: a base model tuned on safe data, written as a whole model."""

from typing import Any

from antidote_fast.config.train import AlignConfig
from antidote_fast.data.load import load_records
from antidote_fast.files.checkpoint import Checkpoint
from antidote_fast.stages.tuning import TrainingData, tokenised, tune
from antidote_fast.training import defenses


def run(config: AlignConfig, *, progress: Any = False) -> dict:
    """Tune a model on safe records and write it with its tokenizer.

    With LoRA the adapter is merged, so that a later stage starts from an ordinary model (the
    paper's double LoRA). Data are read and tokenised before any weights are loaded.

    Returns and raises what :func:`antidote_fast.stages.tuning.tune` does.
    """
    return tune(config, "align", load_examples, merges=True, progress=progress)


def load_examples(config: AlignConfig, base: Checkpoint) -> TrainingData:
    """Read and tokenise what is trained on; no weights are loaded."""
    records = load_records(config.dataset, limit=config.num_train_samples, require_output=True)
    return tokenised(config, base, records, defenses.align_objective)
