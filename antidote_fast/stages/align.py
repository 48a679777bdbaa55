"""The align stage: a base model tuned on safe data, written as a whole model."""

from typing import Any

from antidote_fast.config.train import AlignConfig
from antidote_fast.data.load import load_records
from antidote_fast.data.records import Record
from antidote_fast.stages.tuning import tune
from antidote_fast.training import defenses


def run(config: AlignConfig, *, progress: Any = False) -> dict:
    """Tune a model on safe records and write it with its tokenizer.

    With LoRA the adapter is merged, so that a later stage starts from an ordinary model (the
    paper's double LoRA). Data are read and tokenised before any weights are loaded.

    Args:
        config: the model, the data and how to train.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Returns:
        The contents of report.json: ``training`` (as :func:`sft.train`) and ``seconds``.

    Raises:
        DataError: data or a model that cannot be used, an output folder that is taken.
        UsageError: an option out of range.
        AntidoteError: a loss, gradient or weight is not finite; not enough memory or room on the
            disk.
        Interrupted: a signal came, and the checkpoints that were asked for hold the state.
    """
    return tune(
        config, "align", training_records, defenses.align_objective, merges=True, progress=progress
    )


def training_records(config: AlignConfig) -> tuple[list[Record], dict]:
    """The records to train on, and what the report says of them."""
    return load_records(config.dataset, limit=config.num_train_samples, require_output=True), {}
