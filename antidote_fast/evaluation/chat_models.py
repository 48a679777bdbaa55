"""Chat models that judge, here or behind an endpoint, and what is kept of their replies."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from antidote_fast.errors import AntidoteError, DataError
from antidote_fast.evaluation.chat_judges import CHAT_JUDGES, ChatForm, Reading
from antidote_fast.evaluation.endpoint import Request
from antidote_fast.evaluation.verdicts import BROKEN, OFF_TASK, without_reasoning
from antidote_fast.files.commit import digest_of, os_errors
from antidote_fast.system.progress import Progress


class Asked(Protocol):
    """What answers requests: an `Endpoint`, or a `LocalModel`."""

    model: str

    def replies(
        self, requests: Sequence[Request], max_tokens: int, *, progress: Progress = False
    ) -> Generator[tuple[int, str], None, None]:
        """(the number of a request, its reply) of each, in any order."""


class ChatJudge:
    """A judge that asks a chat model, here or behind an endpoint."""

    def __init__(self, form: str, asked: Asked, *, cache: str | Path | None = None) -> None:
        """Args: form: of `CHAT_JUDGES`; asked: the model; cache: as `Readings` keeps it."""
        self.form, self.asked = CHAT_JUDGES[form], asked
        self.name, self.harm_only = f"{form}:{asked.model}", self.form.harm_only
        self.readings = Readings(cache, (form, asked.model))

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], *, progress: Progress = False
    ) -> list[str]:
        """One verdict an answer; one without text is broken, and no model is asked.

        Raises:
            AntidoteError: the model said none of its words of an answer, whose number is told.
            EndpointFailed: it did not answer.
        """
        shown = [i for i, answer in enumerate(answers) if answer.strip()]
        requests = {i: self.form.ask(prompts[i], answers[i]) for i in shown}
        readings = self._ask(requests, progress)
        if self.form.asks_prompt:
            untold = {
                i: requests[i][:-1]
                for i, said in readings.items()
                if said.verdict(answers[i]) == OFF_TASK
            }
            for i, of_prompt in self._ask(untold, progress).items():
                said = readings[i]
                readings[i] = Reading(said.harmful, said.refusal, request=of_prompt.harmful)
        return [
            readings[i].verdict(answer) if i in readings else BROKEN
            for i, answer in enumerate(answers)
        ]

    def _ask(self, requests: Mapping[int, Any], progress: Progress) -> dict[int, Reading]:
        """What is said of each request; those known already, or twice there, are not asked."""
        keys = {i: self.readings.key(request) for i, request in requests.items()}
        first = {key: i for i, key in reversed(keys.items()) if key not in self.readings.known}
        numbers = sorted(first.values())
        asked = [requests[i] for i in numbers]
        replies = self.asked.replies(asked, self.form.max_new_tokens, progress=progress)
        with self.readings, contextlib.closing(replies):  # closed, it gives the others up
            for n, reply in replies:
                reading = self.form.read(without_reasoning(reply))
                if reading is None:
                    raise AntidoteError(
                        f"judge={self.name}: its reply about answer {numbers[n] + 1} holds none of "
                        f"its words ({self.form.words}); must be a model of this form"
                    )
                self.readings.add(keys[numbers[n]], reading)
        return {i: self.readings.known[key] for i, key in keys.items()}


class LocalModel:
    """A chat model of transformers with its tokenizer, asked greedily."""

    def __init__(
        self, model: Any, tokenizer: Any, *, parts: bool = False, batch_size: int = 16, name: str
    ) -> None:
        """Args: parts: as `ChatForm` says; batch_size: requests at once; name: for reports."""
        self.live, self.tokenizer, self.parts = model, tokenizer, parts
        self.batch_size, self.model = batch_size, name

    @classmethod
    def check(cls, path: str, form: ChatForm) -> None:
        """Refuse what cannot be asked in this form; no weights are loaded.

        Raises:
            DataError: no such model, an adapter alone, or no chat template where one is needed.
        """
        from antidote_fast.evaluation.classifiers import read_config
        from antidote_fast.models.loading import load_tokenizer

        read_config(path)
        tokenizer = load_tokenizer(path)
        if form.templated and not getattr(tokenizer, "chat_template", None):
            raise DataError(f"judge={path!r}: its tokenizer has no chat template to be asked by")

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        form: ChatForm,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
    ) -> LocalModel:
        """Load a model from a local folder or the hub.

        Raises:
            DataError: as `check`, or it cannot be loaded.
        """
        from antidote_fast.models.loading import load_model, load_tokenizer

        cls.check(path, form)
        model = load_model(path, dtype=dtype, device=device)
        tokenizer = load_tokenizer(path)
        return cls(model, tokenizer, parts=form.parts, batch_size=batch_size, name=path)

    def replies(
        self, requests: Sequence[Request], max_tokens: int, *, progress: Progress = False
    ) -> Generator[tuple[int, str], None, None]:
        """As `Asked` says, in order."""
        from antidote_fast.evaluation.generate import generate

        texts = [self._text_of(request) for request in requests]
        options: dict[str, Any] = {"max_new_tokens": max_tokens, "batch_size": self.batch_size}
        yield from enumerate(
            generate(self.live, self.tokenizer, texts, **options, progress=progress)
        )

    def _text_of(self, request: Request) -> str:
        from antidote_fast.models.loading import foreign

        if isinstance(request, str):
            return request
        messages: list[dict[str, Any]] = [*request]
        if self.parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        with foreign(self.model, "its chat template does not take what the judge is asked"):
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )


class Readings:
    """What a judge said, by a hash of what it was asked; in a file it outlives the process.

    A line of the file is a JSON object with the hash and three values, and no text of anybody's.
    """

    def __init__(self, path: str | Path | None, about: Sequence[str]) -> None:
        """Read the file, where there is one.

        Args:
            path: a JSONL file, made at the first reply; None keeps all in memory.
            about: what a hash is of besides the request.

        Raises:
            DataError: the file cannot be read.
        """
        self.path, self.about = path, list(about)
        self.known: dict[str, Reading] = {}
        self._file: Any = None
        if path is not None and os.path.exists(path):
            self._read(Path(path))

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        for line in lines:
            try:
                entry = json.loads(line)
                key, (harmful, refusal, request) = entry["key"], entry["says"]
            except (ValueError, LookupError, TypeError, RecursionError):
                continue  # what a killed process left
            told = {type(harmful), type(refusal), type(request)}
            if isinstance(key, str) and type(harmful) is bool and told <= {bool, type(None)}:
                self.known[key] = Reading(harmful, refusal, request)

    def key(self, request: Request) -> str:
        """The hash of a request to this judge's model."""
        return digest_of([*self.about, request])

    def add(self, key: str, reading: Reading) -> None:
        """Keep a reading, and write it down at once."""
        self.known[key] = reading
        if self.path is None:
            return
        says = [reading.harmful, reading.refusal, reading.request]
        # In one call, on a line of its own whatever a killed process left in front.
        line = b"\n" + json.dumps({"key": key, "says": says}).encode() + b"\n"
        with os_errors(self.path, lambda: "what was asked before is kept", any_number=True):
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
                self._file = os.open(self.path, flags, 0o600)
            os.write(self._file, line)

    def __enter__(self) -> Readings:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
