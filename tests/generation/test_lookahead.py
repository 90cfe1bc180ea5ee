"""Lookahead tokens from endpoints: those of this process, or a sentence that says why there are none."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from redraft.config import RegenerateConfig, resolve
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.generation import endpoint_check
from redraft.generation.regenerate import read_answers, regenerate
from redraft.metrics.replay import check_lookahead
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from tests.conftest import write_prompts
from tests.generation.conftest import TOKENS, settings
from tests.generation.fake_openai import Brain, FakeOpenAI, Wrong

AHEAD = 3


@pytest.fixture(scope="session")
def prompts(prompts: list[Prompt]) -> list[Prompt]:
    return prompts[:12]


@pytest.fixture
def stopping(target: Target, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> Brain:
    """What the target answers with so many stop tokens that a random model ends its answers."""
    monkeypatch.setattr(
        Target, "stop_ids", property(lambda self: tuple(range(2, self.vocab_size, 3)))
    )
    return Brain(target, TOKENS)


def here(target: Target, prompts: list[Prompt], path: Path, **changes: Any) -> dict[str, Answer]:
    config = RegenerateConfig(**{"max_new_tokens": TOKENS, **changes})
    return {a.id: a for a in regenerate(target, prompts, path, config, AHEAD)}


def test_they_are_those_of_this_process(
    target: Target, prompts: list[Prompt], stopping: Brain, tmp_path: Path
) -> None:
    expected = here(target, prompts, tmp_path / "own.jsonl")
    with FakeOpenAI(stopping).running() as server:
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server), AHEAD)
    assert {a.id: a for a in found} == expected
    assert {a.finish for a in found} == {"stop", "length"}
    check_lookahead(found, AHEAD + 1)
    past = [a.tokens[a.length :] for a in found if a.finish == "stop"]
    assert any(t in target.stop_ids for tokens in past for t in tokens), "nothing was gone past"
    assert set(server.asked.values()) == {1}
    (body,) = [b for b in server.ahead if b["prompt"] == [*found[0].prompt, *found[0].answer]]
    assert (body["ignore_eos"], body["stop_token_ids"], body["max_tokens"]) == (True, [], AHEAD)


def test_a_file_begun_here_is_continued_there(
    target: Target, prompts: list[Prompt], stopping: Brain, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    expected = here(target, prompts, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    with FakeOpenAI(stopping).running() as server:
        found = regenerate(target, prompts, path, settings(server), AHEAD)
    assert {a.id: a for a in found} == expected
    assert len(server.asked) == len(prompts) - 5


def test_sampled_ones_have_a_seed_of_their_own(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"temperature": 0.7, "top_k": 5}
    with FakeOpenAI(brain).running() as server:
        regenerate(target, prompts, tmp_path / "a.jsonl", settings(server, **config), AHEAD)
        first = [body["seed"] for body in server.ahead if "seed" in body]
        answers = [body["seed"] for body in server.bodies]
        server.ahead.clear()
        regenerate(target, prompts, tmp_path / "b.jsonl", settings(server, **config), AHEAD)
    assert len(set(first) | set(answers)) == 2 * len(prompts)
    assert sorted(first) == sorted(body["seed"] for body in server.ahead if "seed" in body)
    assert all(
        (body["top_k"], body["min_p"]) == (5, 0.0) for body in server.ahead if "seed" in body
    )


def test_they_fit_the_context(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, told: list[str]
) -> None:
    longest = max(len(p.tokens) for p in prompts)
    with FakeOpenAI(brain, context=longest + 10).running() as server:
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server), AHEAD)
    assert max(len(a.prompt) + len(a.tokens) for a in found) == longest + 10
    check_lookahead(found, AHEAD + 1)
    assert any("answers may be cut short" in line for line in told)
    with FakeOpenAI(brain, context=longest + AHEAD).running() as server:
        with pytest.raises(UserError, match=f"context of {longest + AHEAD} tokens, which .* fill"):
            regenerate(target, prompts, tmp_path / "b.jsonl", settings(server), AHEAD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": False}, "returns no token ids, and lookahead tokens .* leave out --endpoint"),
        (
            {"eos": "heeded"},
            r"stopped after \d+ of 32 tokens although asked to go on \(ignore_eos\)",
        ),
        (
            {"eos": "forbidden"},
            r"asked to ignore stop tokens .* another more likely by 0\.\d nats; it may forbid",
        ),
    ],
    ids=["text", "heeded", "forbidden"],
)
def test_servers_that_cannot(
    target: Target,
    prompts: list[Prompt],
    stopping: Brain,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint_check, "FORBIDDEN", 0.05)  # random models have no firm opinions
    server = FakeOpenAI(stopping, **options)
    with server.running():
        with pytest.raises(UserError, match=message) as failed:
            regenerate(target, prompts, tmp_path / "a.jsonl", settings(server), AHEAD)
        assert str(failed.value).startswith(server.url)
        assert not server.asked, "answers were paid for"
        regenerate(target, prompts, tmp_path / "b.jsonl", settings(server))


def test_a_server_that_stops_later_ends_the_run_and_keeps_the_answers(
    target: Target, prompts: list[Prompt], stopping: Brain, tmp_path: Path
) -> None:
    """The check saw no stop token, so only an answer shows that the server heeds them."""
    server = FakeOpenAI(stopping)

    def turn(number: int, body: dict[str, Any]) -> Wrong | None:
        server.eos = "heeded" if number > 4 else "ignored"
        return None

    server.wrong = turn
    with server.running(), pytest.raises(UserError, match=r"stopped after \d of 3 tokens"):
        regenerate(target, prompts, tmp_path / "a.jsonl", settings(server, concurrency=1), AHEAD)
    kept = read_answers(tmp_path / "a.jsonl")
    assert 4 <= len(kept) < len(prompts)
    check_lookahead(kept, AHEAD + 1)


def test_a_failure_between_the_two_requests_costs_no_answer(
    target: Target, prompts: list[Prompt], stopping: Brain, tmp_path: Path
) -> None:
    expected = here(target, prompts, tmp_path / "own.jsonl")
    count = itertools.count()
    real = stopping.go_on

    def short(tokens: list[int], count_: int, banned: list[int]) -> list[int]:
        found = real(tokens, count_, banned)
        return found[:-1] if count_ == AHEAD and next(count) % 4 == 0 else found

    stopping.go_on = short  # type: ignore[method-assign]
    with FakeOpenAI(stopping).running() as server:
        found = regenerate(target, prompts, tmp_path / "a.jsonl", settings(server), AHEAD)
    assert {a.id: a for a in found} == expected


@pytest.mark.slow
def test_adapt_measures_on_answers_of_the_endpoints_where_asked_to(
    target: Target, draft_folder: Path, brain: Brain, tmp_path: Path
) -> None:
    source, run = write_prompts(tmp_path / "p.jsonl", 24), tmp_path / "run"
    changes: dict[str, Any] = {
        "regenerate.max_new_tokens": 12,
        "train.width": 4,
        "train.epochs": 0.2,
        "train.rollout": 2,
        "train.evaluations": 1,
        "general.guard": "off",
        "measure.k": 2,
        "measure.eval_limit": 4,
        "measure.heldout": 4,
        "measure.eval_new_tokens": 10,
    }
    with FakeOpenAI(brain).running() as server:
        there = {"measure.answers": "endpoints", "regenerate.endpoints": server.url}
        config = resolve([("test", {**changes, **there})])
        other = {"other": str(write_prompts(tmp_path / "o.jsonl", 4, 50))}
        found = pipeline.adapt(
            target, str(draft_folder), str(source), out=run, config=config, off_domain=other
        )
    names = ("adapt", "heldout", "eval", "off-other")
    files = {name: read_answers(run / "answers" / f"{name}.jsonl") for name in names}
    assert set(server.asked) == {a.prompt for answers in files.values() for a in answers}
    mine = pipeline.adapt(
        *(target, str(draft_folder), str(source)),
        out=tmp_path / "mine",
        config=resolve([("test", changes)]),
        off_domain=other,
    )
    assert found.before.tau == mine.before.tau
    with pytest.raises(UserError, match="measure.answers=endpoints needs a server"):
        alone = resolve([("test", {"measure.answers": "endpoints"})])
        pipeline.adapt(target, str(draft_folder), str(source), out=tmp_path / "no", config=alone)
