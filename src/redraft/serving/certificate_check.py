"""Is a running server the target and draft of a certificate? No model is needed, and no redraft.

This file needs Python 3.10 and httpx, nothing else. Copy it next to a certificate and run

    python certificate_check.py certificate.json --endpoint http://host:port

A certificate holds prompts as token ids, the target's greedy answers, and how many drafted tokens each
step accepts. The prompts are asked one at a time. Texts and the server's own counts are compared, cut at
the end of an answer as the engine cuts them. Counts that differ are held against those of known faults.
Exit codes: 0 it holds, 3 it differs, 2 it could not be checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

FORMAT, VERSION = "redraft-certificate", 1
DIFFERS = 3
"""Exit code for a server of another target or draft."""
NOT_HASHED = ("date", "checksum")
"""Keys that the checksum leaves out: the same inputs give the same checksum on any day."""
REQUEST_SECONDS, CONNECT_SECONDS = 600.0, 10.0
COUNTER_SECONDS, COUNTER_PAUSE = 5.0, 0.05
"""How long counters may lag behind an answer, and the time between two readings."""
TOLERANCE = {"float32": 0.01, "float64": 0.01}
HALF_TOLERANCE = 0.03
"""How far tau may lie from the certificate's through rounding, as a share of it (as `redraft verify`)."""
HALF_TEXTS = 0.1
"""In half precision so many answers may part where no near-tie is marked."""
EARLY = 4
"""Answers of another target part within so many tokens."""
FEWEST = 4
"""Answers with equal texts below which counts are not judged."""
NEAR, APART = 0.25, 2.0
"""The nearest fault is named when its counts are at most NEAR times as far as the certificate's, and the
second nearest is APART times as far as it."""
VISIBLE = 4
"""A fault whose counts differ by fewer tokens than this from the right ones is not told from rounding."""


class CheckError(Exception):
    """The check could not be made; the message says what to do."""


