"""A serving vLLM, asked while its counters are read: what it accepts, prompt group by prompt group.

vLLM counts drafts and accepted tokens; between two readings of its metrics lie our requests. What other
clients ask in the meantime is counted too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from ..config import RegenerateConfig, read_endpoints
from ..core.console import Progress
from ..core.errors import UserError
from ..core.visible import visible
from ..prompts.chat import Understood, understand
from ..prompts.rows import read_rows
from ..serving.client import connect, key_for
from ..serving.counters import Counters, read_counters, steady
from ..serving.reply import Reply, Trouble, models_of

GROUPS = 8
"""Groups of prompts, between which the counters are read: the interval of tau is over groups."""
REQUEST_SECONDS = 600.0
"""The longest wait for a whole reply."""
STEADY_SECONDS = 0.3
"""Counters lag behind the answers."""
STEADY_LOOKS = 5
OF_THE_PROMPT = (400, 413, 422)
"""Statuses that say something of one prompt, not of the server."""


@dataclass(frozen=True)
class Counted:
    """What was counted while prompts were answered: for each group of them, and for all.

    `lengths` are the tokens of each answer, None where the server refused the prompt.
    """

    lengths: tuple[int | None, ...]
    groups: tuple[Counters, ...]
    whole: Counters
    seconds: float

    @property
    def answered(self) -> int:
        return sum(length is not None for length in self.lengths)

    @property
    def tokens(self) -> int:
        return sum(length for length in self.lengths if length)

    @property
    def others(self) -> float:
        """The share of the counted tokens that were not asked for here."""
        # A step gives its accepted tokens and one more; a prefill gives one that belongs to no step.
        emitted = self.whole.accepted + self.whole.drafts
        return max(1 - self.tokens / max(emitted, 1), 0.0)

    @property
    def k(self) -> int:
        """Tokens drafted at a time."""
        # Without counts by position, K is what a draft proposes.
        return len(self.whole.per_position) or round(self.whole.drafted / self.whole.drafts)

    def counts(self) -> list[list[tuple[float, float]]]:
        """(accepted, steps) of each group, in one list as of one seed: what intervals are made from."""
        return [[(float(group.accepted), float(group.drafts)) for group in self.groups]]


class CountingServer:
    """The few requests that a check makes of the server at `url` (its root). A context, for its connections."""

    def __init__(
        self,
        url: str,
        template_args: Mapping[str, Any] | None = None,
        transport: httpx.BaseTransport | None = None,
    ):
        self.url = _root(url)
        self.client = connect(self.url, REQUEST_SECONDS, key_for(self.url), transport)
        self.template_args = template_args or {}
        self.refusal = ""

    def __enter__(self) -> CountingServer:
        self.client.http.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.client.http.__exit__(*raised)

    def models(self) -> dict[str, dict[str, Any]]:
        """What it serves, by name. Raises UserError where it names nothing."""
        try:
            found = models_of(self._object(self._reply("/v1/models"), "/v1/models"))
        except Trouble:
            found = {}
        if not found:
            raise UserError(f"{self.url}/v1/models names no model; expected an OpenAI-style list")
        return found

    def model(self, named: str | None) -> str:
        """The model to ask: the `named` one, or the only one."""
        names = list(self.models())
        told = visible(", ".join(names))
        if named is not None and named not in names:
            raise UserError(f"{self.url} serves {told}, not {named}")
        if named is None and len(names) > 1:
            raise UserError(
                f"{self.url} serves {told}: name the one to check with --endpoint-model"
            )
        return named or names[0]

    def counters(self) -> Counters:
        page = self._reply("/metrics").text
        if "vllm:" not in page:
            raise UserError(
                f"{self.url}/metrics holds no counters of vLLM, from which acceptance is read; check the "
                "weights instead: --target, --draft and --prompts"
            )
        try:
            return read_counters(page)
        except (ValueError, OverflowError):
            raise UserError(f"{self.url}/metrics holds counters that are no numbers") from None

    def ask(self, model: str, row: Understood, how: RegenerateConfig) -> int | None:
        """The tokens of an answer; None when the server will not answer this prompt."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "top_k": how.top_k or -1,
            "top_p": how.top_p,
        }
        if row.messages:
            path, body["messages"] = "/v1/chat/completions", _question(row)
            body |= {"tools": list(row.tools)} if row.tools else {}
            variables = {**self.template_args, **(row.variables or {})}
            body |= {"chat_template_kwargs": variables} if variables else {}
        else:
            path = "/v1/completions"
            body["prompt"] = row.text if row.tokens is None else list(row.tokens)
        reply = self._reply(path, body)
        if reply.status != 200:
            self.refusal = self.refusal or reply.reason
            return None
        usage = self._object(reply, path).get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if type(count) is not int or not 0 <= count <= how.max_new_tokens:
            raise UserError(
                f"{self.url}{path} does not say how many tokens it wrote (usage.completion_tokens, of at most "
                f"{how.max_new_tokens})"
            )
        return count

    def _object(self, reply: Reply, path: str) -> dict[str, Any]:
        found = reply.json()
        if found is None:
            raise UserError(f"{self.url}{path} replied with something that is no JSON object")
        return found

    def _reply(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        """A reply that is of use, or that refuses the prompt in `body`."""
        try:
            reply = self.client.reply(path, body)
        except Trouble as problem:
            raise UserError(f"{self.url}{path} does not answer ({problem})") from None
        if reply.status != 200 and not (body and reply.status in OF_THE_PROMPT):
            raise UserError(f"{self.url}{path} refused (HTTP {reply.status}): {reply.reason}")
        return reply


def ask_all(
    server: CountingServer,
    name: str,
    asked: Sequence[Understood],
    answering: RegenerateConfig,
    rows: int,
) -> Counted:
    """Ask prompts of the model `name`, `rows` at a time. Raises UserError for a server that fails, or starts again."""
    lengths: list[int | None] = []
    counted, seconds = [], 0.0
    before = first = server.counters()
    with (
        Progress("asking", len(asked), "prompts") as progress,
        ThreadPoolExecutor(rows) as pool,
    ):
        # Every group fills the places: the last requests of a group have the server to themselves.
        size = max(-(-len(asked) // GROUPS), rows)
        for at in range(0, len(asked), size):
            group = asked[at : at + size]
            began = time.monotonic()
            lengths += pool.map(lambda u: server.ask(name, u, answering), group)
            seconds += time.monotonic() - began
            now = steady(server.counters, STEADY_SECONDS, STEADY_LOOKS)
            counted.append(_since(before, now, server.url))
            before = now
            progress.advance(len(group))
    return Counted(tuple(lengths), tuple(counted), before.since(first), seconds)


def _since(before: Counters, now: Counters, url: str) -> Counters:
    """What was counted between two readings. Raises UserError where that cannot be."""
    found = now.since(before)
    if min(found.drafts, found.drafted, found.accepted, *found.per_position) < 0:
        raise UserError(
            f"the counters of {url} went down while it was asked: it was restarted; check it again"
        )
    if found.accepted > found.drafted:
        raise UserError(
            f"{url}/metrics counts {found.accepted} accepted tokens of {found.drafted} drafted: no counts "
            "of speculation"
        )
    return found


def _root(url: str) -> str:
    try:
        roots = read_endpoints(url)
    except ValueError as problem:
        raise UserError(f"--endpoint {problem}") from None
    if len(roots) != 1:
        raise UserError("check asks one server; name one with --endpoint")
    return roots[0]


def read_asked(source: str, most: int, rows: int) -> list[Understood]:
    """The first rows that can be asked. Raises UserError when they are too few to resample."""
    found: list[Understood] = []
    for _, row in read_rows(source):
        if isinstance(row, dict):
            try:
                found.append(understand(row))
            except ValueError:
                continue  # the count below says how many were of use
        if len(found) == most:
            break
    if len(found) < max(GROUPS, 2 * rows):
        raise UserError(
            f"{source} has {len(found)} prompts of use (asked for {most}): too few for any recommendation, "
            f"which needs {max(GROUPS, 2 * rows)} at least; `redraft prompts inspect` says what is wrong with the others"
        )
    return found


def _question(row: Understood) -> list[dict[str, Any]]:
    """The messages up to the last user turn."""
    last = max((at for at, m in enumerate(row.messages) if m["role"] == "user"), default=-1)
    return list(row.messages[: last + 1])
