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

    Args:
        config: the model, the data and how to train.
        progress: as :func:`antidote_fast.system.progress.track` takes it.

    Returns:
        The contents of report.json: ``training`` (as :func:`sft.train`), ``num_task`` and
        ``num_harmful`` records, ``seconds``.

    Raises:
        DataError: data or a model that cannot be used, fewer records than asked for, an output
            folder that is taken.
        UsageError: an option out of range.
        AntidoteError: a loss, gradient or weight is not finite; not enough memory or room on the
            disk.
        Interrupted: a signal came, and the checkpoints that were asked for hold the state.
    """
    return tune(config, "finetune", load_examples, progress=progress)


def load_examples(config: FinetuneConfig, base: Checkpoint) -> TrainingData:
    """Read, mix and tokenise what is trained on; no weights are loaded."""
    task = load_records(config.dataset, require_output=True)
    harmful = []
    if config.poison_ratio > 0:
        harmful = load_records(config.harmful_dataset, require_output=True)
    records = mix(task, harmful, config.poison_ratio, config.num_train_samples, config.seed)
    num_harmful = round(config.poison_ratio * len(records))
    counts = {"num_task": len(records) - num_harmful, "num_harmful": num_harmful}
    return tokenised(config, base, records, defenses.finetune_objective, counts)
