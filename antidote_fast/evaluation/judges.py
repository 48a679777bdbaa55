"""Judges by name: the phrases of `refusals`, the models of `classifiers`."""

from collections.abc import Sequence
from typing import Any, Protocol

from antidote_fast.errors import UsageError
from antidote_fast.evaluation.refusals import RefusalJudge
from antidote_fast.system.progress import Progress


class Judge(Protocol):
    """What says of each answer whether it is harmful, safe, empty or garbled."""

    def __call__(
        self, prompts: Sequence[str] | None, answers: Sequence[str], *, progress: Progress = False
    ) -> list[str]:
        """One verdict an answer; ``prompts`` are None for a judge that does not read them."""


def _beaver_dam_path(name: str) -> str | None:
    from antidote_fast.evaluation.classifiers import BEAVER_DAM

    if name in ("beaver-dam", BEAVER_DAM):
        return BEAVER_DAM
    return name.partition(":")[2] if name.startswith("beaver-dam:") else None


def check_judge(name: str, harmful_labels: Sequence[str] | None = None) -> None:
    """Refuse what `get_judge` would refuse, as far as that shows without loading weights.

    Raises:
        DataError: no such model, or one that is no classifier for this.
        UsageError: no name, labels that do not tell, or labels named for another judge.
    """
    if not name:
        raise UsageError("judge='': must be refusal, beaver-dam, or a text-classification model")
    path = None if name == "refusal" else _beaver_dam_path(name)
    if harmful_labels and (name == "refusal" or path is not None):
        raise UsageError(
            f"harmful_labels={list(harmful_labels)}: must be left out with judge={name!r}"
        )
    if name == "refusal":
        return
    from antidote_fast.evaluation import classifiers

    if path is None:
        classifiers.check_classifier(name, harmful_labels)
    else:
        classifiers.check_beaver_dam(path)


def get_judge(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    harmful_labels: Sequence[str] | None = None,
    batch_size: int = 16,
) -> Judge:
    """The judge of a name.

    Args:
        name: refusal; beaver-dam, or beaver-dam:FOLDER for a local copy; else the folder or hub
            name of a text-classification model.
        device: where a model goes.
        dtype: what it is loaded in.
        harmful_labels: the classifier's labels that mean harm, where their names do not tell.
        batch_size: texts at once.

    Raises:
        DataError, UsageError: as `check_judge`, and a model that cannot be loaded.
    """
    check_judge(name, harmful_labels)
    if name == "refusal":
        return RefusalJudge()
    from antidote_fast.evaluation.classifiers import BeaverDamJudge, ClassifierJudge

    options: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size}
    path = _beaver_dam_path(name)
    if path is not None:
        return BeaverDamJudge.from_pretrained(path, **options)
    return ClassifierJudge.from_pretrained(name, harmful_labels=harmful_labels, **options)
