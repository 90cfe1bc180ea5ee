"""What is known while endpoints work: the state of each server, and the prompts without an answer."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.records import Prompt
from ..serving.client import AsyncClient
from ..serving.reply import Busy, EndpointError, Trouble
from .endpoint_check import Findings

UNHEALTHY_AFTER = 3
"""A server is unhealthy after so many failures in a row."""
TRIES = 5
"""A prompt is given up after so many failures at servers that answer others."""
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 30.0
"""Seconds for which a server backs off first, and at most unless it asks for more."""


@dataclass
class ServerState:
    """One server: what its check found, and whether it is healthy.

    `problem` is '' while it is. `busy`: it needs no new check after `wait` seconds. Its places work while
    the event `healthy` is set; `unhealthy` makes it back off.
    """

    client: AsyncClient
    findings: Findings | None = None
    problem: str = ""
    dropped: bool = False
    failures: int = 0
    backoffs: int = 0
    busy: bool = False
    wait: float | None = None
    under_way: int = 0
    answered: int = 0
    healthy: asyncio.Event = field(default_factory=asyncio.Event)
    unhealthy: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return self.client.url

    def fail(self, problem: EndpointError, limit: int) -> None:
        """Count a failure. After `limit` in a row, or where the server asks for a pause, it backs off."""
        self.failures += 1
        busy = isinstance(problem, Busy)
        if self.failures >= limit or busy:
            self.problem, self.busy = str(problem), busy
            self.wait = problem.wait if isinstance(problem, Busy) else None
            self.healthy.clear()
            self.unhealthy.set()

    def succeed(self) -> None:
        self.failures = self.backoffs = 0
        self.problem = ""

    def back_off(self) -> float:
        """The next pause in seconds: twice the last, not all servers in step."""
        least = min(FIRST_BACKOFF * 2.0**self.backoffs, LONGEST_BACKOFF)
        self.backoffs += 1
        return max(self.wait or 0.0, least * random.uniform(0.5, 1.0))


@dataclass
class Work:
    """The prompts of one call: the line, how often each failed, and what became of them.

    In the line a prompt is its index, and is read when its turn comes; one that was taken before and is
    back in the line is itself. `open` counts those without an answer.
    """

    prompts: Sequence[Prompt]
    line: collections.deque[int | Prompt] = field(init=False)
    open: int = field(init=False)
    failed: collections.Counter[str] = field(default_factory=collections.Counter)
    given_up: list[tuple[str, str]] = field(default_factory=list)
    repeats: int = 0
    more: asyncio.Event = field(default_factory=asyncio.Event)
    last_good: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.line, self.open = collections.deque(range(len(self.prompts))), len(self.prompts)

    async def take(self) -> Prompt:
        """The next prompt, as soon as there is one."""
        while not self.line:
            self.more.clear()
            await self.more.wait()
        first = self.line.popleft()
        return self.prompts[first] if isinstance(first, int) else first

    def put_back(self, prompt: Prompt) -> None:
        """A prompt that was taken and not asked is the next one again."""
        self.line.appendleft(prompt)
        self.more.set()

    def give_back(self, prompt: Prompt, problem: EndpointError, state: ServerState) -> None:
        """Back in the line; given up after `TRIES` failures that may be the prompt's own."""
        self.repeats += 1
        if isinstance(problem, Trouble) and problem.reached and not isinstance(problem, Busy):
            self.failed[prompt.id] += 1
        if self.failed[prompt.id] >= TRIES:
            self.give_up(prompt, f"{state.url} {problem}, {TRIES} times")
        else:
            self.line.append(prompt)
            self.more.set()

    def give_up(self, prompt: Prompt, reason: str) -> None:
        self.given_up.append((prompt.id, reason))
        self.open -= 1