# -- the certificate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CertifiedPrompt:
    """A prompt, the target's greedy answer and what follows it, as token ids.

    `near_ties` are positions of the answer where rounding can choose another token. `accepted` are, for
    each K, the drafted tokens that each step accepts, counted in full.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    lookahead: tuple[int, ...]
    near_ties: tuple[int, ...]
    accepted: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class FaultSignature:
    """What faults accept that count alike: `causes` by name, and for each prompt the tokens accepted by a
    step that begins at each position of the answer, from 1 on."""

    causes: Mapping[str, str]
    runs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Probe:
    """A conversation and the token ids that the target's chat template makes of it."""

    messages: tuple[Mapping[str, Any], ...]
    variables: Mapping[str, Any]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Certificate:
    """A certificate file. `target` and `draft` name and hash what was certified; `unseen` are faults that
    change no count on these prompts. `engines` are the runs (see `FaultSignature`) in engines that compute the draft
    otherwise than the prompts' counts have it."""

    target: Mapping[str, Any]
    draft: Mapping[str, Any]
    dtype: str
    stop_ids: tuple[int, ...]
    largest_k: int
    max_new_tokens: int
    prompts: tuple[CertifiedPrompt, ...]
    faults: tuple[FaultSignature, ...]
    unseen: tuple[str, ...]
    probe: Probe | None
    versions: Mapping[str, str]
    date: str = ""
    engines: Mapping[str, tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=dict)

    def served_by(self, engine: str) -> Certificate:
        """With the counts of an engine."""
        if engine not in self.engines:
            return self
        prompts = tuple(
            dataclasses.replace(one, accepted={k: steps_of(runs, k) for k in one.accepted})
            for one, runs in zip(self.prompts, self.engines[engine], strict=True)
        )
        return dataclasses.replace(self, prompts=prompts)

    def to_text(self) -> str:
        """The file. Everything but the date is decided by the inputs."""
        row = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        row["prompts"] = [
            {**one, "accepted": {str(k): _digits(runs) for k, runs in one["accepted"].items()}}
            for one in row["prompts"]
        ]
        for fault in row["faults"]:
            fault["runs"] = [_digits(runs) for runs in fault["runs"]]
        row["engines"] = {name: list(map(_digits, runs)) for name, runs in self.engines.items()}
        row["checksum"] = _checksum(row)
        lines = []
        for key, value in row.items():
            if key in ("prompts", "faults"):
                inner = ",\n".join(f"  {_compact(one)}" for one in value)
                lines.append(f" {_compact(key)}: [\n{inner}\n ]")
            else:
                lines.append(f" {_compact(key)}: {_compact(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def read_certificate(path: str | Path) -> Certificate:
    """A certificate file. Raises CheckError for one that is not whole, or no certificate."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise CheckError(f"{path} could not be read ({problem}); name a certificate file") from None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckError(
            f"{path} is no whole JSON file ({len(text):,} characters): it is cut short or damaged; copy it again"
        ) from None
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        raise CheckError(
            f'{path} is no certificate: expected "format": "{FORMAT}"; write one with redraft certify'
        )
    if row.get("version") != VERSION:
        raise CheckError(
            f"{path} is a certificate of version {_shown(row.get('version'))}, this checker reads version "
            f"{VERSION}; use the checker of the redraft that wrote it"
        )
    try:
        if row["checksum"] != _checksum(row):
            raise CheckError(
                f"{path} was edited or damaged since it was written (its checksum differs); copy it again"
            )
        return _certificate(row)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise CheckError(
            f"{path} is damaged or of another format ({type(problem).__name__}: {_shown(problem)}); write it "
            "again with redraft certify"
        ) from None


def _certificate(row: Mapping[str, Any]) -> Certificate:
    prompts = tuple(
        CertifiedPrompt(
            tuple(one["prompt"]),
            tuple(one["answer"]),
            tuple(one["lookahead"]),
            tuple(one["near_ties"]),
            {int(k): tuple(map(int, runs)) for k, runs in one["accepted"].items()},
        )
        for one in row["prompts"]
    )
    faults = tuple(
        FaultSignature(fault["causes"], tuple(tuple(map(int, runs)) for runs in fault["runs"]))
        for fault in row["faults"]
    )
    probe = row["probe"] and Probe(
        tuple(row["probe"]["messages"]), row["probe"]["variables"], tuple(row["probe"]["tokens"])
    )
    engines = {
        name: tuple(tuple(map(int, runs)) for runs in some)
        for name, some in row.get("engines", {}).items()
    }
    plain = ("target", "draft", "dtype", "largest_k", "max_new_tokens", "versions", "date")
    return Certificate(
        **{key: row[key] for key in plain},
        stop_ids=tuple(row["stop_ids"]),
        unseen=tuple(row["unseen"]),
        prompts=prompts,
        faults=faults,
        probe=probe,
        engines=engines,
    )


def _digits(runs: Sequence[int]) -> str:
    return "".join(map(str, runs))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _checksum(row: Mapping[str, Any]) -> str:
    hashed = {key: value for key, value in row.items() if key not in NOT_HASHED}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- how engines count -----------------------------------------------------------------------------

Steps = list[tuple[int, int]]
"""Drafted and accepted tokens of each step that an engine counts."""
Cut = Callable[[Sequence[int], Sequence[int], Sequence[int], int, int], Steps]
"""(accepted tokens of each step, the answer and what follows, stop tokens, K, longest answer) -> the steps as an
engine counts them."""


def steps_of(runs: Sequence[int], k: int) -> tuple[int, ...]:
    """The accepted tokens of each step with K drafted, from those of a step that begins anywhere."""
    accepted: list[int] = []
    emitted = 1
    while emitted <= len(runs):
        accepted.append(min(runs[emitted - 1], k))
        emitted += accepted[-1] + 1
    return tuple(accepted)


def whole_steps(
    accepted: Sequence[int], tokens: Sequence[int], stops: Sequence[int], k: int, most: int
) -> Steps:
    """vLLM and SGLang: every step in full, the last one too, whose tokens may run past the end."""
    return [(k, gained) for gained in accepted]


def cut_steps(
    accepted: Sequence[int], tokens: Sequence[int], stops: Sequence[int], k: int, most: int
) -> Steps:
    """llama.cpp: the last step of an answer is cut.

    - A step drafts no more tokens than the longest answer leaves space for, but for the step's own. One
      that drafts none is not counted.
    - A drafted stop token that the target chooses too is the step's own token, unless it is the chain's
      last: it does not count as accepted, nor does anything after it.
    """
    steps: Steps = []
    emitted = 1
    for agreed in accepted:
        drafted = min(k, most - emitted - 1)
        if drafted <= 0:
            break
        gained = min(agreed, drafted)
        chain = tokens[emitted : emitted + gained]
        stop = next((at for at, token in enumerate(chain) if token in stops), drafted)
        if stop < drafted - 1:
            gained = stop
        steps.append((drafted, gained))
        emitted += gained + 1
    return steps


@dataclass(frozen=True)
class Counts:
    """Drafted and accepted tokens, and the steps in which they were verified."""

    drafted: int
    accepted: int
    steps: int

    @property
    def tau(self) -> float:
        """Tokens of a step."""
        return 1 + self.accepted / self.steps if self.steps else 1.0


@dataclass(frozen=True)
class Dialect:
    """A row: how an engine is asked, how it replies and how it counts.

    `owner` is what it names itself in /v1/models. `body` is a greedy request: model, prompt, longest
    answer, stop tokens. `tokens` and `counts` read a reply; `counts` is None where the page /metrics holds
    them, `prefixed` by this. `render` are the requests that render a conversation. `unhide` and
    `speculate` say how its server is to be started.
    """

    name: str
    title: str
    owner: str
    path: str
    body: Callable[[str, Sequence[int], int, Sequence[int]], dict[str, Any]]
    tokens: Callable[[Mapping[str, Any]], Any]
    counts: Callable[[Mapping[str, Any]], Counts | None] | None
    cut: Cut
    render: Callable[[_Server, str, Probe], Any] | None
    unhide: str
    speculate: str
    prefixed: str = ""


def _vllm_body(
    model: str, prompt: Sequence[int], most: int, stops: Sequence[int]
) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": most,
        "temperature": 0,
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(stops),
        "return_token_ids": True,
    }


def _llama_body(
    model: str, prompt: Sequence[int], most: int, stops: Sequence[int]
) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "n_predict": most,
        "temperature": 0,
        "repeat_penalty": 1.0,
        "return_tokens": True,
        "cache_prompt": False,
    }


def _sglang_body(
    model: str, prompt: Sequence[int], most: int, stops: Sequence[int]
) -> dict[str, Any]:
    sampling = {
        "temperature": 0,
        "max_new_tokens": most,
        "stop_token_ids": list(stops),
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }
    return {"input_ids": list(prompt), "sampling_params": sampling}


def _first_choice(reply: Mapping[str, Any]) -> Any:
    choices = reply.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("token_ids") if isinstance(first, dict) else None


def _llama_counts(reply: Mapping[str, Any]) -> Counts | None:
    """None where timings are missing. A reply that drafted nothing has no counts of drafts.

    Steps are not reported: each gives its accepted tokens and one more, and the first token is no step's.
    """
    timings = reply.get("timings")
    if not isinstance(timings, dict) or "predicted_n" not in timings:
        return None
    accepted = int(timings.get("draft_n_accepted", 0))
    steps = int(timings["predicted_n"]) - 1 - accepted
    return Counts(int(timings.get("draft_n", 0)), accepted, max(steps, 0))


SGLANG_COUNTS = (
    ("spec_num_proposed_drafts", "spec_num_correct_drafts"),
    ("spec_proposed_drafts", "spec_accepted_drafts"),
    ("spec_draft_token_num", "spec_accept_token_num"),
)
"""Drafted and accepted tokens in meta_info: since 0.5.12, in 0.5.11, and from 0.5.9 to 0.5.10."""


def _sglang_counts(reply: Mapping[str, Any]) -> Counts | None:
    """None where meta_info or a part of it is missing. Without speculation there are no spec_ fields."""
    found = reply.get("meta_info")
    if not isinstance(found, dict):
        return None
    if "spec_verify_ct" not in found:
        return Counts(0, 0, 0)
    for drafted, accepted in SGLANG_COUNTS:
        if drafted in found and accepted in found:
            return Counts(int(found[drafted]), int(found[accepted]), int(found["spec_verify_ct"]))
    return None


def _vllm_render(server: _Server, model: str, probe: Probe) -> Any:
    body = {"model": model, "messages": list(probe.messages), "add_generation_prompt": True}
    if probe.variables:
        body["chat_template_kwargs"] = dict(probe.variables)
    return (server.asked("/tokenize", body) or {}).get("tokens")


def _llama_render(server: _Server, model: str, probe: Probe) -> Any:
    body: dict[str, Any] = {"messages": list(probe.messages)}
    if probe.variables:
        body["chat_template_kwargs"] = dict(probe.variables)
    text = (server.asked("/apply-template", body) or {}).get("prompt")
    if not isinstance(text, str):
        return None
    body = {"content": text, "add_special": True, "parse_special": True}
    return (server.asked("/tokenize", body) or {}).get("tokens")


DIALECTS = (
    Dialect(
        name="vllm",
        title="vLLM",
        owner="vllm",
        path="/v1/completions",
        body=_vllm_body,
        tokens=_first_choice,
        counts=None,
        cut=whole_steps,
        render=_vllm_render,
        unhide="start it without --disable-log-stats, and let /metrics through",
        speculate="--speculative-config",
        prefixed="vllm",
    ),
    Dialect(
        name="llama.cpp",
        title="llama.cpp",
        owner="llamacpp",
        path="/completion",
        body=_llama_body,
        tokens=lambda reply: reply.get("tokens"),
        counts=_llama_counts,
        cut=cut_steps,
        render=_llama_render,
        unhide="ask llama-server itself, not a proxy that drops `timings`",
        speculate="-md DRAFT and --spec-type",
    ),
    Dialect(
        name="sglang",
        title="SGLang",
        owner="sglang",
        path="/generate",
        body=_sglang_body,
        tokens=lambda reply: reply.get("output_ids"),
        counts=_sglang_counts,
        cut=whole_steps,
        render=None,
        unhide="ask SGLang (0.5.9 or newer) itself, not a proxy that drops `meta_info`",
        speculate="--speculative-algorithm, as a chain (top-k 1)",
    ),
)


# -- asking ----------------------------------------------------------------------------------------


class _Server:
    """The server at `url`; every failure is a sentence that says what to do."""

    def __init__(self, url: str, http: httpx.Client, key: str | None):
        self.url, self.http, self.answered = url, http, 0
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def reply(self, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """Raises CheckError where no reply comes."""
        try:
            if body is None:
                return self.http.get(self.url + path, headers=self.headers)
            return self.http.post(self.url + path, json=body, headers=self.headers)
        except (httpx.RequestError, httpx.InvalidURL) as problem:
            reason = _shown(problem) or type(problem).__name__
            if self.answered:
                raise CheckError(
                    f"{self.url} stopped replying after {self.answered} answers ({reason}); read its log, start "
                    "it again, and check again"
                ) from None
            raise CheckError(
                f"{self.url} cannot be reached ({reason}); start the server, or name its address with --endpoint"
            ) from None

    def asked(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """The JSON object of a request that the server may refuse; None where it does."""
        reply = self.reply(path, body)
        return _object(reply) if reply.status_code == 200 else None

    def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists."""
        reply = self.reply("/v1/models")
        if reply.status_code in (401, 403):
            raise CheckError(
                f"{self.url} refuses the request (HTTP {reply.status_code}); set its API key in $REDRAFT_API_KEY"
            )
        listed = (_object(reply) or {}).get("data") if reply.status_code == 200 else None
        return [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []


def _object(reply: httpx.Response) -> dict[str, Any] | None:
    try:
        found = reply.json()
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Served:
    """An answer that was served, and its counts."""

    tokens: tuple[int, ...]
    counts: Counts


def _dialect_of(server: _Server, engine: str | None) -> tuple[Dialect, str]:
    """The row of the engine behind a server, and the name of the model it serves."""
    models = server.models()
    owners = [str(model.get("owned_by", "")) for model in models]
    names = ", ".join(row.name for row in DIALECTS)
    if engine is not None:
        row = next((row for row in DIALECTS if row.name == engine), None)
        if row is None:
            raise CheckError(f"unknown --engine '{_shown(engine)}'; known: {names}")
    else:
        row = next((row for row in DIALECTS if row.owner in owners), None)
        if row is None:
            raise CheckError(
                f"{server.url}/v1/models does not tell which engine it is (owned_by: "
                f"{_shown(', '.join(owners)) or 'nothing'}); name it with --engine {names}"
            )
    return row, str(models[0].get("id", "")) if models else ""


def _ask(
    server: _Server, row: Dialect, model: str, certificate: Certificate, one: CertifiedPrompt
) -> Served:
    """One prompt's answer and counts. Raises CheckError for a server that gives none."""
    before = _page(server, row) if row.counts is None else None
    most = certificate.max_new_tokens
    reply = server.reply(row.path, row.body(model, one.prompt, most, certificate.stop_ids))
    content = _object(reply)
    if reply.status_code != 200 or content is None:
        reason = _shown(reply.text, 160) or "no reason given"
        raise CheckError(
            f"{server.url}{row.path} refused a prompt of the certificate (HTTP {reply.status_code}: {reason}); it "
            f"needs {row.title} serving {_shown(certificate.target.get('name'))} (vocabulary "
            f"{certificate.target.get('vocab_size')}) with a context of {len(one.prompt) + most} tokens: is the "
            "certificate of another target?"
        )
    tokens = row.tokens(content)
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise CheckError(
            f"{server.url}{row.path} replied without token ids; it needs a version of {row.title} that returns them, "
            "or another --engine"
        )
    if before is not None:
        counts = _moved(server, row, before, len(tokens), certificate.largest_k)
    else:
        counts = _reported(server, row, content)
    server.answered += 1
    return Served(tuple(tokens), counts)


def _reported(server: _Server, row: Dialect, content: Mapping[str, Any]) -> Counts:
    """The counts in a reply."""
    assert row.counts is not None
    try:
        found = row.counts(content)
    except (TypeError, ValueError) as problem:
        raise CheckError(
            f"{server.url} reports counts that are no numbers ({_shown(problem)}); is it {row.title}?"
        ) from None
    if found is None:
        raise CheckError(f"{server.url} hides its counts of speculation; {row.unhide}")
    return found


def _page(server: _Server, row: Dialect) -> dict[str, int]:
    """The counters of speculation on /metrics, summed over engines."""
    reply = server.reply("/metrics")
    if reply.status_code != 200 or f"{row.prefixed}:" not in reply.text:
        raise CheckError(
            f"{server.url} hides its counters (/metrics, HTTP {reply.status_code}); {row.unhide}"
        )
    line = rf"^{row.prefixed}:spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total(?:\{{[^}}]*\}})? ([0-9.eE+]+)$"
    totals: Counter[str] = Counter()
    for name, value in re.findall(line, reply.text, re.MULTILINE):
        totals[name] += int(float(value))
    if not totals:
        raise CheckError(
            f"{server.url} serves without speculation; start {row.title} with {row.speculate}"
        )
    return dict(totals)


def _moved(server: _Server, row: Dialect, before: dict[str, int], length: int, k: int) -> Counts:
    """What the counters moved by for one answer, once they have caught up with it.

    A step gives its accepted tokens and one more; the first token belongs to no step.
    """
    deadline = time.monotonic() + COUNTER_SECONDS
    while True:
        now = _page(server, row)
        drafts, drafted, accepted = (
            now.get(name, 0) - before.get(name, 0)
            for name in ("drafts", "draft_tokens", "accepted_tokens")
        )
        if min(drafts, drafted, accepted) < 0:
            raise CheckError(
                f"the counters of {server.url} went down: it was started again; check again"
            )
        if 1 + drafts + accepted >= length or time.monotonic() > deadline:
            break
        time.sleep(COUNTER_PAUSE)
    if not drafts:
        raise CheckError(
            f"{server.url} counted no step for an answer of {length} tokens; start {row.title} with {row.speculate}"
        )
    if not length <= 1 + drafts + accepted <= length + max(k, drafted // drafts):
        raise CheckError(
            f"the counters of {server.url} moved by {drafts} steps and {accepted} accepted tokens for an answer of "
            f"{length} tokens: other requests are served, or steps without a draft; check it alone"
        )
    return Counts(drafted, accepted, drafts)


# -- comparing -------------------------------------------------------------------------------------

ANOTHER_TARGET, ANOTHER_ARITHMETIC = "another target", "target in another arithmetic"
ANOTHER_TEMPLATE, VARYING_K = "another chat template", "varying K"
FEW, NOTHING, UNKNOWN = "too few equal texts", "nothing accepted", "unknown cause"
CAUSES = {
    ANOTHER_TARGET: "the answers part from the first tokens on: the server runs another target (or another "
    "adapter, revision or tokenizer) than the certificate's",
    ANOTHER_ARITHMETIC: "answers part later, where no near-tie is marked: the target or its KV cache is quantised or "
    "in another dtype, or decoding with the draft is not lossless there",
    ANOTHER_TEMPLATE: "the server renders a conversation to other token ids than the target's chat template and "
    "tokenizer do, so its chats are not those that the draft was adapted to",
    VARYING_K: "the number of drafted tokens is not the same in every step, so counts cannot be compared; fix "
    "it (no dynamic speculation, no least probability), and check again",
    FEW: "too few answers have the certificate's text for their counts to say anything",
    NOTHING: "not one drafted token is accepted; any wrong draft can count like that",
    UNKNOWN: "the counts are those of no known fault",
}
"""Causes that need no simulation. The others come with the certificate."""


@dataclass(frozen=True)
class Nearest:
    """A known fault. `distance` is how far the served counts are from its own, `apart` how far those are from
    the certificate's: accepted tokens, summed over answers."""

    names: tuple[str, ...]
    distance: int
    apart: int


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    `holds` is the conclusion, `cause` a name where it does not hold. `exact` says that all counts compared
    are equal. `equal`, `near_ties` and `different` count answers by their text; counts were compared on the
    `equal` ones. `distance` is how far accepted tokens are from the certificate's, summed over answers;
    `nearest` are the nearest known faults. `template` is same, another, or not checked.
    """

    holds: bool
    exact: bool
    cause: str
    conclusion: str
    engine: str
    model: str
    k: int | None
    dtype: str
    prompts: int
    equal: int
    near_ties: int
    different: int
    served: Counts
    expected: Counts | None
    distance: int
    nearest: tuple[Nearest, ...]
    template: str

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, with tau."""
        taus = {"tau": self.served.tau, "expected_tau": self.expected and self.expected.tau}
        return {**dataclasses.asdict(self), **taus}

    def to_text(self) -> str:
        """The result in a few lines."""
        lines = [
            f"{self.engine} serving {_shown(self.model) or 'a model'}, K = {self.k or 'varying'}",
            f"texts: {self.equal} of {self.prompts} equal, {self.near_ties} part at a near-tie, "
            f"{self.different} differ",
        ]
        if self.expected is not None and self.equal:
            lines.append(
                f"counts on {self.equal} answers: {self.served.accepted} of {self.served.drafted} drafted tokens "
                f"accepted (tau {self.served.tau:.3f}), certificate {self.expected.accepted} of "
                f"{self.expected.drafted} (tau {self.expected.tau:.3f})"
            )
        lines.append(f"chat template: {self.template}")
        return "\n".join([*lines, _shown(self.conclusion, 2000)])


def check(
    certificate: Certificate,
    endpoint: str,
    engine: str | None = None,
    *,
    key: str | None = None,
    transport: httpx.BaseTransport | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CheckResult:
    """Hold the server at `endpoint` against a certificate. Raises CheckError where that cannot be done."""
    url = _root(endpoint)
    limits = httpx.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS)
    with httpx.Client(timeout=limits, transport=transport, trust_env=not _near(url)) as http:
        server = _Server(url, http, key)
        row, model = _dialect_of(server, engine)
        certificate = certificate.served_by(row.name)
        template = _template(server, row, model, certificate.probe)
        served = []
        for at, one in enumerate(certificate.prompts):
            served.append(_ask(server, row, model, certificate, one))
            progress(at + 1, len(certificate.prompts))
    if not any(answer.counts.drafted for answer in served):
        raise CheckError(
            f"{url} answered {len(served)} prompts and drafted nothing: it serves without speculation; start "
            f"{row.title} with {row.speculate}"
        )
    return judge(certificate, row, served, template, model)


def _template(server: _Server, row: Dialect, model: str, probe: Probe | None) -> str:
    rendered = row.render(server, model, probe) if row.render and probe else None
    if not isinstance(rendered, list) or probe is None:
        return "not checked"
    return "same" if tuple(rendered) == probe.tokens else "another"


def first_difference(
    one: CertifiedPrompt, tokens: Sequence[int], stops: Sequence[int]
) -> int | None:
    """Where a served answer parts from the certificate's; a stop token may be left out. None: nowhere."""
    answer = one.answer
    if answer[-1] in stops and tuple(tokens) == answer[:-1]:
        return None
    shared = min(len(answer), len(tokens))
    parts = (at for at in range(shared) if answer[at] != tokens[at])
    return next(parts, None if len(answer) == len(tokens) else shared)


def found_k(row: Dialect, served: Sequence[Served]) -> int | None:
    """K, from what was drafted; None where it varies."""
    rates = [
        answer.counts.drafted / max(answer.counts.steps, 1)
        for answer in served
        if answer.counts.drafted
    ]
    if row.cut is whole_steps:
        return int(rates[0]) if len(set(rates)) == 1 and rates[0].is_integer() else None
    counts = [answer.counts for answer in served if answer.counts.drafted]

    def drafts(k: int) -> bool:
        # The last steps draft what the longest answer leaves space for: K - 1, K - 2, ... The step that accepts
        # a stop token as its chain's last has no token of its own, so that it is not among the steps counted.
        left_out = k * (k + 3) // 2
        return all(k * one.steps - left_out <= one.drafted <= k * (one.steps + 1) for one in counts)

    return next((k for k in range(1, math.ceil(max(rates)) + 1) if drafts(k)), None)


def judge(
    certificate: Certificate,
    row: Dialect,
    served: Sequence[Served],
    template: str = "not checked",
    model: str = "",
) -> CheckResult:
    """The conclusion, from the answers that were served in the certificate's order."""
    parts = [
        first_difference(one, answer.tokens, certificate.stop_ids)
        for one, answer in zip(certificate.prompts, served, strict=True)
    ]
    ties = [
        at is not None and at in one.near_ties
        for one, at in zip(certificate.prompts, parts, strict=True)
    ]
    kept = [index for index, at in enumerate(parts) if at is None]
    apart = [at for at, tie in zip(parts, ties, strict=True) if at is not None and not tie]
    k = found_k(row, served)
    if k is not None and k > certificate.largest_k:
        raise CheckError(
            f"the server drafts {k} tokens a step, the certificate holds counts up to {certificate.largest_k}; start "
            "it with fewer"
        )
    counts = [served[index].counts for index in kept]
    right = _right(certificate, row, kept, k)
    nearest = _nearest(certificate, row, kept, k, counts, right)
    cause = _in_texts(certificate, apart) or _not_comparable(kept, k)
    says = CAUSES.get(cause, "")
    if not cause:
        cause, says = _in_counts(certificate, k, counts, right, nearest)
    if not cause and template == "another":
        cause, says = ANOTHER_TEMPLATE, CAUSES[ANOTHER_TEMPLATE]
    distance = _distance(counts, right) if right else 0
    return CheckResult(
        holds=not cause,
        exact=bool(right) and distance == 0,
        cause=cause,
        conclusion=f"differs: {says}" if cause else _holds(distance, len(kept), len(served)),
        engine=row.name,
        model=model,
        k=k,
        dtype=certificate.dtype,
        prompts=len(served),
        equal=len(kept),
        near_ties=sum(ties),
        different=len(apart),
        served=_total(counts),
        expected=_total(right) if right else None,
        distance=distance,
        nearest=tuple(nearest[:3]),
        template=template,
    )


def _in_texts(certificate: Certificate, apart: Sequence[int]) -> str:
    """The cause in texts; `apart` are the places where answers part without a near-tie."""
    count = len(certificate.prompts)
    if len(apart) <= (0 if certificate.dtype in TOLERANCE else int(HALF_TEXTS * count)):
        return ""
    early = sum(at < EARLY for at in apart)
    return ANOTHER_TARGET if 2 * early >= count else ANOTHER_ARITHMETIC


def _not_comparable(kept: Sequence[int], k: int | None) -> str:
    if len(kept) < FEWEST:
        return FEW
    return VARYING_K if k is None else ""


def _in_counts(
    certificate: Certificate,
    k: int | None,
    counts: Sequence[Counts],
    right: Sequence[Counts],
    nearest: Sequence[Nearest],
) -> tuple[str, str]:
    """The cause in counts and its sentence; '' where they hold, exactly or within rounding."""
    distance = _distance(counts, right)
    if distance == 0:
        # In half precision a near-tie of the draft moves the end of a step that an engine cuts.
        moved = 0 if certificate.dtype in TOLERANCE else k or 0
        varies = any(abs(a.drafted - b.drafted) > moved for a, b in zip(counts, right, strict=True))
        return (VARYING_K, CAUSES[VARYING_K]) if varies else ("", "")
    visible = [one for one in nearest if one.apart >= VISIBLE]
    if not any(one.accepted for one in counts):
        alike = [name for one in visible if one.distance == 0 for name in one.names]
        return NOTHING, f"{CAUSES[NOTHING]}; known faults that do: {', '.join(alike) or 'none'}"
    if visible and visible[0].distance == 0:
        return _named(certificate, visible[0], "its counts are equal, answer by answer")
    served, expected = _total(counts).tau, _total(right).tau
    if abs(served - expected) <= TOLERANCE.get(certificate.dtype, HALF_TOLERANCE) * expected:
        return "", ""
    if not visible:
        return UNKNOWN, CAUSES[UNKNOWN]
    first, second = visible[0].distance, visible[1].distance if visible[1:] else None
    margin = f"{first} accepted tokens away, the certificate {distance}"
    margin += "" if second is None else f", the next fault {second}"
    if first <= NEAR * distance and (second is None or second >= APART * first):
        return _named(certificate, visible[0], f"its counts are the nearest, {margin}")
    return UNKNOWN, f"{CAUSES[UNKNOWN]} (nearest: {' or '.join(visible[0].names)}, {margin})"


def _named(certificate: Certificate, near: Nearest, why: str) -> tuple[str, str]:
    causes = next(f.causes for f in certificate.faults if tuple(f.causes) == near.names)
    return " | ".join(near.names), f"{'; or '.join(dict.fromkeys(causes.values()))} ({why})"


def _holds(distance: int, compared: int, prompts: int) -> str:
    counts = f"the counts of {compared} of {prompts} answers"
    if distance:
        return f"holds within rounding: {counts} differ by {distance} in accepted tokens"
    return f"holds: {counts} were compared, and all are equal"


def _right(
    certificate: Certificate, row: Dialect, kept: Sequence[int], k: int | None
) -> list[Counts]:
    """The certificate's counts of the answers `kept`, as the engine counts; none where K varies."""
    if k is None:
        return []
    return [_cut(certificate, row, at, certificate.prompts[at].accepted[k], k) for at in kept]


def _nearest(
    certificate: Certificate,
    row: Dialect,
    kept: Sequence[int],
    k: int | None,
    counts: Sequence[Counts],
    right: Sequence[Counts],
) -> list[Nearest]:
    """The known faults, nearest first."""
    if k is None:
        return []
    found = []
    for fault in certificate.faults:
        own = [_cut(certificate, row, at, steps_of(fault.runs[at], k), k) for at in kept]
        found.append(Nearest(tuple(fault.causes), _distance(counts, own), _distance(right, own)))
    return sorted(found, key=lambda one: one.distance)


def _cut(
    certificate: Certificate, row: Dialect, at: int, accepted: Sequence[int], k: int
) -> Counts:
    """The steps of one answer as the engine counts them."""
    one, most = certificate.prompts[at], certificate.max_new_tokens
    tokens = (*one.answer, *one.lookahead)
    steps = row.cut(accepted, tokens, certificate.stop_ids, k, most)
    drafted, gained = (sum(counts) for counts in zip(*steps, strict=True)) if steps else (0, 0)
    whole = row.cut is whole_steps
    return Counts(drafted, gained, len(steps) if whole else len(one.answer) - 1 - gained)


def _distance(one: Sequence[Counts], other: Sequence[Counts]) -> int:
    return sum(abs(a.accepted - b.accepted) for a, b in zip(one, other, strict=True))


def _total(counts: Sequence[Counts]) -> Counts:
    return Counts(
        sum(one.drafted for one in counts),
        sum(one.accepted for one in counts),
        sum(one.steps for one in counts),
    )


# -- the command -----------------------------------------------------------------------------------


def _root(url: str) -> str:
    """A server's address without a trailing /v1."""
    root = url.strip().rstrip("/").removesuffix("/v1")
    parts = urlsplit(root)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CheckError(
            f"--endpoint expects an address like http://127.0.0.1:8000; got '{_shown(url)}'"
        )
    return root


def _near(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _shown(value: object, most: int = 200) -> str:
    """Text of a server or a file on one line, with nothing that a terminal obeys."""
    text = " ".join(str(value).split())[:most]
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The checker as a program of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("certificate", help="certificate file of redraft certify")
    parser.add_argument("--endpoint", required=True, help="address of the server")
    parser.add_argument("--engine", help=f"{', '.join(row.name for row in DIALECTS)} [found out]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    key = os.environ.get("REDRAFT_API_KEY", "").strip() or None
    try:
        found = check(read_certificate(given.certificate), given.endpoint, given.engine, key=key)
    except CheckError as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    sys.stdout.write((json.dumps(found.to_json()) if given.json else found.to_text()) + "\n")
    return 0 if found.holds else DIFFERS


if __name__ == "__main__":
    sys.exit(main())
