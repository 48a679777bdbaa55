"""Judges by name: the phrases of `phrases`, the models of `classifiers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from antidote_fast.errors import UsageError
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.evaluation.verdicts import Judge

if TYPE_CHECKING:
    from antidote_fast.evaluation.classifiers import ClassifierJudge


def _model_judge(name: str) -> tuple[type[ClassifierJudge], str]:
    """(the class, the folder or hub name) of a judge that is a model."""
    from antidote_fast.evaluation.classifiers import BEAVER_DAM, BeaverDamJudge, ClassifierJudge

    if name in ("beaver-dam", BEAVER_DAM):
        return BeaverDamJudge, BEAVER_DAM
    path = name.removeprefix("beaver-dam:")
    return (ClassifierJudge if path == name else BeaverDamJudge), path


def check_judge(
    name: str,
    harmful_labels: Sequence[str] | None = None,
    url: str | None = None,
    model: str | None = None,
) -> None:
    """Refuse what `get_judge` would refuse, as far as that shows without loading weights.

    Raises:
        DataError: no such model, or one that is no classifier for this.
        UsageError: no name, labels that do not tell, or labels named for another judge.
    """
    if not name:
        raise UsageError("judge='': must be refusal, beaver-dam, or a text-classification model")
    for option, value in (("judge_url", url), ("judge_model", model)):
        if value is not None:
            raise UsageError(f"{option}={value!r}: must be left out with judge={name!r}")
    kind, path = (None, "") if name == "refusal" else _model_judge(name)
    if harmful_labels and (kind is None or not kind.takes_labels):
        raise UsageError(
            f"harmful_labels={list(harmful_labels)}: must be left out with judge={name!r}"
        )
    if kind is not None:
        kind.check(path, harmful_labels)


def get_judge(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    harmful_labels: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    url: str | None = None,
    model: str | None = None,
    batch_size: int = 16,
) -> Judge:
    """The judge of a name.

    Args:
        name: refusal; beaver-dam, or beaver-dam:FOLDER for a local copy; else the folder or hub
            name of a text-classification model.
        device, dtype: as :func:`antidote_fast.models.loading.load_model` takes them.
        harmful_labels: the classifier's labels that mean harm, where their names do not tell.
        labels: as `PhraseJudge` takes them.
        url, model: of a judge that asks a server.
        batch_size: texts at once.

    Raises:
        DataError, UsageError: as `check_judge`, and a model that cannot be loaded.
    """
    check_judge(name, harmful_labels, url, model)
    if name == "refusal":
        return PhraseJudge(labels=labels)
    kind, path = _model_judge(name)
    options = {"harmful_labels": harmful_labels} if harmful_labels else {}
    return kind.from_pretrained(path, device=device, dtype=dtype, batch_size=batch_size, **options)
