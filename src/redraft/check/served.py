"""A check of a draft in use, through the server that uses it: no weights, some requests and its counters.

vLLM counts drafts and accepted tokens; between two readings of its metrics lie our requests. What other
clients ask in the meantime is counted too, so the check wants a quiet moment, and says when it had none.
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
from ..decoding.sampling import Sampling
from ..metrics import intervals
from ..prompts.chat import Understood, understand
from ..prompts.rows import read_rows
from ..serving.client import Client, connect, key_for
from ..serving.counters import Counters, read_counters, steady
from ..serving.reply import Reply, Trouble, models_of
from .calibration_runs import KEEP, CalibrationRun, Checked, read_runs
from .cost_estimate import PLANS
from .evidence import ANSWERING
from .prediction import check_enough, predict
from .recommendation import WORTH, Cost, Pace, Recommendation, recommend

GROUPS = 8
"""Groups of prompts, between which the counters are read: the interval of tau is over groups."""
REQUEST_SECONDS = 600.0
"""The longest wait for a whole reply."""
STEADY_SECONDS = 0.3
"""Counters lag behind the answers."""
STEADY_LOOKS = 5
OF_THE_PROMPT = (400, 413, 422)
"""Statuses that say something of one prompt, not of the server."""
UNKNOWN = (
    "speed-up over plain decoding (serve without the draft and compare, or `redraft check --target`)",
    "the cause (needs the weights and --base)",
    "what the closed form brings (the same)",
    "seconds of training",
)


@dataclass(frozen=True)
class ServedCheck:
    """What a server shows of the prompts that it answers; `refused` ones, too long for instance, are left out.

    `tau` has a 95 % interval over groups of prompts; `per_position` is conditional acceptance; `rate` is in
    tokens per second with `rows` requests at a time. `others` is the share of the counted tokens that were
    not ours. `runs` and `outside` are the prediction's; `sampling` is how answers were asked for; `unknown`
    lists what a server cannot show.
    """

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
    recommendation: Recommendation
    runs: int
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
    runs: Sequence[CalibrationRun] | None = None,
    template_args: Mapping[str, Any] | None = None,
    transport: httpx.BaseTransport | None = None,
) -> ServedCheck:
    """Ask `most` prompts of a file, `rows` at a time, of the server at `url` (its root).

    `template_args` are variables for the chat template that the server uses.

    Raises UserError for a server that cannot be reached, has no counters or does not speculate, and for
    too few prompts.
    """
    url = _root(url)
    known = list(runs) if runs is not None else read_runs()
    check_enough(known)  # before anything is asked
    asked = _read(source, max(most, 2 * rows), rows)
    client = connect(url, REQUEST_SECONDS, key_for(url), transport)
    with client.http:
        server = _Server(client, model, template_args or {})
        name = server.model()
        lengths, counted, whole, seconds = _ask_all(server, name, asked, answering, rows)
    answered, tokens = sum(n is not None for n in lengths), sum(n for n in lengths if n)
    _check_counted(server, name, answered, len(asked), whole)
    # Without counts by position, K is what a draft proposes.
    found, k = whole.acceptance(), len(whole.per_position) or round(whole.drafted / whole.drafts)
    groups = [[(float(group.accepted), float(group.drafts)) for group in counted]]
    draft = Checked(predictors={"unadapted": found.tau}, k=k, temperature=answering.temperature)
    prediction = predict(draft, {KEEP: intervals.tau_draws(groups, k)}, known)
    rate, mean = tokens / max(seconds, 1e-9), tokens / answered
    costs = {action: Cost(round(plan.prompts * mean), None) for action, plan in PLANS.items()}
    # A step gives its accepted tokens and one more; a prefill gives one that belongs to no step.
    emitted = whole.accepted + whole.drafts
    return ServedCheck(
        endpoint=url,
        model=name,
        k=k,
        prompts=answered,
        refused=len(asked) - answered,
        answer_tokens=tokens,
        sampling=Sampling.of(answering),
        tau=(found.tau, *intervals.tau(groups, k).ends),
        per_position=found.per_position,
        rate=rate,
        rows=rows,
        others=max(1 - tokens / max(emitted, 1), 0.0),
        recommendation=recommend(
            prediction, Pace(rate / found.tau, None), {KEEP: Cost(0, 0.0), **costs}, worth
        ),
        runs=prediction.runs,
        outside=prediction.outside,
        published=published,
    )


def _check_counted(server: _Server, name: str, answered: int, asked: int, whole: Counters) -> None:
    """Raises UserError for too few answers, and for a server that drafts nothing."""
    if answered < GROUPS:
        raise UserError(
            f"{server.url} answered {answered} of {asked} prompts and refused the others (first: "
            f"{server.refusal}): too few for any recommendation"
        )
    if whole.drafts == 0:
        raise UserError(
            f"{server.url} answered {answered} prompts and drafted nothing: it serves {visible(name)} without "
            "speculation; start it with --speculative-config, or check the weights with --target and --draft"
        )


def _ask_all(
    server: _Server, name: str, asked: list[Understood], answering: RegenerateConfig, rows: int
) -> tuple[list[int | None], list[Counters], Counters, float]:
    """Tokens of each answer (None: refused), what was counted for each group of prompts and for all, seconds."""
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
    return lengths, counted, before.since(first), seconds


class _Server:
    """The few requests that a check makes."""

    def __init__(self, client: Client, named: str | None, template_args: Mapping[str, Any]):
        self.url, self.client, self.named = client.url, client, named
        self.template_args = template_args
        self.refusal = ""

    def model(self) -> str:
        try:
            names = list(models_of(self._object(self._reply("/v1/models"), "/v1/models")))
        except Trouble:
            names = []
        if not names:
            raise UserError(f"{self.url}/v1/models names no model; expected an OpenAI-style list")
        told = visible(", ".join(names))
        if self.named is not None and self.named not in names:
            raise UserError(f"{self.url} serves {told}, not {self.named}")
        if self.named is None and len(names) > 1:
            raise UserError(
                f"{self.url} serves {told}: name the one to check with --endpoint-model"
            )
        return self.named or names[0]

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
            f"{source} has {len(found)} prompts of use (asked for {most}): too few for any recommendation, "
            f"which needs {max(GROUPS, 2 * rows)} at least; `redraft prompts inspect` says what is wrong with the others"
        )
    return found


def _question(row: Understood) -> list[dict[str, Any]]:
    """The messages up to the last user turn."""
    last = max((at for at, m in enumerate(row.messages) if m["role"] == "user"), default=-1)
    return list(row.messages[: last + 1])
