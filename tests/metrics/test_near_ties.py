"""The audit in bf16: a correct decoder passes it, planted noise and faults within rounding do not."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from redraft.core.records import Lossless, Prompt
from redraft.decoding.logits_pipeline import LogitsPipeline
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling
from redraft.decoding.speculative import decode_speculative
from redraft.metrics.lossless import audit, compare
from redraft.models.kv_cache import RowCache
from redraft.models.target import Target
from tests.conftest import tiny_model
from tests.decoding.cheat import CheatingDraft

PROMPTS, LONGEST = 16, 24
CASES = (("llama", 49_152), ("gemma2", 97), ("granite", 1_000))
"""Logits close to each other in bf16, as those of a random model are: near-ties are everywhere."""


@dataclass
class Bench:
    target: Target
    prompts: list[Prompt]
    plain: list[list[int]]

    def compared(self, other: list[list[int]], target: Target | None = None) -> Lossless:
        """Also by another target, as one that rounds as this one does."""
        rounding = None if target is None else self.target.dtype
        target = target or self.target
        found = compare(target, self.prompts, self.plain, other, rounding=rounding)
        print(found)
        return found

    @functools.cached_property
    def eight_at_a_time(self) -> list[list[int]]:
        return self.speculated(8)

    def speculated(self, batch: int, noise: float = 0.3) -> list[list[int]]:
        draft = CheatingDraft(self.target, noise)
        rows = [list(prompt.tokens) for prompt in self.prompts]
        return [
            decoded.tokens
            for begin in range(0, len(rows), batch)
            for decoded in decode_speculative(
                self.target, draft, rows[begin : begin + batch], 4, LONGEST
            )
        ]


@pytest.fixture(scope="module", params=CASES, ids=[f"{f}-{v}" for f, v in CASES])
def bench(request: pytest.FixtureRequest) -> Bench:
    family, vocab = request.param
    model = tiny_model(family, torch.bfloat16, vocab=vocab, gain=1.0)
    target = Target(model, None, (family,))
    draw = torch.Generator().manual_seed(5)
    prompts = [
        Prompt(str(i), tuple(torch.randint(2, vocab, (5 + i % 9,), generator=draw).tolist()))
        for i in range(PROMPTS)
    ]
    return Bench(target, prompts, [decode_plain(target, p.tokens, LONGEST) for p in prompts])


class Noisy:
    """Gaussian noise on the logits, as a wrong mask or a stale cache row would bring it."""

    prefix_pure = True

    def __init__(self, size: float):
        self.size, self.generator = size, torch.Generator().manual_seed(0)

    def __call__(self, _: Tensor, logits: Tensor) -> Tensor:
        noise = torch.randn(logits.shape, generator=self.generator)
        return logits + (self.size * noise).to(logits.dtype)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_correct_decoder_holds(bench: Bench, batch: int) -> None:
    assert bench.compared(bench.speculated(1) if batch == 1 else bench.eight_at_a_time).holds


@pytest.mark.parametrize("size", [0.1, 0.2])
def test_planted_noise_is_found(bench: Bench, size: float) -> None:
    logits_pipeline = LogitsPipeline(Sampling(), [Noisy(size)])
    other = [
        decode_plain(bench.target, p.tokens, LONGEST, logits_pipeline=logits_pipeline)
        for p in bench.prompts
    ]
    assert not bench.compared(other).holds


def test_passes_that_round_more_than_the_target_that_judges_them(bench: Bench) -> None:
    """As those of an engine with quantised weights do, which redraft reads in float32."""
    exact = Target(copy.deepcopy(bench.target.model).float(), None, ["exact"])
    other = bench.eight_at_a_time
    unaware = compare(exact, bench.prompts, bench.plain, other)
    assert unaware.different or other == bench.plain
    assert bench.compared(other, exact).holds
    logits_pipeline = LogitsPipeline(Sampling(), [Noisy(0.3)])
    noisy = [
        decode_plain(bench.target, p.tokens, LONGEST, logits_pipeline=logits_pipeline)
        for p in bench.prompts
    ]
    assert not bench.compared(noisy, exact).holds


def test_a_stale_cache_row_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    if bench.target.vocab_size > 97:
        pytest.skip("the smallest vocabulary shows it")
    monkeypatch.setattr(RowCache, "roll_back", lambda self, tokens: None)
    assert not bench.compared(bench.speculated(1, noise=1.0)).holds


def test_the_second_most_likely_token_is_found(bench: Bench) -> None:
    """One token in one answer, wherever the two are farther apart than plain decoding ever errs."""
    row = max(range(PROMPTS), key=lambda i: len(bench.plain[i]))
    prompt, answer = bench.prompts[row], bench.plain[row]
    tokens = torch.tensor([[*prompt.tokens, *answer]])
    logits_TV = bench.target.read(tokens, ()).logits_BTV[0, len(prompt.tokens) - 1 : -1].float()
    top, second = logits_TV.topk(2, -1).values.unbind(-1)
    at = int((top - second).argmax())
    wrong = [*answer[:at], int(logits_TV[at].topk(2).indices[1]), *answer[at + 1 :]]
    other = [wrong if i == row else answer for i, answer in enumerate(bench.plain)]
    found = bench.compared(other)
    assert (found.different, found.holds) == (1, False)


def test_plain_decoding_holds_against_itself(bench: Bench) -> None:
    found = [audit(bench.target, p, a) for p, a in zip(bench.prompts, bench.plain, strict=True)]
    assert all(a.tokens == len(p) for a, p in zip(found, bench.plain, strict=True))
    assert all(margin < 32 for a in found for margin in a.margins)


def test_chance_explains_few_near_ties_and_not_many() -> None:
    few = Lossless(64, 60, 4, ties=3, tokens=500, own_ties=2, own_tokens=500)
    many = Lossless(64, 30, 34, ties=60, tokens=4000, own_ties=25, own_tokens=4000)
    longer = Lossless(64, 30, 34, ties=60, tokens=8000, own_ties=25, own_tokens=4000)
    assert (few.holds, many.holds, longer.holds) == (True, False, True)
    assert "60 in 4,000 tokens where plain decoding has 25" in many.problem()
    assert not Lossless(200, 3, 197).holds  # excused by nobody's audit
    assert Lossless(3, 3, 0).problem() == ""
