"""Answers that are the target's own, and answers that are not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from redraft.config import resolve
from redraft.core import console
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.decoding.sampling import Sampling
from redraft.generation import on_policy as module
from redraft.generation.on_policy import OnPolicy, check_on_policy, cost
from redraft.metrics.measure import answer_all
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.prompts.prompts import read_prompts


@pytest.fixture(scope="module")
def sampled(target: Target, prompts: list[Prompt]) -> list[Answer]:
    return answer_all(target, prompts, 32, 0, Sampling(1.0))


def strangers(answers: list[Answer]) -> list[Answer]:
    """Uniform tokens in place of the answers'."""
    generator = torch.Generator().manual_seed(0)
    return [
        dataclasses.replace(
            a, tokens=tuple(torch.randint(5, 250, (a.length,), generator=generator).tolist())
        )
        for a in answers
    ]


def test_it_is_cost_and_entropy(target: Target, sampled: list[Answer]) -> None:
    found = cost(target, sampled[:2])
    spent = entropy = 0.0
    for answer in sampled[:2]:
        ids = torch.tensor([[*answer.prompt, *answer.answer]])
        log_p = target.model(input_ids=ids).logits[0].double().log_softmax(-1)
        for at in range(len(answer.prompt), ids.shape[1]):
            row = log_p[at - 1].tolist()
            spent -= row[ids[0, at]]
            entropy -= sum(math.exp(x) * x for x in row)
    assert found.tokens == sum(a.length for a in sampled[:2])
    assert found.nll == pytest.approx(spent / found.tokens, rel=1e-4)
    assert found.entropy == pytest.approx(entropy / found.tokens, rel=1e-4)
    assert found.entropy != pytest.approx(found.nll, rel=1e-4)


def test_answers_of_a_calibrated_stranger_are_noticed(
    target: Target, sampled: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text along which the target is as unsure as the text is unlikely: its entropy would not tell."""
    unsure = cost(target, sampled)
    monkeypatch.setattr(
        module,
        "cost",
        lambda target, answers: dataclasses.replace(
            unsure, nll=3.1 if answers[0] is sampled[0] else 2.0, entropy=3.3, error=0.02
        ),
    )
    found = check_on_policy(target, sampled)
    assert not found.own
    assert (found.nll, found.expected) == (3.1, 2.0)


def test_own_answers_pass_and_others_are_noticed(
    target: Target, answers: list[Answer], sampled: list[Answer]
) -> None:
    greedy = check_on_policy(target, answers)
    assert greedy.own
    assert greedy.agreement == 1
    assert greedy.nll < greedy.expected
    own = check_on_policy(target, sampled)
    assert own.own
    assert abs(own.nll - own.expected) < 4 * own.error
    foreign = check_on_policy(target, strangers(sampled))
    assert not foreign.own
    assert foreign.nll > foreign.expected + 5 * foreign.error
    assert foreign.describe().startswith("warning: the answers' tokens cost the target")
    assert "leave --answers out" in foreign.describe()
    assert "warning" not in own.describe()


def test_a_small_excess_or_an_uncertain_one_is_no_warning() -> None:
    assert OnPolicy(64, 1000, 1.05, 1.0, 0.001, 0.5).own
    assert OnPolicy(4, 40, 1.5, 1.0, 0.2, 0.5).own
    assert not OnPolicy(64, 1000, 1.5, 1.0, 0.1, 0.5).own


def test_given_answers_are_trained_on_as_they_are(
    target: Target,
    draft_folder: Path,
    sampled: list[Answer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs = tmp_path / "logs.jsonl"
    foreign = [dataclasses.replace(a, id=f"l{i}") for i, a in enumerate(strangers(sampled))]
    logs.write_text("".join(a.to_line() + "\n" for a in foreign))
    read = read_prompts(str(logs), target).prompts
    assert [(p.tokens, p.reference) for p in read] == [(a.prompt, a.answer) for a in foreign]
    settings = {
        "general.guard": "off",
        "train.epochs": 1.0,
        "measure.eval_limit": 6,
        "measure.heldout": 6,
        "measure.eval_new_tokens": 16,
    }
    console.set_quiet(False)
    try:
        result = pipeline.adapt(
            target,
            str(draft_folder),
            answers=str(logs),
            out=tmp_path / "run",
            config=resolve([("test", settings)]),
        )
    finally:
        console.set_quiet(True)
    said = " ".join(capsys.readouterr().err.split())
    assert "They are not this target's own" in said
    assert result.report.prompts["given_answers"]["answers"] == 12
    assert result.report.origins["regenerate.answers"] == "--answers"
    lines = (tmp_path / "run" / "answers" / "adapt.jsonl").read_text().splitlines()
    given = {a.id: list(a.answer) for a in foreign}
    assert all(json.loads(line)["tokens"] == given[json.loads(line)["id"]] for line in lines)
    assert result.report.cost["unique_generated_tokens"] < sum(a.length for a in foreign)
    with pytest.raises(
        UserError, match="name either prompts, which the target answers, or answers"
    ):
        pipeline.adapt(target, str(draft_folder), out=tmp_path / "other")
