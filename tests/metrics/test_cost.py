"""What a step costs, and the K that follows: arithmetic by hand, timing on a machine that is faked."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.core.records import Prompt, StepCost
from redraft.metrics import cost as cost_module
from redraft.metrics.cost import auto_k, choose_k, measure_cost, speedup
from redraft.metrics.speed import drafted, forwards_timed, plain, race, transformers_generate
from redraft.models.target import Target
from tests.conftest import fresh_draft, in_double
from tests.decoding.cheat import CheatingDraft
from tests.models.test_loading import RECURRENT, save


def test_speedup_by_hand() -> None:
    cost = StepCost(0.010, 0.001, (0.0101, 0.011, 0.012, 0.013), rows=1, context=10, repeats=5)
    assert cost.c == pytest.approx(0.1)
    assert cost.v(2) == pytest.approx(1.2)
    rates = (0.8, 0.5, 0.25)
    tau = 1 + 0.8 + 0.8 * 0.5
    assert speedup(cost, rates, 2) == pytest.approx(tau / (2 * 0.1 + 1.2))
    choice = choose_k(cost, rates, 100)
    by_hand = [
        (1 + 0.8) / (0.1 + 1.1),
        (1 + 0.8 + 0.4) / (0.2 + 1.2),
        (1 + 0.8 + 0.4 + 0.1) / (0.3 + 1.3),
    ]
    assert choice.speedups == pytest.approx(by_hand)
    assert choice.k == 2


def test_a_dear_draft_shortens_the_chain_and_says_so() -> None:
    cheap = StepCost(0.010, 0.0001, (0.010,) * 9, 1, 10, 5)
    dear = StepCost(0.010, 0.0100, (0.010,) * 9, 1, 10, 5)
    rates = (0.5,) * 8
    assert choose_k(cheap, rates, 9).k > choose_k(dear, rates, 9).k == 1
    words = choose_k(dear, rates, 9).explain()
    assert words.startswith("K = 1: a draft step costs c = 1.00 of a target step")
    assert words.endswith("plain decoding is faster here")
    assert "plain decoding is faster" not in choose_k(cheap, rates, 9).explain()


def test_costs_are_those_of_the_clock(target_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only target tokens and draft steps move: 5 ms a pass, 1 a token, 2 a draft step."""
    target = in_double(target_folder)
    draft = CheatingDraft(target)
    clock = [0.0]
    read, step = Target.read, CheatingDraft.step

    def slow_read(self: Target, tokens: object, *args: object, **more: object) -> object:
        clock[0] += 0.005 + 0.001 * tokens.shape[1]  # type: ignore[attr-defined]
        return read(self, tokens, *args, **more)  # type: ignore[arg-type]

    def slow_step(self: CheatingDraft, *args: object) -> object:
        before = clock[0]
        found = step(self, *args)  # type: ignore[arg-type]
        clock[0] = before + 0.002
        return found

    monkeypatch.setattr(Target, "read", slow_read)
    monkeypatch.setattr(CheatingDraft, "step", slow_step)
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: clock[0])
    found = measure_cost(target, draft, [2, 30, 40], most=3, rows=2, repeats=3)
    assert found.target == pytest.approx(0.006)
    assert found.c == pytest.approx(0.002 / 0.006)
    assert [found.v(k) for k in range(4)] == pytest.approx([1, 7 / 6, 8 / 6, 9 / 6])


def test_auto_k_goes_by_this_draft(target_folder: Path) -> None:
    target = in_double(target_folder)
    prompts = [Prompt("a", (2, 50, 60)), Prompt("b", (2, 70))]
    good = auto_k(target, CheatingDraft(target, noise=0.0), prompts)
    assert good.steps > 0
    assert good.per_position[0] == 1.0
    bad = auto_k(target, CheatingDraft(target, noise=50.0), prompts)
    assert bad.per_position[0] < 0.2
    assert bad.k == 1


def test_auto_k_where_no_token_can_be_taken_back(tmp_path: Path) -> None:
    target = in_double(save(RECURRENT["lfm2"](), tmp_path))
    draft = fresh_draft(target, kind="mtp")
    found = auto_k(target, draft, [Prompt("a", (2, 50, 60)), Prompt("b", (2, 70))])
    assert found.steps > 0
    assert found.cost.verify[0] > 0


def test_contestants_give_the_same_answers(target_folder: Path) -> None:
    target = in_double(target_folder)
    draft = CheatingDraft(target)
    prompts = [Prompt(str(i), (2, *range(40, 44 + i))) for i in range(4)]
    contestants = {
        "plain": plain(target, 10),
        "generate": transformers_generate(target, 10),
        "lookup": transformers_generate(target, 10, prompt_lookup_num_tokens=2),
        "drafted": drafted(target, draft, 3, 10),
    }
    _, answers = race(contestants, [[prompt] for prompt in prompts], 1)
    assert all(found == answers["plain"] for found in answers.values())
    del contestants["lookup"]
    rates, together = race(contestants, [prompts], 2)
    assert all(found == answers["plain"] for found in together.values())
    assert rates["drafted"].prompts == 4
    assert rates["drafted"].low <= rates["drafted"].tokens_per_second <= rates["drafted"].high


def test_timed_forwards_are_restored(target_folder: Path) -> None:
    target = in_double(target_folder)
    draft = CheatingDraft(target)
    with forwards_timed(target, draft) as spent:
        drafted(target, draft, 2, 6)([Prompt("a", (2, 50))])
    assert len(spent) > 3
    assert min(spent) >= 0
    count = len(spent)
    drafted(target, draft, 2, 6)([Prompt("a", (2, 50))])
    assert len(spent) == count
    assert "read" not in vars(target)
