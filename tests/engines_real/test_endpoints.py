"""Answers through a real vLLM server that is killed in the middle and comes back."""

from __future__ import annotations

import collections
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.generation.answer_file import endpoints_of, read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics.lossless import compare
from redraft.models.target import Target
from redraft.prompts.prompts import read_prompts
from redraft.serving.client import AsyncClient
from redraft.serving.engine import Serving, Speculation
from redraft.serving.environment import Environment
from redraft.serving.server import free_port
from redraft.serving.verify import Request, serving_of
from redraft.serving.vllm import VLLM
from redraft_experiments.suite import build_suite, load_member
from tests.engines_real.conftest import BUILD, environment_of

pytestmark = [pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(1800)]
TOKENS, PROMPTS = 96, 160


@pytest.fixture(scope="module")
def suite() -> dict[str, Any]:
    return build_suite(BUILD / "suite", size="nano", members=("sft", "lora4"), kinds=("eagle",))


@pytest.fixture(scope="module")
def target(suite: dict[str, Any]) -> Target:
    return load_member(BUILD / "suite", "sft")


@pytest.fixture(scope="module")
def prompts(suite: dict[str, Any], target: Target) -> list[Prompt]:
    source = Path(suite["prompts"]) / f"{suite['tuned_domain']}-adapt.jsonl"
    return list(read_prompts(str(source), target, PROMPTS).prompts)


@pytest.fixture(scope="module")
def own(target: Target, prompts: list[Prompt], tmp_path_factory: Any) -> dict[str, Answer]:
    """The answers of this process."""
    path = tmp_path_factory.mktemp("own") / "a.jsonl"
    found = regenerate(target, prompts, path, RegenerateConfig(max_new_tokens=TOKENS))
    return {answer.id: answer for answer in found}


@pytest.fixture(scope="module")
def environment() -> Environment:
    return environment_of(VLLM)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[tuple[int, ...]]:
    """How often each prompt was sent, those of the check aside."""
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    real = AsyncClient.ask

    async def ask(self: AsyncClient, path: str, body: Any = None) -> dict[str, Any]:
        if path == "/v1/completions" and "logprobs" not in body:
            counts[tuple(body["prompt"])] += 1
        return await real(self, path, body)

    monkeypatch.setattr(AsyncClient, "ask", ask)
    return counts


def check_answers(
    target: Target, prompts: list[Prompt], own: dict[str, Answer], found: list[Answer]
) -> None:
    """One answer for each prompt, word for word that of this process but at near-ties."""
    assert sorted(a.id for a in found) == sorted(p.id for p in prompts)
    by_id = {a.id: a for a in found}
    outputs = compare(
        target, prompts, [own[p.id].answer for p in prompts], [by_id[p.id].answer for p in prompts]
    )
    print(outputs)
    assert outputs.holds, f"{outputs.different} of {outputs.prompts} answers differ"
    for a in found:
        same = a.tokens == own[a.id].tokens
        assert not same or a.finish == own[a.id].finish


@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "speculative"])
def test_a_server_killed_and_restarted_loses_nothing(
    suite: dict[str, Any],
    target: Target,
    prompts: list[Prompt],
    own: dict[str, Answer],
    environment: Environment,
    asked: collections.Counter[tuple[int, ...]],
    tmp_path: Path,
    drafted: bool,
) -> None:
    what = serving(target, prompts, suite["draft"] if drafted else None)
    out = tmp_path / "a.jsonl"
    config = RegenerateConfig(
        max_new_tokens=TOKENS, endpoints=f"http://127.0.0.1:{what.port}", concurrency=8
    )
    job = Job(target, prompts, out, config)
    with VLLM.serve(environment, what, tmp_path / "first.log") as client:
        job.start()
        while job.is_alive() and len(written(out)) < PROMPTS // 3:
            time.sleep(0.01)
        os.killpg(client.server.process.pid, signal.SIGKILL)
        client.server.process.wait()
        early = written(out)
    assert PROMPTS // 3 <= len(early) < PROMPTS
    assert job.is_alive(), job.problem
    with VLLM.serve(environment, what, tmp_path / "second.log") as client:
        job.join()
        counted = client.counters() if drafted else None
    assert job.problem is None
    found = read_answers(out)
    check_answers(target, prompts, own, found)
    kept = {a.id: a for a in found}
    assert all(kept[name] == answer for name, answer in early.items())
    assert all(asked[a.prompt] == 1 for a in early.values())
    assert max(asked.values()) == 2, "requests were under way when the server was killed"
    repeated = sum(asked.values()) - len(asked)
    assert repeated <= 2 * config.concurrency
    (about,) = endpoints_of(out).values()
    print(f"written at the kill: {len(early)}, asked again: {repeated}", json.dumps(about))
    assert about["logprob_difference"] < 1e-4
    assert about["not_checked"] == []
    if counted is not None:
        print(f"tau of the server's draft {counted.acceptance().tau:.2f}")
        assert counted.accepted > 0


def test_the_base_is_not_taken_for_its_fine_tune(
    suite: dict[str, Any],
    target: Target,
    prompts: list[Prompt],
    environment: Environment,
    asked: collections.Counter[tuple[int, ...]],
    tmp_path: Path,
) -> None:
    what = replace(serving(target, prompts, None), target=suite["base"])
    config = RegenerateConfig(endpoints=f"http://127.0.0.1:{what.port}")
    with VLLM.serve(environment, what, tmp_path / "base.log"):
        with pytest.raises(UserError, match="is not the target") as failed:
            regenerate(target, prompts, tmp_path / "a.jsonl", config)
    print(failed.value)
    assert not asked


def serving(target: Target, prompts: list[Prompt], draft: str | None) -> Serving:
    """How vLLM serves the target here, with the current draft or without one."""
    what = serving_of(target, prompts, Request(Path(), max_new_tokens=TOKENS))
    speculation = Speculation("eagle3", draft, 3) if draft else None
    return replace(what, port=free_port(), speculation=speculation)


def written(path: Path) -> dict[str, Answer]:
    """The whole lines of a file that is still being written."""
    text = path.read_text() if path.exists() else ""
    answers = map(Answer.from_line, text.rpartition("\n")[0].splitlines())
    return {answer.id: answer for answer in answers}


class Job(threading.Thread):
    """A regeneration next to the test, which meanwhile breaks the server."""

    def __init__(self, *arguments: Any):
        super().__init__(daemon=True)
        self.arguments, self.problem = arguments, None

    def run(self) -> None:
        try:
            regenerate(*self.arguments)
        except BaseException as problem:  # noqa: BLE001 - the test looks at it
            self.problem = problem
