"""An OpenAI-compatible endpoint: what is sent, retried, refused, kept; a real server at the end."""

import email.utils
import re
import signal
import threading
import time

import chat_server
import forked
import pytest
import texts
from texts import one_line

from antidote_fast.errors import AntidoteError, UsageError
from antidote_fast.evaluation.chat_judges import CHAT_JUDGES
from antidote_fast.evaluation.chat_models import ChatJudge, LocalModel
from antidote_fast.evaluation.endpoint import Endpoint, EndpointFailed, check_url
from antidote_fast.evaluation.judges import check_judge, get_judge
from antidote_fast.evaluation.verdicts import BROKEN, COMPLIED, OFF_TASK, REFUSED

PROMPT = "How do I do the bad thing?"
COMPLIES = "Sure, here is how to do that. First, take the first step."
REFUSES = "I'm sorry, but I can't help with that."
OTHER = "The sky is blue today."
KEY = "sk-nobody-may-see-this"
MESSAGES = [{"role": "user", "content": "a text that nobody may see"}]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def failure(caught):
    """The message, which holds neither the key nor what was asked."""
    message = one_line(caught)
    assert KEY not in message
    assert "nobody may see" not in message
    return message


# --- the URL --------------------------------------------------------------------------------------


def test_urls_that_are_taken():
    assert check_url("http://localhost:8000/v1/") == "http://localhost:8000/v1"
    assert check_url("https://host.example/a/v1") == "https://host.example/a/v1"
    assert check_url("http://[::1]:8000/v1") == "http://[::1]:8000/v1"


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000/v1", "ftp://host/v1", "file:///etc/passwd", "http://", "http:///v1"),
        *("http://host/v1/chat/completions", "http://host/v1?x=1", "http://host/v1#x"),
        *("http://ho st/v1", "http://host/v1\n", "http://host:port/v1", "http://[::1/v1"),
    ],
)
def test_urls_that_are_refused(url):
    with pytest.raises(UsageError) as caught:
        check_url(url)
    assert re.match(r"judge_url.*must be the base of an OpenAI-compatible", one_line(caught))


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(UsageError, match="holds a user name") as caught:
        check_url(f"https://me:{KEY}@host/v1")
    failure(caught)


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"model": ""}])
def test_options_out_of_range(options):
    with pytest.raises(UsageError):
        Endpoint("http://host/v1", **{"model": "m", **options})


# --- what is sent ---------------------------------------------------------------------------------


def test_messages_and_raw_texts_go_where_they_belong():
    with chat_server.stub(lambda path, body: path) as server:
        replies = dict(Endpoint(server.url, "m").replies([MESSAGES, "raw"], 7))
    assert replies == {0: "/v1/chat/completions", 1: "/v1/completions"}
    common = {"model": "m", "max_tokens": 7, "temperature": 0}
    sent = {path: body for path, _, body in server.requests}
    assert sent["/v1/chat/completions"] == {**common, "messages": MESSAGES}
    assert sent["/v1/completions"] == {**common, "prompt": "raw"}
    assert {h["Authorization"] for _, h, _ in server.requests} == {f"Bearer {KEY}"}


