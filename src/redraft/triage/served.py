"""A check of a draft in use, through the server that uses it: no weights, some requests and its counters.

vLLM counts drafts and accepted tokens; between two readings of its metrics lie our requests. What other
clients ask in the meantime is counted too, so the check wants a quiet moment, and says when it had none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from ..config import RegenerateConfig
from ..console import Progress
from ..data.endpoint import key_for
from ..data.regenerate import sampling_of
from ..data.rows import read_rows
from ..decode.sampling import Sampling
from ..engines.counters import Counters, read_counters
from ..errors import UserError
from ..formats.chat import Understood, understand
from ..measuring import intervals
from .evidence import ANSWERING
from .outlook import KEEP, Case, check_enough, outlook, read_cases
from .pilot import PLANS
from .verdict import WORTH, Bill, Pace, Verdict, decide

GROUPS = 8
"""Groups of prompts, between which the counters are read: the interval of tau is over groups."""
REQUEST_SECONDS = 600.0
SETTLE_SECONDS = 0.3
"""Counters lag behind the answers."""
SETTLE_LOOKS = 5
OF_THE_PROMPT = (400, 413, 422)
"""Statuses that say something of one prompt, not of the server."""
UNKNOWN = (
    "speed-up over plain decoding (serve without the draft and compare, or `redraft check --target`)",
    "the cause (needs the weights and --base)",
    "what a refresh in closed form brings (the same)",
    "seconds of training",
)


@dataclass(frozen=True)
class ServedCheck:
    """What a server shows of the prompts that it answers; `refused` ones, too long for instance, are left
    out. `tau` has a 95 % interval over groups of prompts; `per_position` is
    conditional acceptance; `rate` is in tokens per second with `rows` requests at a time. `others` is the
    share of the counted tokens that were not ours. `cases` and `outside` are the outlook's; `sampling` is how answers were asked for. `unknown` is what cannot be told from here."""

    endpoint: str
    model: str
    k: int
    prompts: int
    answer_tokens: int
    sampling: Sampling
    tau: tuple[float, float, float]
    per_position: tuple[float, ...]
    rate: float
    rows: int
    others: float
    verdict: Verdict
    cases: int
    outside: tuple[str, ...]
    published: float | None
    refused: int
    unknown: tuple[str, ...] = UNKNOWN


def check_served(
    url: str,
    source: str,
    *,
    rows: int = 1,
    most: int = 64,
    answering: RegenerateConfig = ANSWERING,
    worth: float = WORTH,
    published: float | None = None,
    model: str | None = None,
    cases: Sequence[Case] | None = None,
    transport: httpx.BaseTransport | None = None,
) -> ServedCheck:
    """Ask `most` prompts of a file, `rows` at a time, of the server at `url` (its root).

    Raises UserError for a server that cannot be reached, has no counters or does not speculate, and for
    too few prompts.
    """
    known = list(cases) if cases is not None else read_cases()
    check_enough(known)  # before anything is asked
    asked = _read(source, max(most, 2 * rows), rows)
    with httpx.Client(
        base_url=url.rstrip("/").removesuffix("/v1"),
        timeout=REQUEST_SECONDS,
        headers=_key(url),
        transport=transport,
    ) as client:
        server = _Server(url, client, model)
        name = server.model()
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
                now = server.settled()
                counted.append(now.since(before))
                before = now
                progress.advance(len(group))
    whole = before.since(first)
    tokens, answered = sum(n for n in lengths if n), sum(n is not None for n in lengths)
    if answered < GROUPS:
        raise UserError(
            f"{url} answered {answered} of {len(asked)} prompts and refused the others (first: "
            f"{server.refusal}): too few for any verdict"
        )
    if whole.drafts == 0:
        raise UserError(
            f"{url} answered {answered} prompts and drafted nothing: it serves {name} without speculation; "
            "start it with --speculative-config, or check the weights with --target and --draft"
        )
    # Without counts by position, K is what a draft proposes.
    found, k = whole.acceptance(), len(whole.per_position) or round(whole.drafted / whole.drafts)
    groups = [[(float(group.accepted), float(group.drafts)) for group in counted]]
    draws, interval = intervals.tau_draws(groups, k), intervals.tau(groups, k)
    signs = {"reused": found.tau} | ({"native": published} if published else {})
    rate = tokens / max(seconds, 1e-9)
    bills = {KEEP: Bill(0, 0.0)} | {
        action: Bill(round(plan.prompts * tokens / answered), None)
        for action, plan in PLANS.items()
    }
    seen = outlook(signs, k, {KEEP: draws}, known, answering.temperature)
    verdict = decide(seen, Pace(rate / found.tau, None), bills, worth)
    # A step gives its accepted tokens and one more; a prefill gives one that belongs to no step.
    emitted = whole.accepted + whole.drafts
    return ServedCheck(
        endpoint=url,
        model=name,
        k=k,
        prompts=answered,
        refused=len(asked) - answered,
        answer_tokens=tokens,
        sampling=sampling_of(answering),
        tau=(found.tau, *interval.ends),
        per_position=found.per_position,
        rate=rate,
        rows=rows,
        others=max(1 - tokens / max(emitted, 1), 0.0),
        verdict=verdict,
        cases=seen.cases,
        outside=seen.outside,
        published=published,
    )


