"""Fixtures and helpers of the tests that ask endpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from redraft.config import RegenerateConfig
from redraft.core.records import Answer, Prompt
from redraft.generation import endpoints, server_states
from redraft.generation import regenerate as regenerate_module
from redraft.generation.regenerate import regenerate
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import SHAPE, make_tokenizer, save_target
from tests.generation.fake_openai import Brain, FakeOpenAI

TOKENS = 16


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, and no key or proxy of the person who runs the tests."""
    monkeypatch.setattr(server_states, "FIRST_BACKOFF", 0.02)
    monkeypatch.setattr(server_states, "LONGEST_BACKOFF", 0.1)
    monkeypatch.setattr(endpoints, "FIRST_BACKOFF", 0.02)
    monkeypatch.setattr(endpoints, "TICK", 0.02)
    for name in ("REDRAFT_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def brain(target: Target, prompts: list[Prompt]) -> Brain:
    """What the target answers, known before a test's clock runs."""
    found = Brain(target)
    for prompt in prompts:
        found.answer(prompt.tokens)
    return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the person was told."""
    lines: list[str] = []
    for module in (endpoints, regenerate_module):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Another model of the target's shape, with its tokenizer and template."""
    config = LlamaConfig(vocab_size=len(make_tokenizer()), **SHAPE)
    return load_target(str(save_target(tmp_path_factory.mktemp("other"), config, seed=7)))


def settings(*servers: FakeOpenAI, **changes: Any) -> RegenerateConfig:
    urls = ",".join(server.url for server in servers)
    return RegenerateConfig(
        **{
            "endpoints": urls,
            "max_new_tokens": TOKENS,
            "concurrency": 4,
            "patience": 5.0,
            **changes,
        }
    )


def own(target: Target, prompts: list[Prompt], folder: Path, **changes: Any) -> dict[str, Answer]:
    """The answers of this process."""
    config = RegenerateConfig(**{"max_new_tokens": TOKENS, **changes})
    found = regenerate(target, prompts, folder / "own.jsonl", config)
    return {answer.id: answer for answer in found}
