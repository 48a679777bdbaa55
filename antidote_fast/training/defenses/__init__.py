"""The defenses that the paper compares Antidote with, one file each.

A defense is an :class:`~antidote_fast.training.objective.Objective`: what it changes of the loss of
an optimizer step. The training loop, its checkpoints and its data are those of plain fine-tuning.
"""

import functools
from collections.abc import Callable

from antidote_fast.config.train import AlignConfig, FinetuneConfig
from antidote_fast.data.batches import encode_in
from antidote_fast.data.load import load_records
from antidote_fast.data.records import Record
from antidote_fast.models.kinds import Tokenizer
from antidote_fast.training.defenses.ldifs import LDIFS
from antidote_fast.training.defenses.lisa import Lisa
from antidote_fast.training.defenses.repnoise import RepNoise
from antidote_fast.training.defenses.vaccine import Vaccine
from antidote_fast.training.objective import Objective


def align_objective(config: AlignConfig, tokenizer: Tokenizer) -> tuple[Callable, list[Record]]:
    """What :func:`antidote_fast.training.sft.train` takes for an :class:`AlignConfig`'s defense.

    Returns:
        (the objective's maker, the harmful records that it trains on).

    Raises:
        DataError: harmful data that cannot be used.
    """
    if config.defense == "repnoise":
        harmful = load_records(config.harmful_dataset, require_output=True)
        examples = encode_in(harmful, tokenizer, config.used_templates, config.max_seq_length)
        return functools.partial(RepNoise, harmful=examples), harmful
    return (Vaccine if config.defense == "vaccine" else Objective), []


def finetune_objective(
    config: FinetuneConfig, tokenizer: Tokenizer
) -> tuple[Callable, list[Record]]:
    """The same for a :class:`FinetuneConfig`'s defense: (maker, safe records that it trains on)."""
    if config.defense == "lisa":
        safe = load_records(config.safe_dataset, limit=config.num_safe_samples, require_output=True)
        examples = encode_in(safe, tokenizer, config.used_templates, config.max_seq_length)
        return functools.partial(Lisa, safe=examples), safe
    return (LDIFS if config.defense == "ldifs" else Objective), []