class _Server:
    """The few requests that a check makes."""

    def __init__(self, url: str, client: httpx.Client, named: str | None):
        self.url, self.client, self.named = url, client, named
        self.refusal = ""

    def model(self) -> str:
        listed = self._object(self._reply("GET", "/v1/models"), "/v1/models")
        models = listed.get("data") or [{}]
        names = [str(m.get("id")) for m in models]
        if self.named is not None and self.named not in names:
            raise UserError(f"{self.url} serves {', '.join(names)}, not {self.named}")
        if self.named is None and len(names) > 1:
            raise UserError(
                f"{self.url} serves {', '.join(names)}: name the one to check with --endpoint-model"
            )
        name = self.named or models[0].get("id")
        if not isinstance(name, str):
            raise UserError(f"{self.url}/v1/models names no model; expected an OpenAI-style list")
        return name

    def counters(self) -> Counters:
        page = self._reply("GET", "/metrics").text
        if "vllm:" not in page:
            raise UserError(
                f"{self.url}/metrics holds no counters of vLLM, from which acceptance is read; check the "
                "weights instead: --target, --draft and --prompts"
            )
        return read_counters(page)

    def settled(self) -> Counters:
        """The counters, once they have come to rest."""
        last = self.counters()
        for _ in range(SETTLE_LOOKS):  # on a server that others use they never do
            time.sleep(SETTLE_SECONDS)
            now = self.counters()
            if now == last:
                break
            last = now
        return last

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
        else:
            path = "/v1/completions"
            body["prompt"] = row.text if row.tokens is None else list(row.tokens)
        reply = self._reply("POST", path, body, may_refuse=True)
        if reply.status_code != 200:
            self.refusal = self.refusal or reply.text.strip()[:300]
            return None
        usage = self._object(reply, path).get("usage") or {}
        count = usage.get("completion_tokens")
        if not isinstance(count, int):
            raise UserError(f"{self.url}{path} does not say how many tokens it wrote (usage)")
        return count

    def _object(self, reply: httpx.Response, path: str) -> dict[str, Any]:
        try:
            found = reply.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.url}{path} replied with something that is no JSON object")
        return found

    def _reply(
        self, verb: str, path: str, body: dict[str, Any] | None = None, may_refuse: bool = False
    ) -> httpx.Response:
        try:
            reply = self.client.request(verb, path, json=body)
        except httpx.HTTPError as problem:
            raise UserError(
                f"{self.url}{path} does not answer ({problem or type(problem).__name__})"
            ) from None
        if reply.status_code != 200 and not (may_refuse and reply.status_code in OF_THE_PROMPT):
            raise UserError(
                f"{self.url}{path} refused (HTTP {reply.status_code}): {reply.text.strip()[:300]}"
            )
        return reply


def _key(url: str) -> dict[str, str]:
    key = key_for(url)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _read(source: str, most: int, rows: int) -> list[Understood]:
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
            f"{source} has {len(found)} prompts of use (asked for {most}): too few for any verdict, "
            f"which needs {max(GROUPS, 2 * rows)} at least; `redraft prompts inspect` says what is wrong with the others"
        )
    return found


def _question(row: Understood) -> list[dict[str, Any]]:
    """The messages up to the last user turn."""
    last = max((at for at, m in enumerate(row.messages) if m["role"] == "user"), default=-1)
    return list(row.messages[: last + 1])
