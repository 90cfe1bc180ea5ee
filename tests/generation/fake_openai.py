"""A stand-in for an OpenAI-compatible server of a given target, which misbehaves on demand.

It runs on a thread here, answers from the target's own greedy decoding, and counts what it was asked.
"""

from __future__ import annotations

import collections
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from redraft.decoding.plain import decode_plain
from redraft.models.kv_cache import new_cache
from redraft.models.target import Target

Key = tuple[int, ...]


@dataclass(frozen=True)
class Wrong:
    """One misbehaviour: a status (with headers), a delay, a body cut at the half, another text, or
    more of it announced than there is."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    delay: float = 0.0
    half: bool = False
    announced: int = 0


class Brain:
    """The greedy answers of a target with their log-probabilities, each computed once."""

    def __init__(self, target: Target, longest: int = 32):
        self.target, self.longest = target, longest
        self._known: dict[Key, tuple[list[int], list[float]]] = {}
        self._lock = threading.Lock()

    @torch.inference_mode()
    def answer(self, prompt: Key) -> tuple[list[int], list[float]]:
        with self._lock:
            if prompt not in self._known:
                tokens = decode_plain(self.target, prompt, self.longest)
                row = torch.tensor([[*prompt, *tokens]])
                logits = self.target.read(row, ()).logits_BTV[0, len(prompt) - 1 : -1].float()
                chosen = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])
                self._known[prompt] = (tokens, chosen[:, 0].tolist())
            return self._known[prompt]

    @torch.inference_mode()
    def go_on(self, tokens: list[int], count: int, banned: list[int]) -> list[int]:
        """The next tokens, whatever they are, but none of those that are banned."""
        with self._lock:
            cache, window, found = new_cache(self.target), list(tokens), []
            for _ in range(count):
                reading = self.target.read(torch.tensor([window]), (), cache, keep=1)
                logits = reading.logits_BTV[0, -1]
                logits[banned] = -torch.inf
                window = [int(logits.argmax())]
                found += window
            return found


class FakeOpenAI:
    """The server. `asked` counts completions by prompt, those of the check and lookahead tokens aside.

    Told to ignore stop tokens it goes on past them, or `eos` is "heeded" or "forbidden".
    `wrong` may answer a completion in its place: it gets the request's number, from 1, and its body.
    """

    def __init__(self, brain: Brain, **options: Any):
        self.brain = brain
        self.models = options.pop("models", ["tiny"])
        self.context: int | None = options.pop("context", 256)
        self.ids: bool = options.pop("ids", True)
        self.logprobs: bool = options.pop("logprobs", True)
        self.tokenize: bool = options.pop("tokenize", True)
        self.takes_ids: bool = options.pop("takes_ids", True)
        self.eos: str = options.pop("eos", "ignored")
        self.key: str | None = options.pop("key", None)
        self.renderer: Target = options.pop("renderer", brain.target)
        self.wrong: Callable[[int, dict[str, Any]], Wrong | None] = options.pop(
            "wrong", lambda number, body: None
        )
        self.wrong_probe: Callable[[int], Wrong | None] = options.pop("wrong_probe", lambda n: None)
        assert not options
        self.asked: collections.Counter[Key] = collections.Counter()
        self.bodies: list[dict[str, Any]] = []
        self.ahead: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most = self.checks = self.probes = 0
        self.lock = threading.Lock()
        self.port = 0
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> FakeOpenAI:
        """Serve, on the port it had before if it had one."""
        fake = self

        class Bound(Handler):
            server_of = fake

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Bound)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def die(self) -> None:
        """As after SIGKILL: nobody listens, and every connection is gone in mid-sentence."""
        assert self._server is not None
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeOpenAI]:
        self.start()
        try:
            yield self
        finally:
            if self._server is not None:
                self.die()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FakeOpenAI

    def setup(self) -> None:
        super().setup()
        self.server_of._connections.add(self.connection)

    def do_GET(self) -> None:
        fake = self.server_of
        if self._locked():
            return
        if self.path == "/v1/models":
            fake.checks += 1
            extra = {"max_model_len": fake.context} if fake.context else {}
            self.reply(200, {"data": [{"id": name, **extra} for name in fake.models]})
        elif self.path == "/version":
            self.reply(200, {"version": "fake-1"})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        fake = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with fake.lock:
            fake.headers.append(dict(self.headers))
        if self._locked():
            return
        if self.path == "/tokenize" and fake.tokenize:
            self.reply(200, {"tokens": fake.renderer.render(body["messages"])})
        elif self.path != "/v1/completions":
            self.reply(404, {"detail": "Not Found"})
        elif not fake.takes_ids:
            self.reply(422, {"error": {"message": "prompt: Input should be a valid string"}})
        elif body.get("ignore_eos"):
            with fake.lock:
                fake.ahead.append(body)
            self.reply(200, self.going_on(body))
        elif "logprobs" in body:
            with fake.lock:
                fake.probes += 1
                number = fake.probes
            wrong = fake.wrong_probe(number) or Wrong()
            self.reply(wrong.status, self.completion(body), wrong)
        else:
            self._complete(body)

    def _complete(self, body: dict[str, Any]) -> None:
        fake = self.server_of
        with fake.lock:
            fake.bodies.append(body)
            number = len(fake.bodies)
            fake.asked[tuple(body["prompt"])] += 1
            fake.under_way += 1
            fake.most = max(fake.most, fake.under_way)
        try:
            wrong = fake.wrong(number, body) or Wrong()
            time.sleep(wrong.delay)
            content = self.completion(body) if wrong.status == 200 else {"error": {"message": "no"}}
        finally:
            with fake.lock:
                fake.under_way -= 1
        self.reply(wrong.status, content, wrong)

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        fake = self.server_of
        tokens, logprobs = fake.brain.answer(tuple(body["prompt"]))
        tokens, logprobs = tokens[: body["max_tokens"]], logprobs[: body["max_tokens"]]
        stopped = tokens[-1] in body["stop_token_ids"]
        text = fake.brain.target.tokenizer.decode(tokens[: len(tokens) - stopped])
        choice: dict[str, Any] = {"text": text, "finish_reason": "stop" if stopped else "length"}
        if fake.ids:
            choice["token_ids"] = tokens
        if fake.logprobs and "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": logprobs}
        return {"choices": [choice], "usage": {"completion_tokens": len(tokens)}}

    def going_on(self, body: dict[str, Any]) -> dict[str, Any]:
        fake, stops = self.server_of, list(self.server_of.brain.target.stop_ids)
        assert body["stop_token_ids"] == []
        banned = stops if fake.eos == "forbidden" else []
        tokens = fake.brain.go_on(body["prompt"], body["max_tokens"], banned)
        end = next((i for i, t in enumerate(tokens) if t in stops and fake.eos == "heeded"), None)
        choice: dict[str, Any] = {"text": "", "finish_reason": "length" if end is None else "stop"}
        if fake.ids:
            choice["token_ids"] = tokens if end is None else tokens[: end + 1]
        return {"choices": [choice]}

    def _locked(self) -> bool:
        """Whether the key was missing; the message then repeats the key that came."""
        fake = self.server_of
        given = self.headers.get("Authorization", "")
        if fake.key is None or given == f"Bearer {fake.key}":
            return False
        self.reply(401, {"error": {"message": f"Incorrect API key provided: {given[7:]}"}})
        return True

    def reply(self, status: int, content: dict[str, Any], wrong: Wrong | None = None) -> None:
        wrong = wrong or Wrong()
        data = (json.dumps(content) if wrong.text is None else wrong.text).encode()
        with contextlib.suppress(OSError):  # the client has left, or the server was killed
            self.send_response(status)
            for name, value in wrong.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) + wrong.announced))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if wrong.half else data)
            self.wfile.flush()
            if wrong.half:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        return
