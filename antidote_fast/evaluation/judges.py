"""Judges by name: phrases, text classifiers, and chat models, here or behind an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from antidote_fast.errors import UsageError
from antidote_fast.evaluation.phrases import PhraseJudge
from antidote_fast.evaluation.verdicts import Judge

if TYPE_CHECKING:
    from antidote_fast.evaluation.classifiers import ClassifierJudge

PHRASES = PhraseJudge.name


def _chat_judge(name: str) -> tuple[str, str | None] | None:
    """(the form, the model that stands behind it in the name) of a chat judge; else None."""
    from antidote_fast.evaluation.chat_judges import CHAT_JUDGES

    form, colon, model = name.partition(":")
    return (form, model if colon else None) if form in CHAT_JUDGES else None


def _classifier(name: str) -> tuple[type[ClassifierJudge], str]:
    """(the class, the folder or hub name) of a judge that is a text classifier."""
    from antidote_fast.evaluation.classifiers import BEAVER_DAM, BeaverDamJudge, ClassifierJudge

    if name in ("beaver-dam", BEAVER_DAM):
        return BeaverDamJudge, BEAVER_DAM
    path = name.removeprefix("beaver-dam:")
    return (ClassifierJudge if path == name else BeaverDamJudge), path


def _check_options(
    name: str, harmful_labels: Sequence[str] | None, url: str | None, model: str | None
) -> tuple[str, str] | None:
    """(the form, the model) of a chat judge, None for another; options that do not fit are refused.

    No model is looked at.
    """
    if name == PHRASES and not (harmful_labels or url or model):
        return None  # and nothing is imported
    from antidote_fast.evaluation.chat_judges import CHAT_JUDGES

    if not name:
        listed = ", ".join((PHRASES, "beaver-dam", *CHAT_JUDGES))
        raise UsageError(f"judge='': must be one of {listed}, or a text-classification model")
    chat = _chat_judge(name)
    if harmful_labels and (chat or name == PHRASES or not _classifier(name)[0].takes_labels):
        raise UsageError(
            f"harmful_labels={list(harmful_labels)}: must be left out with judge={name!r}"
        )
    if model is not None and url is None:
        raise UsageError(f"judge_model={model!r}: must be left out without judge_url")
    if chat is None:
        if url is not None:
            listed = ", ".join(CHAT_JUDGES)
            raise UsageError(f"judge={name!r}: must be one of {listed} where judge_url is given")
        return None
    form, named = chat
    if model is not None and named is not None:
        raise UsageError(f"judge_model={model!r}: must be left out with judge={name!r}")
    chosen = next((m for m in (model, named, CHAT_JUDGES[form].model) if m is not None), None)
    if chosen:
        return form, chosen
    if url is not None:
        raise UsageError(f"judge_model={model!r}: must name a model for judge={name!r}")
    raise UsageError(f"judge={name!r}: must name a model, as {form}:FOLDER, or judge_url be given")


def options_by_judge(
    names: Sequence[str],
    harmful_labels: Sequence[str] | None,
    url: str | None,
    model: str | None,
) -> dict[str, dict[str, Any]]:
    """The options of `check_judge` for each of several judges, by name: those of its kind.

    Labels go to classifiers, a server to chat judges, and the name of a model there to those of
    them that name none of their own. An option that is for none of the judges goes to one of them
    all the same, so that `check_judge` refuses it.
    """
    given = {"harmful_labels": harmful_labels, "url": url, "model": model}
    if len(names) == 1 or not any(given.values()):
        return {name: dict(given) for name in names}
    chats = {name: chat for name in names if (chat := _chat_judge(name))}
    others = [name for name in names if name != PHRASES and name not in chats]
    takers = {
        "harmful_labels": [name for name in others if _classifier(name)[0].takes_labels],
        "url": list(chats),
        "model": [name for name, (_, named) in chats.items() if named is None] or list(chats),
    }
    return {
        name: {
            option: value if name in (takers[option] or names[:1]) else None
            for option, value in given.items()
        }
        for name in names
    }


def check_judge(
    name: str,
    *,
    harmful_labels: Sequence[str] | None = None,
    url: str | None = None,
    model: str | None = None,
) -> None:
    """Refuse what `get_judge` would refuse, as far as that shows without loading weights.

    An endpoint is asked once which models it serves.

    Raises:
        DataError: no such model, or one that is none for this judge.
        UsageError: no name, labels that do not tell, or an option of another kind of judge.
        EndpointFailed: the endpoint cannot be reached, refuses the key or lacks the model.
    """
    chat = _check_options(name, harmful_labels, url, model)
    if chat is None:
        if name != PHRASES:
            kind, path = _classifier(name)
            kind.check(path, harmful_labels)
    elif url is not None:
        from antidote_fast.evaluation.endpoint import Endpoint

        Endpoint(url, chat[1]).check()
    else:
        from antidote_fast.evaluation.chat_judges import CHAT_JUDGES
        from antidote_fast.evaluation.chat_models import LocalModel

        LocalModel.check(chat[1], CHAT_JUDGES[chat[0]])


def get_judge(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    harmful_labels: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    url: str | None = None,
    model: str | None = None,
    cache: str | Path | None = None,
    batch_size: int = 16,
) -> Judge:
    """The judge of a name.

    Args:
        name: refusal; beaver-dam, or beaver-dam:FOLDER for a local copy; a chat judge of
            `chat_judges.CHAT_JUDGES`, or NAME:FOLDER_OR_HUB_NAME for a local copy or another size
            of its model; else the folder or hub name of a text-classification model.
        device, dtype: as :func:`antidote_fast.models.loading.load_model` takes them.
        harmful_labels: the classifier's labels that mean harm, where their names do not tell.
        labels: of the user's task: the judge refusal calls an answer that is one of them off-task.
        url: the base of an OpenAI-compatible server that a chat judge's model is behind.
        model: the name it has there, where it is not that of the hub.
        cache: a JSONL file that keeps what an endpoint said, by hashes and without text, so that an
            interrupted run goes on. A model that runs here is asked anew.
        batch_size: texts at once, of a model that runs here.

    Returns:
        A judge with a ``name``, and ``harm_only`` True where it only tells harm: of an ordinary
        prompt's answer it says nothing.

    Raises:
        DataError, UsageError: as `check_judge`, and a model that cannot be loaded.
    """
    chat = _check_options(name, harmful_labels, url, model)
    if chat is None and name == PHRASES:
        return PhraseJudge(labels=labels)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size}
    if chat is None:
        kind, path = _classifier(name)
        kind.check(path, harmful_labels)
        how |= {"harmful_labels": harmful_labels} if harmful_labels else {}
        return kind.from_pretrained(path, **how)
    from antidote_fast.evaluation.chat_judges import CHAT_JUDGES
    from antidote_fast.evaluation.chat_models import ChatJudge, LocalModel
    from antidote_fast.evaluation.endpoint import Endpoint

    form, path = chat
    if url is not None:
        return ChatJudge(form, Endpoint(url, path), cache=cache)
    return ChatJudge(form, LocalModel.from_pretrained(path, CHAT_JUDGES[form], **how))
