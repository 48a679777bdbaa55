"""Scores, one module each; :data:`antidote_fast.config.scores.SCORES` declares them.

A module has one of two functions, by its declaration. Where the score is the size of a weight times
a factor of its input channel, which the kernels compute, ``channel_norm(act_norm)`` gives that
factor, (in_features,) fp32 or None for 1, from the activation norm of the weight (None without
norms). Where it is a matrix of its own (``own_matrix``), ``row_scores(name, weight, evidence,
seed)`` gives a function of (start, stop) that gives fp32 scores of those rows, (stop - start,
in_features), finite or not, on any device; it is called for all rows of a weight once, in order.
"""

import importlib
from types import ModuleType

from antidote_fast.config.scores import SCORES


def score_module(name: str) -> ModuleType:
    """The module that computes the score of this name, which must be declared."""
    return importlib.import_module(SCORES[name].module or f"{__name__}.{name}")