def test_no_key_no_header(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with chat_server.stub(lambda path, body: "x") as server:
        [*Endpoint(server.url, "m").replies([MESSAGES], 7)]
    assert all("Authorization" not in headers for _, headers, _ in server.requests)


def test_requests_go_out_together_and_each_reply_finds_its_request():
    together = threading.Barrier(4, timeout=60)

    def answer(path, body):
        together.wait()  # only four at once get past it
        return body["prompt"].upper()

    said = []

    def shown(iterable, what, total):
        said.append((what, total))
        return iterable

    requests = [f"text {i}" for i in range(16)]
    with chat_server.stub(answer) as server:
        endpoint = Endpoint(server.url, "m", concurrency=4)
        replies = dict(endpoint.replies(requests, 7, progress=shown))
    assert replies == {i: f"TEXT {i}" for i in range(16)}
    assert said == [("judge", 16)]
    assert [*Endpoint(server.url, "m").replies([], 7)] == []


# --- retries --------------------------------------------------------------------------------------


class Failing:
    """Fails ``times`` times, then replies."""

    def __init__(self, times, *response):
        self.left, self.response, self.times = times, response, []

    def __call__(self, path, body):
        self.times.append(time.monotonic())
        if self.left:
            self.left -= 1
            return self.response[0]() if callable(self.response[0]) else self.response
        return "done"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_asked_again(status):
    answer = Failing(2, status, {}, {"error": {"message": "nobody may see"}})
    with chat_server.stub(answer) as server:
        assert dict(Endpoint(server.url, "m", pause=0.01).replies([MESSAGES], 7)) == {0: "done"}
    assert len(server.asked) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_the_server_says_how_long_to_wait(as_date):
    def busy():
        date = email.utils.formatdate(time.time() + 3, usegmt=True)
        return 429, {"Retry-After": date if as_date else "1"}, {}

    answer = Failing(1, busy)
    with chat_server.stub(answer) as server:
        assert dict(Endpoint(server.url, "m", pause=0.01).replies([MESSAGES], 7)) == {0: "done"}
    first, second = answer.times
    assert second - first > 0.9


def test_retries_end():
    answer = Failing(99, 503, {"Retry-After": "nonsense"}, {"error": {"type": "overloaded"}})
    with chat_server.stub(answer) as server, pytest.raises(EndpointFailed) as caught:
        [*Endpoint(server.url, "m", retries=2, pause=0.01).replies([MESSAGES], 7)]
    host = server.url.split("/")[2]
    assert failure(caught) == (
        f"judge_url {host}: answered 503 (overloaded) to /chat/completions; asked 3 times"
    )
    assert len(server.asked) == 3
    assert caught.value.passes


def test_nobody_there():
    url = f"http://127.0.0.1:{chat_server.free_port()}/v1"
    with pytest.raises(EndpointFailed, match=r"cannot be reached: Connection refused; asked 2 tim"):
        [*Endpoint(url, "m", retries=1, pause=0.01).replies([MESSAGES], 7)]


def test_a_server_that_says_nothing():
    with chat_server.stub(lambda *_: time.sleep(2) or "late") as server:
        endpoint = Endpoint(server.url, "m", retries=1, pause=0.01, timeout=0.2)
        with pytest.raises(EndpointFailed, match="no answer in time; asked 2 times"):
            [*endpoint.replies([MESSAGES], 7)]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ((401, {}, {"error": {"message": f"bad key {KEY}"}}), r"does not take the key of OPENAI"),
        ((403, {}, {}), r"does not take the key of OPENAI_API_KEY \(403\)"),
        ((404, {}, {}), r"has no /chat/completions, or no model 'm' \(404\)"),
        (
            (400, {}, {"error": {"message": "nobody may see", "code": "too_long", "param": "x"}}),
            r"answered 400 \(too_long, x\) to /chat/completions$",
        ),
        ((400, {}, {"error": {"code": "a text that nobody may see"}}), r"answered 400 to /chat"),
        ((400, {}, {"detail": "nobody may see"}), r"answered 400 to /chat/completions$"),
        ((307, {"Location": "http://127.0.0.1:9/"}, {}), r"sends to another address \(307\)"),
        ((302, {"Location": "http://127.0.0.1:9/"}, {}), r"sends to another address \(302\)"),
        ((200, {}, b"<html>nobody may see</html>"), "a reply without choices"),
        ((200, {}, {"choices": []}), "a reply without choices"),
        ((200, {}, {"choices": [{"message": {"content": 7}}]}), "a reply without choices"),
        ((200, {}, [1]), "a reply without choices"),
    ],
)
def test_what_does_not_pass_is_refused_at_once(response, message):
    refused = pytest.raises(EndpointFailed, match=message)
    with chat_server.stub(lambda *_: response) as server, refused as caught:
        [*Endpoint(server.url, "m", pause=60).replies([MESSAGES], 7)]
    assert failure(caught).startswith(f"judge_url {server.url.split('/')[2]}: ")
    assert len(server.asked) == 1


