"""tau: by hand, and replay against the live loop, step for step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt, StepTrace
from redraft.drafts.base import Draft
from redraft.drafts.eagle3.network import Eagle3Draft
from redraft.metrics import intervals
from redraft.metrics import replay as replay_module
from redraft.metrics.acceptance import is_loop, per_position, prompt_counts, summarise
from redraft.metrics.live import live
from redraft.metrics.lossless import compare
from redraft.metrics.measure import measure
from redraft.metrics.replay import replay, walk
from redraft.models.target import Target
from tests.decoding.test_decode import pair64  # noqa: F401

LONGEST = 30


def trace(*accepted: int, name: str = "a") -> StepTrace:
    return StepTrace(name, accepted, sum(accepted) + len(accepted) + 1)


def test_tau_by_hand() -> None:
    traces = [trace(2, 0, 1, name="a"), trace(4, name="b"), StepTrace("c", (), 1)]
    answers = [Answer(t.id, (1,), tuple(range(9)), t.answer_length, "stop") for t in traces]
    found = summarise(traces, answers, k=4, mode="live", seconds=1.0)
    assert found.tau == 1 + 7 / 4  # sum over sum, not a mean of ratios
    assert (found.accepted, found.steps, found.prompts, found.excluded) == (7, 4, 2, 1)
    # Steps reach position 1: all 4, of which 3 accepted; position 2: 3, of which 2; ...
    assert found.per_position == (3 / 4, 2 / 3, 1 / 2, 1.0)
    product, expected = 1.0, 1.0
    for rate in found.per_position:
        product *= rate
        expected += product
    assert expected == pytest.approx(found.tau)


def test_conditional_acceptance_of_an_unreached_position_is_zero() -> None:
    assert per_position([trace(0, 0)], 3) == (0.0, 0.0, 0.0)


def test_no_step_anywhere_is_an_error() -> None:
    with pytest.raises(UserError, match="none of the 1 prompts has a verification step"):
        summarise([StepTrace("a", (), 1)], [], k=4, mode="live", seconds=0.0)


def test_the_interval_is_that_of_the_counts_and_narrows_with_prompts() -> None:
    few = [trace(i % 4, (i * 7) % 5) for i in range(12)]
    answers = [Answer(t.id, (1,), tuple(range(9)), t.answer_length, "stop") for t in few]
    found = summarise(few, answers, k=4, mode="live", seconds=1.0)
    low, high = found.ci
    assert low < found.tau < high
    assert found.ci == intervals.tau([[(sum(t.accepted), 2) for t in few]], 4).ends
    narrow = intervals.tau(prompt_counts(few * 16), 4)
    assert narrow.high - narrow.low < (high - low) / 2
    wide = summarise(few, answers, k=4, mode="live", seconds=1.0, level=0.98).ci
    assert wide[0] < low < high < wide[1]


def test_one_prompt_has_a_wide_interval() -> None:
    one = [trace(1, 1)]
    found = summarise(one, [Answer("a", (1,), (1,) * 5, 5, "stop")], k=4, mode="live", seconds=1.0)
    assert found.ci == pytest.approx((1.025, 4.925))


def test_loops() -> None:
    assert is_loop([1, 2, 3] * 20)
    assert is_loop([9] * 5 + [7] * 48)
    assert not is_loop([1, 2, 3] * 10)  # shorter than the window
    assert not is_loop(list(range(100)))
    assert not is_loop(list(range(13)) * 8)  # a longer period is prose, not a loop


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_replay_is_the_live_loop_step_for_step(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
    k: int,
) -> None:
    target, draft = pair64
    steps, answers = live(target, draft, prompts[:10], k, LONGEST)
    measured = measure(target, draft, prompts[:10], k=k, max_new_tokens=LONGEST)
    assert [a.answer for a in measured.answers] == [a.answer for a in answers]
    assert measured.traces == steps
    assert len({n for t in steps for n in t.accepted}) > 1


@pytest.mark.parametrize("mutant", ["shifted start", "no walk past a miss", "one step short"])
def test_wrong_replays_are_caught(
    pair64: tuple[Target, Draft],  # noqa: F811
    prompts: list[Prompt],
    mutant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, draft = pair64
    steps, _ = live(target, draft, prompts[:5], 4, LONGEST)
    answers = measure(target, draft, prompts[:5], k=4, max_new_tokens=LONGEST).answers
    chances = replay_module.chances
    if mutant == "shifted start":
        monkeypatch.setattr(replay_module, "chances", lambda *a: chances(*a).roll(1, dims=1))
    elif mutant == "no walk past a miss":
        monkeypatch.setattr(
            replay_module,
            "walk",
            lambda answer, row, first: StepTrace(
                answer.id,
                tuple(row[len(answer.prompt) - 1 - first :][: answer.length - 1]),
                answer.length,
            ),
        )
    else:
        monkeypatch.setattr(
            replay_module,
            "walk",
            lambda answer, row, first: walk(replace(answer, length=answer.length - 4), row, first),
        )
    assert [t.accepted for t in replay(target, draft, answers, 4)] != [t.accepted for t in steps]


def test_replay_needs_an_overrun(
    target: Target, trained_draft: Eagle3Draft, answers: list[Answer]
) -> None:
    short = [replace(a, tokens=a.answer) for a in answers[:2]]
    with pytest.raises(UserError, match="0 tokens past its end, replay at K=4 needs 3"):
        replay(target, trained_draft, short, 4)


def test_replay_does_not_depend_on_the_batch(
    target: Target, trained_draft: Eagle3Draft, answers: list[Answer]
) -> None:
    together = replay(target, trained_draft, answers, 4)
    apart = replay(target, trained_draft, answers, 4, batch_tokens=1)
    same = sum(a == b for a, b in zip(together, apart, strict=True))
    assert same >= len(answers) - 1  # float32: a near-tie may fall either way once


def test_the_last_step_is_counted_in_full() -> None:
    answer = Answer("a", (1, 2), (5, 6, 7, 8, 9, 10), 3, "stop")
    # Steps start at emitted = 1, where 4 tokens would be accepted although only 2 are left.
    assert walk(answer, [9, 4, 9, 9], 0).accepted == (4,)


def test_lossless_audits_differences(
    target: Target, prompts: list[Prompt], answers: list[Answer]
) -> None:
    plain = [list(a.answer) for a in answers[:3]]
    assert compare(target, prompts[:3], plain, plain).identical == 3
    broken = [list(row) for row in plain]
    broken[1][2] = (broken[1][2] + 1) % 200
    found = compare(target, prompts[:3], plain, broken)
    assert (found.identical, found.excused, found.holds) == (2, 0, False)
    early = compare(target, prompts[:1], plain[:1], [plain[0][:-1]])
    assert (early.excused, early.different, early.holds) == (0, 1, False)
