"""Batches are bounded by rows and by tokens, wherever this process generates answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.config import RegenerateConfig
from redraft.core.records import Prompt
from redraft.decoding import batched
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.batched import plan_generation, plan_live
from redraft.decoding.sampling import Sampling
from redraft.drafts.base import Draft
from redraft.metrics import live as live_module
from redraft.metrics.live import live
from redraft.metrics.measure import answer_all, measure
from redraft.metrics.safety import with_draft
from redraft.models.target import Target

NEW, LOOKAHEAD = 8, 3


@given(
    st.lists(st.integers(0, 300), max_size=60),
    st.integers(1, 20),
    st.integers(1, 2000),
    st.integers(0, 200),
)
def test_each_batch_is_within_both_bounds_and_each_prompt_in_one(
    lengths: list[int], rows: int, tokens: int, new: int
) -> None:
    prompts = [Prompt(str(i), range(length)) for i, length in enumerate(lengths)]
    for plan, in_order in ((plan_generation, False), (plan_live, True)):
        found = plan(prompts, rows, tokens, new)
        flat = [i for batch in found for i in batch]
        assert sorted(flat) == list(range(len(prompts)))
        for batch in found:
            assert 0 < len(batch) <= rows
            longest = max(lengths[i] for i in batch) + new
            assert len(batch) == 1 or len(batch) * longest <= tokens
        for batch, following in zip(found, found[1:], strict=False):  # no batch is cut needlessly
            joined = max(lengths[i] for i in (*batch, following[0])) + new
            assert len(batch) == rows or (len(batch) + 1) * joined > tokens
        assert flat == sorted(flat, key=(lambda i: i) if in_order else (lambda i: (lengths[i], i)))


def test_long_prompts_are_not_read_in_one_pass() -> None:
    """At the defaults: 64 rows of a usual length, and 3 of 8,000 tokens."""
    c = RegenerateConfig()
    for length, rows in ((256, 64), (8000, 3), (100_000, 1)):
        prompts = [Prompt(str(i), range(length)) for i in range(64)]
        plan = plan_generation(prompts, c.batch_size, c.batch_tokens, c.max_new_tokens)
        assert max(map(len, plan)) == rows


def widest(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows and the longest prompt of each batch that is decoded."""
    seen: list[tuple[int, int]] = []

    def watched(true: Any, at: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            rows: Sequence[Any] = args[at]
            seen.append((len(rows), max(len(getattr(row, "tokens", row)) for row in rows)))
            return true(*args, **kwargs)

        return call

    monkeypatch.setattr(batched, "_decode", watched(batched._decode, 1))
    decode = live_module.decode_speculative
    monkeypatch.setattr(live_module, "decode_speculative", watched(decode, 2))
    return seen


def test_all_that_generates_answers_keeps_to_the_bound(
    target: Target, trained_draft: Draft, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = prompts[:9]
    longest = max(len(prompt.tokens) for prompt in some)
    bound = 3 * (longest + NEW + LOOKAHEAD)
    sampling, k = Sampling(0.7), LOOKAHEAD
    together = answer_all(target, some, NEW, k, sampling, 1)
    seen = widest(monkeypatch)
    warm = Decoding("seeded", sampling)
    apart = answer_all(target, some, NEW, k, sampling, 1, batch_tokens=bound)
    lived = live(
        *(target, trained_draft, some, k, NEW),
        decoding=warm,
        seed=1,
        batch_size=9,
        batch_tokens=bound,
    )[1]
    measure(target, trained_draft, some, k=k, max_new_tokens=NEW, batch_tokens=bound)
    safe = [
        answer
        for batch in with_draft(
            *(target, trained_draft, some, "seeded"),
            k=k,
            max_new_tokens=NEW,
            temperature=0.7,
            seed=1,
            batch_size=9,
            batch_tokens=bound,
        )
        for answer in batch
    ]
    assert apart == together
    assert [a.answer for a in lived] == [a.answer for a in safe] == [a.answer for a in together]
    assert 1 < max(rows for rows, _ in seen) < 9
    assert all(rows == 1 or rows * (length + NEW + k) <= bound for rows, length in seen)


def test_the_default_bound_is_that_of_the_settings() -> None:
    for function in (answer_all, measure, live):
        default = inspect.signature(function).parameters["batch_tokens"].default
        assert default == RegenerateConfig().batch_tokens == 32_768
