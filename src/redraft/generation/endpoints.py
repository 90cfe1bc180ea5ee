"""Several endpoints as one: every prompt is answered once, by whichever server has a place free.

Each server has `concurrency` places, which take the next prompt as soon as they are free, so that its
batch stays full to the end. A prompt whose request fails goes back in the line, for any server. A server
that fails three times in a row, or that nobody reaches, is unhealthy. It backs off, longer each time, and
is checked again before it goes on: what comes back after a restart may be another model. When no server is
healthy, redraft waits for `patience` seconds and then gives up; what was answered is the caller's already.

The requests run in an event loop on a thread of their own, so this works inside a notebook too, and
the caller writes answers while others are under way.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import queue
import random
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from ..config import RegenerateConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.records import Answer, Prompt
from ..decoding.sampling import Sampling
from ..models.batching import lengths_of
from ..models.target import Target
from ..serving.client import AsyncClient, connect_async, key_for
from ..serving.completion import Asking, Completion
from ..serving.reply import EndpointError, Refused, Trouble, Unable
from .endpoint_check import Findings, check, describe, remarks
from .server_states import FIRST_BACKOFF, UNHEALTHY_AFTER, ServerState, Work

TICK = 0.25
"""Seconds between two looks at how things are."""
START_PATIENCE = 60.0
"""Seconds to wait for the first sign of any server: a mistyped URL should not cost more."""


class Endpoints:
    """The servers that `config` names, as one backend for answers of `target`.

    `lookahead` is how many lookahead tokens are kept past each answer's end. `about` describes each
    server that was found to be the target; it holds no secret.
    """

    def __init__(self, target: Target, config: RegenerateConfig, lookahead: int = 0):
        sampling = Sampling.of(config)
        self.asking = Asking(target, sampling, config.max_new_tokens, config.seed, lookahead)
        self.config = config
        self.about: dict[str, dict[str, Any]] = {}
        self._found: dict[str, Findings] = {}
        self._dropped: set[str] = set()
        self._reported: set[str] = set()
        self._marks: collections.Counter[str] = collections.Counter()
        self._states: list[ServerState] = []

    def answers(self, prompts: Sequence[Prompt]) -> Generator[list[Answer], None, None]:
        """The answers as they come, in lists (empty ones now and then, while nothing comes).

        Closing the iterator breaks off what is under way. Raises UserError, after everything that was
        answered, when a server is not the target, prompts were refused, or patience ran out.
        """
        if not prompts:
            return
        out: queue.SimpleQueue[Completion | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()
        thread = threading.Thread(
            target=lambda: asyncio.run(self._run(prompts, out, stop)), name="endpoints", daemon=True
        )
        thread.start()
        try:
            ended = False
            while not ended:
                completion = _drain(out)
                ended = bool(completion) and not isinstance(completion[-1], Completion)
                last = completion.pop() if ended else None
                yield [self._note(each) for each in completion if isinstance(each, Completion)]
                if isinstance(last, BaseException):
                    raise last
            self._sum_up()
        finally:
            stop.set()
            thread.join()

    def health(self) -> str:
        """A note for the progress line when not every server is healthy, else ''."""
        bad = [s for s in self._states if s.problem]
        if bad:
            shown = bad[0].problem if len(bad[0].problem) < 80 else bad[0].problem[:77] + "..."
            return f"{len(bad)} of {len(self._states)} endpoints unhealthy: {bad[0].url} {shown}"
        new = [s.url for s in self._states if s.findings is None]
        return f"checking {new[0]}" if new else ""

    async def _run(
        self,
        prompts: Sequence[Prompt],
        out: queue.SimpleQueue[Completion | BaseException | None],
        stop: threading.Event,
    ) -> None:
        """All of one call: start, watch, end. Whatever ends it is put into `out` last."""
        work = Work(prompts)
        urls = [u for u in self.config.endpoints_value if u not in self._dropped]
        self._states = []
        tasks: list[asyncio.Task[None]] = []
        async with contextlib.AsyncExitStack() as clients:
            try:
                for url in urls:
                    client = connect_async(url, self.config.timeout, key_for(url))
                    await clients.enter_async_context(client.http)
                    self._states.append(ServerState(client, self._found.get(url)))
                for state in self._states:
                    tasks.append(asyncio.create_task(self._attend(state, prompts)))
                    tasks += [
                        asyncio.create_task(self._answer(state, work, out))
                        for _ in range(min(self.config.concurrency, len(prompts)))
                    ]
                await self._watch(work, tasks, stop)
                out.put(self._ending(work, len(prompts)))
            except BaseException as problem:  # noqa: BLE001 - the caller's thread raises it again
                out.put(problem)
            finally:
                await _end(tasks)

    async def _watch(
        self, work: Work, tasks: list[asyncio.Task[None]], stop: threading.Event
    ) -> None:
        """Until everything is answered or given up. Raises UserError when nothing can come any more."""
        started = time.monotonic()
        while work.open and not stop.is_set():
            await asyncio.wait(tasks, timeout=TICK, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done() and task.exception() is not None:
                    task.result()
            if all(s.dropped for s in self._states):
                raise UserError(self._states[0].problem)
            if any(not s.problem or s.under_way for s in self._states):
                continue
            seen = any(s.findings for s in self._states)
            patience = self.config.patience if seen else min(self.config.patience, START_PATIENCE)
            if time.monotonic() - max(started, work.last_good) > patience:
                raise UserError(self._given_up_waiting(work, patience))

    async def _attend(self, state: ServerState, prompts: Sequence[Prompt]) -> None:
        """Keep one server: check it, let its places work while it is healthy, back off when it is not."""
        known = state.findings is not None
        while True:
            if not known:
                try:
                    await self._check(state, prompts)
                except EndpointError as problem:
                    state.fail(problem, limit=1)
                except UserError as problem:
                    self._drop(state, str(problem))
                    return
            if known or not state.unhealthy.is_set():
                state.failures = 0
                state.healthy.set()
                if not known:
                    if state.problem:
                        say(f"{state.url} answers again")
                    state.problem = ""
            await state.unhealthy.wait()
            self._report(state)
            known = state.busy and state.findings is not None
            await asyncio.sleep(state.back_off())
            state.unhealthy.clear()

    async def _check(self, state: ServerState, prompts: Sequence[Prompt]) -> None:
        """Is this server the target, and do the prompts fit it? Raises UserError when not."""
        asking = self.asking
        named = self.config.endpoint_model
        found = await check(state.client, asking.target, prompts, named, asking.lookahead)
        lengths = lengths_of(prompts)
        long = [i for i, n in enumerate(lengths) if asking.space_after(n, found.context) < 1]
        if long:
            raise UserError(
                f"{state.url} serves a context of {min(found.context, asking.target.max_positions)} "
                f"tokens, which {len(long)} of {len(prompts)} prompts fill (first: {prompts[long[0]].id}, "
                f"{lengths[long[0]]} tokens); serve the target with a longer one (vLLM: --max-model-len "
                f"{max(lengths) + asking.max_new_tokens + asking.lookahead})"
            )
        first = state.url not in self._found
        state.findings = self._found[state.url] = found
        self.about[state.url] = describe(found)
        if first:
            for line in remarks(state.url, found, asking, prompts):
                say(line)

    async def _answer(
        self,
        state: ServerState,
        work: Work,
        out: queue.SimpleQueue[Completion | BaseException | None],
    ) -> None:
        """One place at a server: take a prompt, ask, hand the answer over; for ever."""
        while True:
            await state.healthy.wait()
            prompt = await work.take()
            if not state.healthy.is_set() or state.findings is None:
                work.put_back(prompt)
                continue
            state.under_way += 1
            try:
                completion = await self._ask(state.client, prompt, state.findings)
            except Unable as problem:
                raise UserError(f"{state.url} {problem}") from None
            except Refused as problem:
                if problem.status in (401, 403, 404):  # not about the prompt: the check reports it
                    work.give_back(prompt, problem, state)
                    state.fail(problem, limit=1)
                else:
                    work.give_up(prompt, f"{state.url} refused it ({problem})")
            except Trouble as problem:
                work.give_back(prompt, problem, state)
                state.fail(problem, UNHEALTHY_AFTER if problem.reached else 1)
                # All places may fail at once, so the count may be far above the one that matters.
                await asyncio.sleep(
                    random.uniform(0, FIRST_BACKOFF) * min(state.failures, UNHEALTHY_AFTER)
                )
            else:
                state.succeed()
                state.answered += 1
                work.last_good = time.monotonic()
                out.put(completion)
                work.open -= 1
            finally:
                state.under_way -= 1

    async def _ask(self, client: AsyncClient, prompt: Prompt, found: Findings) -> Completion:
        """One prompt's answer, with its lookahead tokens. Raises an EndpointError."""
        asking = self.asking
        body = asking.body(prompt, found.model, found.context)
        reply = await client.ask("/v1/completions", body)
        completion = asking.read(prompt, reply, body["max_tokens"])
        if not asking.lookahead:
            return completion
        ahead = asking.lookahead_body(completion.answer, asking.lookahead, found.model)
        reply = await client.ask("/v1/completions", ahead)
        tokens = (*completion.answer.tokens, *asking.read_lookahead(reply, asking.lookahead))
        return replace(completion, answer=replace(completion.answer, tokens=tokens))

    def _note(self, completion: Completion) -> Answer:
        """Count what is odd about an answer, for the summing up."""
        for mark in ("retokenised", "doubtful", "short"):
            self._marks[mark] += getattr(completion, mark)
        return completion.answer

    def _sum_up(self) -> None:
        m = self._marks
        if m["retokenised"]:
            say(
                f"NOTE: {m['retokenised']} answers came as text and were tokenised again; for {m['doubtful']} "
                "of them this gave other tokens than the server counted"
            )
        if m["short"]:
            say(f"NOTE: {m['short']} answers were cut shorter by the server than was asked for")
        m.clear()

    def _report(self, state: ServerState) -> None:
        """Report a server's trouble, once for each kind of it."""
        text = f"{state.url} {state.problem}"
        if state.problem and text not in self._reported:
            self._reported.add(text)
            others = sum(not s.problem for s in self._states)
            then = (
                f"its work goes to the {others} healthy ones"
                if others
                else f"waiting up to {self.config.patience:g} s for an endpoint"
            )
            say(f"{text}; {then}")

    def _drop(self, state: ServerState, reason: str) -> None:
        """Never ask a server again. At the first look that is the user's mistake, and ends the run."""
        if state.findings is None and not state.backoffs:
            raise UserError(reason)
        state.dropped, state.problem = True, reason
        self._dropped.add(state.url)
        state.healthy.clear()
        say(f"{reason}\nit is not asked any more")

    def _ending(self, work: Work, asked: int) -> UserError | None:
        """The error of a finished call: none, or which prompts have no answer."""
        if not work.given_up:
            return None
        name, reason = work.given_up[0]
        return UserError(
            f"{len(work.given_up)} of {asked} prompts got no answer (first: {name}: {reason}); the "
            "others are written: run the same command again to ask for these alone"
        )

    def _given_up_waiting(self, work: Work, patience: float) -> str:
        states = "\n  ".join(f"{s.url} {s.problem}" for s in self._states)
        answered = sum(s.answered for s in self._states)
        return (
            f"no endpoint answered for {patience:g} s:\n  {states}\n{answered} answers of this run are "
            f"written, {work.open} are missing: run the same command again to ask for these alone"
        )


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks until all of them have ended; what they raised is known or of no interest."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=TICK)
        left = {task for task in left if not task.done()}
    await asyncio.gather(*tasks, return_exceptions=True)


def _drain(
    out: queue.SimpleQueue[Completion | BaseException | None],
) -> list[Completion | BaseException | None]:
    """All that has come; waits for the first, but not longer than a tick. What is no answer is last."""
    found: list[Completion | BaseException | None] = []
    with contextlib.suppress(queue.Empty):
        found.append(out.get(timeout=TICK))
        while isinstance(found[-1], Completion):
            found.append(out.get_nowait())
    return found
