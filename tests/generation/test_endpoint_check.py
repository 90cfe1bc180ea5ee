"""What an endpoint serves is the target, or is not asked; what cannot be found out is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.generation import endpoint_check
from redraft.generation.answer_file import endpoints_of, read_answers
from redraft.generation.regenerate import regenerate
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import TEMPLATE, make_tokenizer
from tests.generation.conftest import own, settings
from tests.generation.fake_openai import Brain, FakeOpenAI, Key, Wrong


def ask(
    server: FakeOpenAI, target: Target, prompts: list[Prompt], path: Path, **changes: Any
) -> Any:
    with server.running():
        return regenerate(target, prompts, path, settings(server, **changes))


def test_other_weights(
    target: Target, prompts: list[Prompt], other: Target, tmp_path: Path
) -> None:
    server = FakeOpenAI(Brain(other))
    with pytest.raises(UserError) as failed:
        ask(server, target, prompts, tmp_path / "a.jsonl")
    text = str(failed.value)
    assert text.startswith(f"{server.url}: its model 'tiny' is not the target {target.name}: on ")
    assert "its log-probabilities differ from the target's by" in text
    assert "rounding explains 0.1 at most" in text
    assert not server.asked
    assert not (tmp_path / "a.jsonl").exists()


def test_other_weights_are_seen_by_their_words_alone(
    target: Target, prompts: list[Prompt], other: Target, tmp_path: Path
) -> None:
    server = FakeOpenAI(Brain(other), logprobs=False)
    with pytest.raises(UserError, match="the target finds other tokens more likely, by"):
        ask(server, target, prompts, tmp_path / "a.jsonl")


def test_without_the_comparison_other_weights_would_answer(
    target: Target,
    prompts: list[Prompt],
    other: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it is the comparison that catches them, and nothing else."""
    monkeypatch.setattr(endpoint_check, "SAME", float("inf"))
    found = ask(FakeOpenAI(Brain(other)), target, prompts, tmp_path / "a.jsonl")
    assert {a.id: a for a in found} != own(target, prompts, tmp_path)


def test_a_server_that_gives_no_numbers_is_not_the_target(
    target: Target, prompts: list[Prompt], tmp_path: Path
) -> None:
    brain = Brain(target)
    tokens, _ = brain.answer(prompts[0].tokens)
    brain._known[prompts[0].tokens] = (tokens, [float("nan")] * len(tokens))
    with pytest.raises(UserError, match="differ from the target's by nan nats"):
        ask(FakeOpenAI(brain), target, prompts, tmp_path / "a.jsonl")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_target_and_is_told(
    target: Target,
    target_folder: Path,
    prompts: list[Prompt],
    tmp_path: Path,
    dtype: str,
    told: Any,
) -> None:
    served = load_target(str(target_folder), dtype=dtype)
    found = ask(FakeOpenAI(Brain(served)), target, prompts, tmp_path / "a.jsonl")
    assert len(found) == len(prompts)
    (about,) = endpoints_of(tmp_path / "a.jsonl").values()
    assert 0 < about["logprob_difference"] < endpoint_check.SAME
    if about["logprob_difference"] > endpoint_check.EXACT:
        assert any("computes in less than the target's float32" in line for line in told)


def test_another_template(target: Target, prompts: list[Prompt], tmp_path: Path) -> None:
    renderer = Target(target.model, make_tokenizer(TEMPLATE + "x"), target.sources)
    server = FakeOpenAI(Brain(target), renderer=renderer)
    with pytest.raises(UserError) as failed:
        ask(server, target, prompts, tmp_path / "a.jsonl")
    text = str(failed.value)
    assert text.startswith(f"{server.url} renders a conversation otherwise than {target.name}: ")
    assert "its tokenizer or chat template is another" in text
    assert "--chat-template" in text
    assert not server.asked


