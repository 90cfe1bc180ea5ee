"""Whatever a server replies, it ends in an answer, a retry or a sentence; never in a traceback or a hang."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.core.visible import visible
from redraft.generation import endpoint_check, endpoints
from redraft.generation.endpoint_check import Findings, check, describe, remarks
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft.serving.client import AsyncClient
from redraft.serving.reply import EndpointError
from tests.generation.conftest import settings
from tests.generation.fake_openai import Brain, FakeOpenAI, Wrong
from tests.generation.odd_json import mutated

AHEAD = 2
SEEDS = 150
STATUSES: list[tuple[int, dict[str, str]]] = [
    *(
        (204, {}),
        (206, {}),
        (301, {"Location": "http://\u202e[::"}),
        (302, {"Location": "gopher://x"}),
    ),
    *(
        (307, {"Location": "/v1/models"}),
        (401, {}),
        (404, {}),
        (418, {}),
        (429, {"Retry-After": "1e999"}),
    ),
    *(
        (500, {}),
        (503, {"Retry-After": "\u0661"}),
        (200, {"Content-Type": "text/html; charset=hex"}),
    ),
    (200, {"Content-Encoding": "gzip"}),
]


def check_told(text: str) -> None:
    """A sentence that can be printed and stored, of a length that can be read."""
    assert visible(text) == text
    text.encode()
    assert len(text) < 1500, f"{len(text)} characters: {text[:200]}"


class Scripted:
    """A good server of which one path, from its n-th request on, replies with something odd."""

    def __init__(self, brain: Brain, draw: random.Random):
        self.fake = FakeOpenAI(brain)
        self.draw = draw
        self.odd = draw.choice(["/v1/models", "/version", "/tokenize", *["/v1/completions"] * 5])
        self.after = draw.choice((0, 0, 1, 2))

    def good(self, request: httpx.Request) -> dict[str, Any]:
        fake, path = self.fake, request.url.path
        if path == "/v1/models":
            return {"data": [{"id": "tiny", "max_model_len": 256, "object": "model"}]}
        if path == "/version":
            return {"version": "1"}
        body = json.loads(request.content)
        if path == "/tokenize":
            return {"tokens": fake.renderer.render(body["messages"]), "count": 3}
        if body.get("ignore_eos"):
            ids = fake.brain.go_on(body["prompt"], body["max_tokens"], [])
            return {"choices": [{"index": 0, "token_ids": ids, "finish_reason": "length"}]}
        ids, logprobs = fake.brain.answer(tuple(body["prompt"]))
        ids, logprobs = ids[: body["max_tokens"]], logprobs[: body["max_tokens"]]
        stopped = ids[-1] in body["stop_token_ids"]
        choice = {
            "index": 0,
            "text": fake.brain.target.tokenizer.decode(ids),
            "token_ids": ids,
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": None,
            "logprobs": {"token_logprobs": logprobs},
        }
        return {"choices": [choice], "usage": {"completion_tokens": len(ids)}}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        good = self.good(request)
        if request.url.path == self.odd:
            self.after -= 1
        if request.url.path != self.odd or self.after >= 0:
            return httpx.Response(200, json=good)
        status, headers = (200, {}) if self.draw.random() < 0.85 else self.draw.choice(STATUSES)
        coded = {name: value.encode() for name, value in headers.items()}
        return httpx.Response(status, headers=coded, content=mutated(good, self.draw))


def test_the_check_of_a_server(
    target: Target, prompts: list[Prompt], brain: Brain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_check, "PROBES", 1)
    monkeypatch.setattr(endpoint_check, "PROBE_TOKENS", 8)
    outcomes: dict[str, int] = {}

    async def look(seed: int) -> Findings:
        transport = httpx.MockTransport(Scripted(brain, random.Random(seed)))
        async with httpx.AsyncClient(transport=transport) as client:
            endpoint = AsyncClient("http://box:1", client, 1.0, "sk-SECRET-123")
            return await check(endpoint, target, prompts[:2], "", seed % 2 * AHEAD)

    began = time.monotonic()
    for seed in range(SEEDS):
        try:
            found = asyncio.run(look(seed))
            asking = endpoints.Endpoints(target, settings(endpoints="http://box:1")).asking
            for line in remarks("http://box:1", found, asking, prompts[:2]):
                check_told(line)
            json.dumps(describe(found), allow_nan=False).encode()
            name = "found"
        except (EndpointError, UserError) as problem:
            check_told(str(problem))
            name = type(problem).__name__
        except Exception as problem:
            raise AssertionError(f"seed {seed}: {problem!r}") from problem
        outcomes[name] = outcomes.get(name, 0) + 1
    assert time.monotonic() - began < 60
    assert min(outcomes[name] for name in ("found", "Trouble", "UserError")) > SEEDS / 50, outcomes


@pytest.mark.parametrize("seed", range(2))
def test_answers_through_sockets(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, seed: int
) -> None:
    """Two of three completions are odd; what is written is right, and the rest is named."""
    draw = random.Random(seed)
    server = FakeOpenAI(brain)

    def wrong(number: int, body: dict[str, Any]) -> Wrong | None:
        if draw.random() < 0.33:
            return None
        good = {"choices": [{"token_ids": [5, 6], "finish_reason": "length", "text": "x"}]}
        text = mutated(good, draw).decode("utf-8", "replace")
        status, headers = (200, {}) if draw.random() < 0.8 else draw.choice(STATUSES[:7])
        plain = tuple(
            (name, value.encode("ascii", "replace").decode()) for name, value in headers.items()
        )
        announced = 7 if draw.random() < 0.05 else 0
        return Wrong(status, plain, text, half=draw.random() < 0.05, announced=announced)

    server.wrong = wrong
    began = time.monotonic()
    out = tmp_path / "a.jsonl"
    with server.running():
        config = settings(server, timeout=0.3, patience=1.0, concurrency=8)
        try:
            regenerate(target, prompts, out, config, AHEAD * (seed % 2))
        except UserError as problem:
            check_told(str(problem).replace("\n", " "))
    assert time.monotonic() - began < 30
    for line in out.read_text().splitlines() if out.exists() else []:
        found = json.loads(line)
        assert all(0 <= token < target.vocab_size for token in found["tokens"])
        assert len(found["tokens"]) == found["length"] + AHEAD * (seed % 2)
