"""A client of an OpenAI-compatible server: requests in, replies out, several at once.

Such a server is vLLM, SGLang, llama.cpp, Ollama, ``transformers serve`` or a provider's. The key,
where one is needed, is read from the environment variable ``OPENAI_API_KEY``; it goes into the
header of a request and nowhere else. No message of an error holds what was asked or replied.
"""

import contextlib
import email.utils
import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from typing import Any
from urllib.parse import urlsplit

from antidote_fast.errors import AntidoteError, UsageError, printable
from antidote_fast.system.progress import Progress, track

KEY = "OPENAI_API_KEY"
Request = str | list[dict[str, str]]
"""What a chat model is asked: messages with role and content, or a raw text."""

_PASSING = {408, 425, 429, 500, 502, 503, 504, 529}  # the same request may be answered later
_MAX_REPLY = 16 << 20  # bytes
_LONGEST_WAIT = 300.0  # seconds, whatever Retry-After says
_WORD = re.compile(r"[\w./:-]{1,80}")


class EndpointFailed(AntidoteError):
    """A server did not answer as it must; asked another time it may. Exit code 1."""

    passes = True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key goes to the server that was named and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


def check_url(url: str, argument: str = "judge_url") -> str:
    """The base URL of an endpoint, without a slash at its end.

    Raises:
        UsageError: not http or https, no host, a user name in it, or more than a base.
    """
    accepted = "must be the base of an OpenAI-compatible server, as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"{argument}: is no URL; {accepted}") from None
    if parts.username is not None or parts.password is not None:  # not to be shown
        raise UsageError(f"{argument}: holds a user name; {accepted}, and the key in {KEY}")
    path = parts.path.rstrip("/")
    whole = path.endswith("/completions") or parts.query or parts.fragment
    unfit = whole or not url.isprintable() or " " in url
    if parts.scheme not in ("http", "https") or not host or unfit:
        raise UsageError(f"{argument}={printable(url)!r:.300}: {accepted}")
    return f"{parts.scheme}://{parts.netloc}{path}"


