"""What a serving engine is to redraft: its row, what it is asked to serve, and the running engine.

A running engine takes token ids and gives greedy token ids and its counters.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..core.console import Progress
from ..core.errors import UserError, check_known
from ..core.records import Prompt
from .certificate_check import Cut, whole_steps
from .client import Client, connect
from .counters import Counters, read_counters, steady
from .environment import Environment, Package, find_environment
from .reply import Reply, Trouble, shown
from .server import Server, free_port, serving

REQUEST_SECONDS, PAUSE = 1800.0, 0.05
"""The longest wait for a reply, and the time between two readings of the counters."""
TARGET, ADAPTED = "target", "adapted"
"""Names under which requests ask for the target, and for the target with its adapter."""


@dataclass(frozen=True)
class Speculation:
    """A draft for the engine: the engine's name of the method, the draft's folder, K tokens a step."""

    method: str
    draft: str
    k: int


@dataclass(frozen=True)
class Serving:
    """What to serve and how.

    `dtype` is a torch dtype name. `eager` None means: on a CPU build. `port` None picks a free one.
    `patience` is the longest start, in seconds. `step_tokens` are the most tokens of a step (None: the engine's own
    choice): a prompt that does not fit in one is read in parts. `at_a_time` is the most requests that
    will be sent at a time. `flags` are the user's own, added to the server's command line. `fleet` are adapters that are
    served side by side, by the names that requests ask for. `outtype` is the type to convert the target to (None: that of
    `dtype`).
    """

    target: str
    dtype: str
    max_model_len: int
    adapter: str | None = None
    speculation: Speculation | None = None
    eager: bool | None = None
    port: int | None = None
    patience: float = 900.0
    step_tokens: int | None = None
    at_a_time: int = 1
    flags: tuple[str, ...] = ()
    fleet: tuple[tuple[str, str], ...] = ()
    outtype: str | None = None

    @property
    def model(self) -> str:
        """The model's name in requests."""
        return ADAPTED if self.adapter else TARGET


def unchanged(environment: Environment, what: Serving, folder: Path) -> Serving:
    """The preparation of an engine that reads Hugging Face folders."""
    return what


@dataclass(frozen=True)
class Engine:
    """A row: everything special about one engine.

    `name` is the value of --engine, `title` what messages call the engine, `dtypes` what it serves,
    `package` how it is installed. `prepare` makes what it serves out of Hugging Face folders, and keeps
    it in a folder, a target in one of `outtypes`, the engine's names of types; one without any reads no GGUF. `command` and `variables` start its server on a port; the path `health` replies with
    HTTP 200 once it is ready. `own_flags` are flags that redraft gives it and the user cannot.
    `greedy` is the body of a completion: prompt, longest answer, stop tokens. `answer` is the token ids
    in its reply, None where there are none. `inside` is whether it takes a draft that belongs into the
    target's checkpoint from there only. `counters` is the prefix of their names on the page
    `metrics`, and `cut` what it counts of redraft's steps. `causes` are patterns of lines in its log that
    explain its end, the best first.
    """

    name: str
    title: str
    dtypes: tuple[str, ...]
    package: Package
    command: Callable[[Environment, Serving, int], list[str]]
    variables: Callable[[Environment, Serving], dict[str, str]]
    greedy: Callable[[Sequence[int], int, Sequence[int]], dict[str, Any]]
    answer: Callable[[dict[str, Any]], Any]
    counters: str
    health: str = "/health"
    metrics: str = "/metrics"
    completions: str = "/v1/completions"
    prepare: Callable[[Environment, Serving, Path], Serving] = unchanged
    cut: Cut = whole_steps
    inside: bool = False
    outtypes: tuple[str, ...] = ()
    own_flags: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()

    def find(self, python: str | None = None) -> Environment:
        """Its environment (see `find_environment`)."""
        return find_environment(self.package, python)

    def check_flags(self, flags: Sequence[str]) -> None:
        """Raise UserError for a flag of the user's that redraft itself gives the server."""
        for flag in flags:
            if flag.partition("=")[0] in self.own_flags:
                raise UserError(
                    f"--engine-args {flag}: redraft gives {self.title} this flag itself; leave it out "
                    "(--port, --k and --dtype are flags of redraft verify)"
                )

    def check_outtype(self, outtype: str | None) -> None:
        """Raise UserError for a type to which this engine's targets are not converted."""
        if outtype is not None and not self.outtypes:
            raise UserError(
                f"--outtype {outtype}: {self.title} serves the target's own files; leave it out"
            )
        if outtype is not None:
            check_known("--outtype", [outtype], self.outtypes)

    @contextlib.contextmanager
    def serve(self, environment: Environment, what: Serving, log: Path) -> Iterator[RunningEngine]:
        """A running server and the client that asks it; stopped when the block ends.

        Raises UserError when it cannot be started (see `server.serving`).
        """
        port = what.port or free_port()
        with serving(
            f"{self.title} {environment.version}",
            self.command(environment, what, port),
            self.variables(environment, what),
            port=port,
            log=log,
            patience=what.patience,
            health=self.health,
            causes=self.causes,
        ) as server:
            client = connect(server.url, REQUEST_SECONDS)
            with client.http:
                yield RunningEngine(self, server, client, what.model)


@dataclass(frozen=True)
class RunningEngine:
    """Asks `server` for the model named `model`. Safe to use from several threads."""

    engine: Engine
    server: Server
    client: Client
    model: str

    def complete(
        self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[int]:
        """The greedy answer to `prompt`, stop token included. Raises UserError when the engine
        refuses the request or is gone."""
        path = self.engine.completions
        body = {"model": self.model, **self.engine.greedy(prompt, max_new_tokens, stop_ids)}
        reply = self._reply(path, body)
        try:
            tokens = self.engine.answer(reply.json() or {})
        except Trouble:
            # A dying server's last answer may be a status line and nothing more.
            self._no_answer(f"gave no completion at {path}: '{shown(reply.text, None, 100)}'")
        if tokens is None:
            raise UserError(
                f"{self.server.name} answers without token ids, which it was asked for: a newer "
                "version is needed"
            )
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            self._no_answer(f"gave token ids at {path} that are no list of numbers")
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
        asked = [pool.submit(self.complete, p.tokens, max_new_tokens, stop_ids) for p in prompts]
        try:
            with Progress(label, len(prompts), "prompts") as progress:
                for job in as_completed(asked):
                    job.result()
                    progress.advance()
        finally:
            # Not waiting: after Ctrl-C the server goes down and with it the requests under way.
            pool.shutdown(wait=False, cancel_futures=True)
        return [job.result() for job in asked]

    def counters(self) -> Counters:
        """The speculation counters, once they are steady."""
        path, prefix = self.engine.metrics, self.engine.counters
        return steady(lambda: read_counters(self._reply(path).text, prefix), PAUSE)

    def _reply(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        try:
            reply = self.client.reply(path, body)
        except Trouble as problem:
            self._no_answer(f"{problem} at {path}")
        if reply.status != 200:
            raise UserError(
                f"{self.server.name} refused {path} (HTTP {reply.status}): {reply.reason}; "
                f"its log: {self.server.log}"
            )
        return reply

    def _no_answer(self, what: str) -> NoReturn:
        """Raise UserError: the server has died, or did `what`."""
        # A dying server closes its connections a little before its process ends.
        deadline = time.monotonic() + 2.0
        while self.server.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self.server.check_alive()
        raise UserError(f"{self.server.name} {what}; its log: {self.server.log}") from None