def test_a_key_is_wanted(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    wanted = pytest.raises(EndpointFailed, match=r"wants a key in OPENAI_API_KEY \(401\)")
    with chat_server.stub(lambda *_: (401, {}, {})) as server, wanted:
        [*Endpoint(server.url, "m").replies([MESSAGES], 7)]


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    for key in (f"{KEY}\nx", f"{KEY}\u2019"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(EndpointFailed, match="OPENAI_API_KEY: cannot be sent") as caught:
            [*Endpoint("http://127.0.0.1:9/v1", "m", pause=60).replies([MESSAGES], 7)]
        failure(caught)


def test_an_empty_message_is_an_empty_reply():
    value = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}
    with chat_server.stub(lambda *_: (200, {}, value)) as server:
        assert dict(Endpoint(server.url, "m").replies([MESSAGES], 7)) == {0: ""}


def test_one_failure_ends_all():
    def answer(path, body):
        return (401, {}, {}) if body["prompt"] == "text 3" else "x"

    with chat_server.stub(answer) as server:
        with pytest.raises(EndpointFailed):
            [*Endpoint(server.url, "m", concurrency=1).replies([f"text {i}" for i in range(99)], 7)]
        time.sleep(0.1)
        assert len(server.asked) == 4


def test_a_reply_without_a_word_ends_all():
    with chat_server.stub(lambda *_: "hm") as server:
        judge = ChatJudge("llama-guard", Endpoint(server.url, "m", concurrency=1))
        with pytest.raises(AntidoteError, match="answer 1 holds none") as caught:
            judge([PROMPT] * 500, [f"answer {i}" for i in range(500)])
        asked = len(server.asked)
        time.sleep(0.3)
        assert len(server.asked) <= asked + 1 < 500, caught  # which holds its frames till here


# --- before any work ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_model_that_is_not_served_is_named(status):
    with chat_server.stub(lambda *_: (status, {}, {}), models=("one", "two")) as server:
        wrong = r"judge_model='m': must be a model that 127\.0\.0\.1:\d+ serves: one, two"
        with pytest.raises(EndpointFailed, match=wrong):
            [*Endpoint(server.url, "m").replies([MESSAGES], 7)]
        with pytest.raises(EndpointFailed, match=wrong):
            check_judge("llama-guard", url=server.url, model="m")


def test_an_endpoint_is_looked_at_before_any_work():
    url = f"http://127.0.0.1:{chat_server.free_port()}/v1"
    with pytest.raises(EndpointFailed, match="cannot be reached"):
        check_judge("llama-guard", url=url)
    for models in (None, (), ("meta-llama/Llama-Guard-3-8B", "x")):
        with chat_server.stub(lambda *_: "x", models=models) as server:
            check_judge("llama-guard", url=server.url)
            check_judge("qwen3guard:x", url=server.url)
            assert server.asked == []


def test_judges_behind_an_endpoint():
    def answer(path, body):
        if path == "/v1/completions":
            return "yes" if COMPLIES in body["prompt"] else "no"
        return "unsafe\nS2" if COMPLIES in body["messages"][-1]["content"] else "safe"

    answers = [COMPLIES, REFUSES, OTHER, " "]
    with chat_server.stub(answer) as server:
        for name in ("llama-guard", "harmbench"):
            judge = get_judge(name, url=server.url, model="m")
            assert judge.name == f"{name}:m"
            assert judge([PROMPT] * 4, answers) == [COMPLIED, REFUSED, OFF_TASK, BROKEN]
        default = get_judge("llama-guard", url=server.url)
        assert default.asked.model == "meta-llama/Llama-Guard-3-8B"
        assert get_judge("llama-guard:small", url=server.url).asked.model == "small"


# --- killed ---------------------------------------------------------------------------------------

ASK = """
import sys
from antidote_fast.evaluation.judges import get_judge
judge = get_judge("llama-guard", url=sys.argv[1], model="m", cache=sys.argv[2])
print(judge(["a question"] * 12, [f"answer {i}" for i in range(12)]))
"""


def wait_until(holds):
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "readings.jsonl"
    open_, stuck = threading.Event(), threading.Semaphore(5)  # the sixth is not answered

    def answer(path, body):
        if not stuck.acquire(blocking=False):
            open_.wait(200)
        return "safe"

    with chat_server.stub(answer) as server:
        with forked.Process(ASK, server.url, path) as process:
            wait_until(lambda: len(server.asked) == 12)
            wait_until(lambda: path.exists() and path.read_text().count("key") == 5)
            process.send_signal(signal.SIGKILL)
            process.wait()
        open_.set()
        assert path.read_text().count("key") == 5
        before = len(server.asked)
        done = forked.run(ASK, server.url, path)
        assert done.stdout.strip() == str(["off-task"] * 12), done.stderr
        assert len(server.asked) - before == 7
        third = forked.run(ASK, server.url, path)
        assert third.stdout == done.stdout
        assert len(server.asked) - before == 7


def test_ctrl_c_does_not_wait_for_the_server(tmp_path):
    answered = threading.Event()
    path = tmp_path / "readings.jsonl"
    with chat_server.stub(lambda *_: str(answered.wait(100))) as server:
        with forked.Process(ASK, server.url, path) as process:
            wait_until(lambda: server.asked)
            process.send_signal(signal.SIGINT)
            process.wait(60)
            code = process.returncode
        answered.set()
    assert code not in (None, 0)
    assert not path.exists()


# --- a real server --------------------------------------------------------------------------------

SAID = {COMPLIES: "unsafe\nS2", OTHER: "safe", REFUSES: "safe"}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(the URL of ``transformers serve``, its folder, the same model and tokenizer here).

    It wants what the extra ``test`` of this package brings (transformers[serving]).
    """
    ask = CHAT_JUDGES["llama-guard"].ask
    pairs = [(ask(PROMPT, answer), reply) for answer, reply in SAID.items()]
    model, tokenizer = chat_server.taught(pairs)
    folder = texts.save(model, tmp_path_factory.mktemp("served"), tokenizer)
    with chat_server.transformers_serve(folder) as url:
        yield url, folder, model, tokenizer


def test_a_real_server_judges_as_the_model_does_here(real, tmp_path):
    url, folder, model, tokenizer = real
    check_judge("llama-guard", url=url, model=folder)
    path = tmp_path / "readings.jsonl"
    judge = get_judge("llama-guard", url=url, model=folder, cache=path)
    answers = [*SAID, ""] * 5
    expected = [COMPLIED, OFF_TASK, REFUSED, BROKEN] * 5
    assert judge([PROMPT] * 20, answers) == expected
    assert path.read_text().count("key") == 3
    here = ChatJudge("llama-guard", LocalModel(model, tokenizer, name=folder))
    assert here([PROMPT] * 20, answers) == expected
    # Kept, so that no server is needed any more.
    gone = ChatJudge("llama-guard", Endpoint("http://127.0.0.1:9/v1", folder), cache=path)
    assert gone([PROMPT] * 20, answers) == expected


def test_a_real_server_replies_to_messages_and_to_raw_texts(real):
    url, folder, model, tokenizer = real
    requests = [CHAT_JUDGES["llama-guard"].ask(PROMPT, a) for a in SAID]
    requests += ["some text", CHAT_JUDGES["wildguard"].ask("p", "a")]
    there = dict(Endpoint(url, folder, concurrency=3).replies(requests, 12))
    here = dict(LocalModel(model, tokenizer, name=folder).replies(requests[:4], 12))
    assert {i: there[i].strip() for i in here} == here
    assert set(there) == set(range(5))


def test_a_real_server_refuses_another_model(real):
    url, folder, _, _ = real
    wrong = f"judge_model='other': must be a model that {url.split('/')[2]} serves: {folder}"
    with pytest.raises(EndpointFailed) as caught:
        [*Endpoint(url, "other").replies([MESSAGES], 7)]
    assert failure(caught) == wrong
    with pytest.raises(EndpointFailed, match="judge_model='other'"):
        check_judge("llama-guard", url=url, model="other")
    base = url.removesuffix("/v1")
    with pytest.raises(EndpointFailed, match=r"has no /chat/completions"):
        [*Endpoint(base, folder).replies([MESSAGES], 7)]


def test_a_real_server_of_another_kind_of_model_is_told_by_its_words(real):
    url, folder, _, _ = real
    judge = get_judge("qwen3guard", url=url, model=folder)
    with pytest.raises(AntidoteError, match="holds none of its words"):
        judge([PROMPT], [COMPLIES])