def test_another_vocabulary(target: Target, prompts: list[Prompt], tmp_path: Path) -> None:
    class Larger(Brain):
        def answer(self, prompt: Key) -> tuple[list[int], list[float]]:
            return [70000, 3], [-0.1, -0.1]

    with pytest.raises(UserError, match=r"the target's vocabulary of \d+ lacks: it serves another"):
        ask(FakeOpenAI(Larger(target)), target, prompts, tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"models": []}, {}, r"serves 0 models \(none\)"),
        ({"models": ["a", "b"]}, {}, r"serves 2 models \(a, b\); name the one .*--endpoint-model"),
        (
            {"models": ["tiny-sft"]},
            {"endpoint_model": "tiny-stf"},
            r"does not serve --endpoint-model tiny-stf; did you mean 'tiny-sft'\?",
        ),
        (
            {"takes_ids": False},
            {},
            r"does not complete a prompt of token ids at /v1/completions \(HTTP 422: prompt: Input",
        ),
        (
            {"context": 18},
            {},
            r"serves a context of 18 tokens, which \d+ of 24 prompts fill .*--max-model-len \d+",
        ),
        ({"context": 8}, {}, r"serves a context of 8 tokens, and no prompt is that short"),
    ],
)
def test_servers_that_cannot_be_used(
    target: Target,
    prompts: list[Prompt],
    brain: Brain,
    tmp_path: Path,
    options: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    server = FakeOpenAI(brain, **options)
    with pytest.raises(UserError, match=message):
        ask(server, target, prompts, tmp_path / "a.jsonl", **changes)
    assert not server.asked


def test_the_named_one_of_several_models_is_asked(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    server = FakeOpenAI(brain, models=["base", "tuned"])
    ask(server, target, prompts, tmp_path / "a.jsonl", endpoint_model="tuned")
    assert {body["model"] for body in server.bodies} == {"tuned"}


def test_what_cannot_be_checked_is_reported(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, told: list[str]
) -> None:
    server = FakeOpenAI(brain, tokenize=False, logprobs=False)
    ask(server, target, prompts, tmp_path / "a.jsonl")
    assert f"{server.url}: 'tiny' is the target (" in told[0]
    assert " tokens agree)" in told[0]
    skipped = [line for line in told if "not checked" in line]
    assert len(skipped) == 2
    assert "tokenizer and chat template (/tokenize: HTTP 404: Not Found)" in skipped[0]
    assert "log-probabilities (it returns none; the tokens were compared)" in skipped[1]


def test_text_is_tokenised_again_and_told(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, told: list[str]
) -> None:
    """Random models write bytes that are no text, so here most answers do not survive it."""
    server = FakeOpenAI(brain, ids=False)
    found = ask(server, target, prompts, tmp_path / "a.jsonl")
    assert len(found) == len(prompts)
    expected = own(target, prompts, tmp_path)
    assert any("returns no token ids; its text is tokenised again" in line for line in told)
    (counted,) = [line for line in told if "came as text" in line]
    differ = sum(a.tokens != expected[a.id].tokens for a in found)
    assert counted.startswith(f"NOTE: {len(prompts)} answers came as text and were tokenised again")
    assert differ > 0
    doubtful = int(counted.split("for ")[1].split(" of them")[0])
    assert doubtful >= differ
    (about,) = endpoints_of(tmp_path / "a.jsonl").values()
    assert about["token_ids"] == "from its text"


def test_answers_that_the_server_cuts_are_told(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path, told: list[str]
) -> None:
    longest = max(len(p.tokens) for p in prompts)
    server = FakeOpenAI(brain, context=longest + 10)
    found = ask(server, target, prompts, tmp_path / "a.jsonl")
    assert any("answers may be cut short" in line for line in told)
    assert any("answers were cut shorter by the server" in line for line in told)
    assert all(body["max_tokens"] <= longest + 10 - len(body["prompt"]) for body in server.bodies)
    expected = own(target, prompts, tmp_path)
    assert all(expected[a.id].tokens[: a.length] == a.tokens for a in found)
    assert read_answers(tmp_path / "a.jsonl") == found


def test_a_check_that_fails_is_made_again(
    target: Target, prompts: list[Prompt], brain: Brain, tmp_path: Path
) -> None:
    server = FakeOpenAI(brain, wrong_probe=lambda n: Wrong(502) if n < 3 else None)
    found = ask(server, target, prompts, tmp_path / "a.jsonl")
    assert len(found) == len(prompts)
    assert server.checks == 3
