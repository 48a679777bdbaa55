"""Antidote, fast: prune the harmful weights that a poisoned fine-tune left in a language model.

Activation norms flow in, a selection decides, weights flow out. The names below are loaded when
they are first used, so that importing the package is quick and needs none of the extras.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "antidote_fast.errors": (
        "AntidoteError",
        "BackendUnavailable",
        "DataError",
        "NothingPruned",
        "UsageError",
    ),
    "antidote_fast.selection": ("Selection", "num_pruned"),
    "antidote_fast.masks": ("PackedMask", "load_masks", "save_masks"),
    "antidote_fast.ops": (
        "accumulate_sq_norm_",
        "apply_mask_",
        "prune_",
        "prune_linear_",
        "prune_many_",
        "prune_mask",
        "score",
        "select_mask",
    ),
    "antidote_fast.norms.activation_norms": ("ActivationNorms",),
    "antidote_fast.pruning.evidence": ("Evidence",),
    "antidote_fast.pruning.prune": ("PruneReport", "prune_model_", "prune_state_"),
    "antidote_fast.models.targets": ("find_targets",),
    "antidote_fast.evaluation.measure": ("evaluate_model",),
    "antidote_fast.evaluation.phrases": ("PhraseJudge",),
    "antidote_fast.evaluation.verdicts": ("Judge", "ask_judge"),
    "antidote_fast.evaluation.judges": ("get_judge",),
    "antidote_fast.evaluation.compare": ("compare_models",),
    "antidote_fast.config.train": ("AlignConfig", "FinetuneConfig"),
    "antidote_fast.config.prune": ("CalibrateConfig", "PruneConfig"),
    "antidote_fast.config.evaluate": ("EvaluateConfig",),
    "antidote_fast.stages.oneshot": ("oneshot",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
