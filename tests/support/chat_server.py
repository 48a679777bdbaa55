"""OpenAI-compatible servers for tests: one of a few lines that counts, and transformers' own."""

import contextlib
import json
import socket
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import forked
import texts
import torch


class Stub:
    """A server in this process.

    Attributes:
        requests: (path, headers, body) of each, as they came.
        answer: from (path, body) to a reply's text, or to (status, headers, JSON value).
        models: what it lists; None: it has no list.
    """

    def __init__(self, answer, models=("m",)):
        self.answer, self.models, self.requests = answer, models, []

    @property
    def asked(self):
        """The bodies that were posted."""
        return [body for _, _, body in self.requests if body is not None]

    def respond(self, path, headers, body):
        self.requests.append((path, headers, body))
        if body is None:
            if self.models is None:
                return 404, {}, {}
            return 200, {}, {"object": "list", "data": [{"id": name} for name in self.models]}
        told = self.answer(path, body)
        if not isinstance(told, str):
            return told
        if path.endswith("/chat/completions"):
            return 200, {}, {"choices": [{"message": {"role": "assistant", "content": told}}]}
        return 200, {}, {"choices": [{"text": told}]}


@contextlib.contextmanager
def stub(answer, **options):
    """A running `Stub`, with its ``url``."""
    made = Stub(answer, **options)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            self._respond(json.loads(self.rfile.read(length)))

        def do_GET(self):
            self._respond(None)

        def _respond(self, body):
            status, headers, value = made.respond(self.path, dict(self.headers), body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            with contextlib.suppress(OSError):  # the client may be gone
                self.send_response(status)
                for name, text in headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def transformers_serve(folder):
    """``transformers serve`` with a model of a folder; yields its base URL."""
    port = free_port()
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    code = "from transformers.cli.transformers import main; main()"
    process = forked.Process(code, *words, environment={"HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


def taught(pairs, *, chat=True, steps=80):
    """A tiny model that says each reply to its messages, and its tokenizer.

    ``pairs`` are (messages, reply).
    """
    tokenizer = texts.byte_tokenizer(chat=chat)
    model = texts.llama(positions=1024, hidden=64)
    rows = []
    for messages, reply in pairs:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = tokenizer(reply + "</s>", add_special_tokens=False)["input_ids"]
        rows.append((torch.tensor([prompt + said]), len(prompt)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        for ids, length in rows:
            logits = model(input_ids=ids).logits[0, length - 1 : -1]
            torch.nn.functional.cross_entropy(logits, ids[0, length:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer
