"""Asking an engine's OpenAI server: token ids in, greedy token ids out, and its counters."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import NoReturn

from ..core.console import Progress
from ..core.errors import UserError
from ..core.records import Prompt
from .client import Trouble, message_of, object_of, shown
from .completion import first_choice
from .counters import Counters, read_counters
from .server import HOST, Server

REQUEST_SECONDS = 1800.0
SETTLE_SECONDS = 0.05


@dataclass(frozen=True)
class Client:
    """Asks `server` for the model named `model`. Safe to use from several threads."""

    server: Server
    model: str

    def complete(
        self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[int]:
        """The greedy answer to `prompt`, stop token included. Raises UserError when the engine
        refuses the request or is gone."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "stop_token_ids": list(stop_ids),
            "return_token_ids": True,
        }
        text = self._request("POST", "/v1/completions", json.dumps(body))
        try:
            choice = first_choice(object_of(text, None) or {})
        except Trouble:
            # A dying server's last answer may be a status line and nothing more.
            self._no_answer("/v1/completions", f"no completion: '{shown(text, None, 100)}'")
        tokens = choice.get("token_ids")
        if tokens is None:
            raise UserError(
                f"{self.server.name} answers without token ids; expected `token_ids` because of "
                "`return_token_ids`: a newer version is needed"
            )
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            self._no_answer("/v1/completions", "its `token_ids` are no list of numbers")
        return tokens

    def complete_all(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        *,
        concurrency: int = 1,
        label: str = "answering",
    ) -> list[list[int]]:
        """The answers to all prompts in their order, `concurrency` requests at a time."""
        pool = ThreadPoolExecutor(concurrency)
        try:
            jobs = {
                pool.submit(self.complete, prompt.tokens, max_new_tokens, stop_ids): at
                for at, prompt in enumerate(prompts)
            }
            answers: dict[int, list[int]] = {}
            with Progress(label, len(prompts), "prompts") as progress:
                for job in as_completed(jobs):
                    answers[jobs[job]] = job.result()
                    progress.advance()
        finally:
            # Not waiting: after Ctrl-C the server goes down and with it the requests under way.
            pool.shutdown(wait=False, cancel_futures=True)
        return [answers[at] for at in range(len(prompts))]

    def counters(self) -> Counters:
        """The speculation counters, once they have come to rest: they lag behind the answers."""
        last = read_counters(self._request("GET", "/metrics"))
        while True:
            time.sleep(SETTLE_SECONDS)
            now = read_counters(self._request("GET", "/metrics"))
            if now == last:
                return now
            last = now

    def _request(self, verb: str, path: str, body: str | None = None) -> str:
        connection = http.client.HTTPConnection(HOST, self.server.port, timeout=REQUEST_SECONDS)
        try:
            connection.request(verb, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as problem:
            self._no_answer(path, repr(problem))
        finally:
            connection.close()
        if response.status != 200:
            raise UserError(
                f"{self.server.name} refused {path} (HTTP {response.status}): {message_of(text)}; "
                f"its log: {self.server.log}"
            )
        return text

    def _no_answer(self, path: str, what: str) -> NoReturn:
        """Raise UserError: the server has died, or it answered `path` with `what`."""
        _let_it_end(self.server)
        self.server.check_alive()
        raise UserError(
            f"{self.server.name} did not answer {path}: {what}; its log: {self.server.log}"
        ) from None


def _let_it_end(server: Server) -> None:
    """A dying server closes its connections a little before its process ends."""
    deadline = time.monotonic() + 2.0
    while server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