class Endpoint:
    """One model of an OpenAI-compatible server, asked without sampling (temperature 0)."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        pause: float = 0.5,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: the base, as ``http://localhost:8000/v1``.
            model: the name that the server knows the model by.
            concurrency: requests under way at once.
            timeout: seconds without a byte after which a request counts as failed.
            retries: how often one is sent again after a failure that may pass (429, 5xx, no
                connection).
            pause: seconds before the first of these; twice as long before each next one, unless
                the server says how long (Retry-After).

        Raises:
            UsageError: as `check_url`; an option out of range.
        """
        if concurrency < 1:
            raise UsageError(f"concurrency={concurrency!r}: must be at least 1")
        if not model:
            raise UsageError("judge_model='': must be the name of a model that judge_url serves")
        self.url, self.model = check_url(url), model
        self.host = urlsplit(self.url).netloc
        self.concurrency, self.timeout = concurrency, timeout
        self.retries, self.pause = retries, pause
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check(self) -> None:
        """Ask the server for its models, once: that it is there, takes the key and has the model.

        Raises:
            EndpointFailed: it cannot be reached, refuses the key, or does not have the model. A
                server that does not list its models is not doubted.
        """
        status, body = self._send("/models", None, min(self.timeout, 10.0))
        if status in (401, 403) or status is None:
            raise self._failure("/models", status, body)
        served = _names(body) if status == 200 else None
        if served and self.model not in served:
            raise self._lacks_model(served)

    def replies(
        self, requests: Sequence[Request], max_tokens: int, *, progress: Progress = False
    ) -> Generator[tuple[int, str], None, None]:
        """Ask for all, and give each reply when it comes.

        Args:
            requests: messages go to ``/chat/completions``, where the server applies the model's
                chat template; a raw text goes to ``/completions``.
            max_tokens: most tokens of a reply.

        Yields:
            (the number of a request, its reply), in no order.

        Raises:
            EndpointFailed: one was not answered; the others are given up.
        """
        todo: queue.SimpleQueue = queue.SimpleQueue()
        done: queue.SimpleQueue = queue.SimpleQueue()
        stop = threading.Event()
        for numbered in enumerate(requests):
            todo.put(numbered)

        def work() -> None:
            while not stop.is_set():
                try:
                    number, request = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((number, self._reply(request, max_tokens, stop)))
                except BaseException as error:
                    stop.set()
                    done.put((number, error))

        # Daemons: a request under way does not hold up the end of an interrupted job.
        for _ in range(min(self.concurrency, len(requests))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in track(range(len(requests)), "judge", progress):
                number, reply = done.get()
                if isinstance(reply, BaseException):
                    raise reply
                yield number, reply
        finally:
            stop.set()

    def _reply(self, request: Request, max_tokens: int, stop: threading.Event) -> str:
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": 0}
        path = "/completions" if isinstance(request, str) else "/chat/completions"
        body["prompt" if isinstance(request, str) else "messages"] = request
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            status, answer = self._send(path, data, self.timeout)
            if status == 200:
                return self._text_of(answer)
            if not (status is None or status in _PASSING) or attempt == self.retries:
                break
            wait = self.pause * 2**attempt
            if stop.wait(min(max(wait, answer.get("retry_after", 0.0)), _LONGEST_WAIT)):
                break
        if status in (400, 404, 422):
            listed, models = self._send("/models", None, min(self.timeout, 10.0))
            served = _names(models) if listed == 200 else None
            if served and self.model not in served:
                raise self._lacks_model(served)
        raise self._failure(path, status, answer, attempt + 1)

    def _send(self, path: str, data: bytes | None, timeout: float) -> tuple[int | None, dict]:
        """(status, the JSON object that came); (None, {"why": ...}) where nothing came."""
        request = urllib.request.Request(self.url + path, data)
        request.add_header("Content-Type", "application/json")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if key:
            # Not handed on to another host; `_NoRedirect` goes to none anyway.
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return response.status, _parsed(response)
        except urllib.error.HTTPError as error:
            told: dict = {}
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                told = _parsed(error)
            return error.code, told | {"retry_after": _seconds(error.headers)}
        except (OSError, http.client.HTTPException) as error:
            return None, {"why": _reason(error)}
        except ValueError:  # whose text is the header, and so the key
            raise EndpointFailed(f"{KEY}: cannot be sent as a header; must be ASCII") from None

    def _text_of(self, answer: dict) -> str:
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            if text is None:  # what a filter kept back
                return ""
            if isinstance(text, str):
                return text
        raise EndpointFailed(
            f"judge_url {self.host}: a reply without choices; it is no OpenAI-compatible server"
        )

    def _lacks_model(self, served: Sequence[str]) -> EndpointFailed:
        listed = printable(", ".join(served[:8])) + (", ..." if len(served) > 8 else "")
        return EndpointFailed(
            f"judge_model={self.model!r}: must be a model that {self.host} serves: {listed:.400}"
        )

    def _failure(
        self, path: str, status: int | None, answer: dict, attempts: int = 1
    ) -> EndpointFailed:
        where, tries = f"judge_url {self.host}", f"; asked {attempts} times" * (attempts > 1)
        if status is None:
            return EndpointFailed(f"{where}: cannot be reached: {answer['why']}{tries}")
        if status in (401, 403):
            given = "does not take the key of" if os.environ.get(KEY) else "wants a key in"
            return EndpointFailed(f"{where}: {given} {KEY} ({status})")
        if status == 404:
            return EndpointFailed(f"{where}: has no {path}, or no model {self.model!r} (404)")
        if 300 <= status < 400:
            return EndpointFailed(f"{where}: sends to another address ({status}), not followed")
        return EndpointFailed(f"{where}: answered {status}{_told(answer)} to {path}{tries}")


def _parsed(response: Any) -> dict:
    """The JSON object of a response; {} where it is none."""
    text = response.read(_MAX_REPLY)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _names(answer: dict) -> list[str]:
    """The models that a server lists."""
    listed = answer.get("data")
    listed = listed if isinstance(listed, list) else []
    names = [entry.get("id") for entry in listed if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str)]


def _told(answer: dict) -> str:
    """What an error's body says in single words; a sentence in it may repeat what was asked."""
    error = answer.get("error")
    error = error if isinstance(error, dict) else answer
    values = [str(error.get(name) or "") for name in ("code", "type", "param")]
    words = [value for value in dict.fromkeys(values) if _WORD.fullmatch(value)]
    return f" ({', '.join(words)})" if words else ""


def _seconds(headers: Any) -> float:
    """The wait that Retry-After asks for: seconds or a date; 0 without."""
    told = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d*)?", told):
        return float(told)
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    return 0.0


def _reason(error: Exception) -> str:
    """Why nothing came."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    return getattr(cause, "strerror", None) or printable(str(cause) or type(cause).__name__)[:200]
