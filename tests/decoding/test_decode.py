"""Losslessness, strict: at float64 speculative decoding is plain decoding, token for token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redraft.checkpoints.load import load_draft
from redraft.core.records import Prompt
from redraft.decoding.acceptance_rules import accept_chosen
from redraft.decoding.batched import generate_answers, plan_generation
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling, draw, probabilities
from redraft.decoding.speculative import decode_speculative
from redraft.drafts.base import Draft
from redraft.drafts.kinds import kind_names
from redraft.models.kv_cache import RowCache
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import FAMILIES, fresh_draft, in_double, make_tokenizer, save_target

LONGEST = 40


@pytest.fixture(scope="module", params=kind_names())
def pair64(
    request: pytest.FixtureRequest, target_folder: Path, kind_folder: Callable[[str], Path]
) -> tuple[Target, Draft]:
    target = in_double(target_folder)
    return target, load_draft(str(kind_folder(request.param)), target)


@pytest.fixture(scope="module")
def plain64(target_folder: Path, prompts: list[Prompt]) -> dict[Prompt, list[int]]:
    """The plain answers, which no draft changes, decoded once."""
    target = in_double(target_folder)
    return {prompt: decode_plain(target, prompt.tokens, LONGEST) for prompt in prompts}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
def test_acceptance_is_the_common_prefix(drafted: list[int], data: st.DataObject) -> None:
    chosen = data.draw(
        st.lists(st.integers(0, 3), min_size=len(drafted) + 1, max_size=len(drafted) + 1)
    )
    n = int(accept_chosen(torch.tensor([drafted]), torch.tensor([chosen])))
    assert drafted[:n] == chosen[:n]
    assert n == len(drafted) or drafted[n] != chosen[n]


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_speculative_equals_plain(
    pair64: tuple[Target, Draft], plain64: dict[Prompt, list[int]], k: int
) -> None:
    target, draft = pair64
    lengths = set()
    for prompt, plain in list(plain64.items())[:8]:
        [decoded] = decode_speculative(target, draft, [prompt.tokens], k, LONGEST)
        assert decoded.tokens == plain
        emitted = 1 + sum(n + 1 for n in decoded.accepted)
        assert emitted == len(decoded.tokens) + len(decoded.lookahead)
        lengths |= set(decoded.accepted)
    assert len(lengths) > 1, "the draft must be right sometimes and wrong sometimes"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_speculative_equals_plain_on_other_architectures(
    family: str, tmp_path: Path, prompts: list[Prompt]
) -> None:
    vocabulary = len(make_tokenizer())
    target = in_double(save_target(tmp_path, FAMILIES[family](vocabulary)))
    draft = fresh_draft(target)
    for prompt in prompts[:3]:
        plain = decode_plain(target, prompt.tokens, LONGEST)
        assert decode_speculative(target, draft, [prompt.tokens], 3, LONGEST)[0].tokens == plain


def test_batched_answers_equal_plain_ones(
    target_folder: Path, plain64: dict[Prompt, list[int]]
) -> None:
    target, prompts = in_double(target_folder), list(plain64)
    plain = {prompt.tokens: tokens for prompt, tokens in plain64.items()}
    plan = plan_generation(prompts, 8, 4096, LONGEST + 5)
    batches = generate_answers(
        target, prompts, plan, sampling=Sampling(), max_new_tokens=LONGEST, lookahead=5, seed=0
    )
    for answer in (a for batch in batches for a in batch):
        assert list(answer.answer) == plain[answer.prompt]
        assert (answer.finish == "stop") == (answer.answer[-1] in target.stop_ids)
        assert len(answer.tokens) == answer.length + 5


def test_stopped_rows_overrun_with_the_targets_own_tokens(
    pair64: tuple[Target, Draft], prompts: list[Prompt]
) -> None:
    """Pretend that a frequent token stops: answers end there, the lookahead goes on beyond it."""
    target, _ = pair64
    whole = decode_plain(target, prompts[0].tokens, LONGEST)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Target, "stop_ids", property(lambda self: (whole[3],)))
    try:
        plan = [[0, 1, 2]]
        batch = next(
            iter(
                generate_answers(
                    target,
                    prompts,
                    plan,
                    sampling=Sampling(),
                    max_new_tokens=20,
                    lookahead=4,
                    seed=0,
                )
            )
        )
    finally:
        monkey.undo()
    first = whole.index(whole[3])
    assert batch[0].length == first + 1
    assert batch[0].finish == "stop"
    assert list(batch[0].tokens) == whole[: first + 5]


def test_sampled_answers_do_not_depend_on_the_batch(target: Target, prompts: list[Prompt]) -> None:
    def run(batch_size: int, seed: int) -> dict[str, tuple[int, ...]]:
        batches = generate_answers(
            target,
            prompts[:9],
            plan_generation(prompts[:9], batch_size, 4096, 12),
            sampling=Sampling(0.8, top_k=20, top_p=0.9),
            max_new_tokens=12,
            lookahead=0,
            seed=seed,
        )
        return {a.id: a.tokens for batch in batches for a in batch}

    assert run(9, 1) == run(4, 1)
    assert run(9, 1) != run(9, 2)


def test_rolling_back_restores_the_cache(pair64: tuple[Target, Draft]) -> None:
    target, _ = pair64
    tokens = torch.randint(5, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    cache = RowCache(target, 1)
    cache.read(tokens[:, :20], ())
    cache.read(tokens[:, 5:12], ())
    cache.roll_back([7])
    continued = cache.read(tokens[:, 20:], ()).logits_BTV
    whole = target.read(tokens, ()).logits_BTV[:, 20:]
    assert float((continued - whole).abs().max()) < 1e-10


def test_probabilities_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]], dtype=torch.float64)
    p = np.exp(logits[0].numpy() / 0.5)
    p /= p.sum()
    assert np.allclose(probabilities(logits, Sampling(0.5))[0], p)
    assert probabilities(logits, Sampling(0.0)).tolist() == [[0, 1, 0, 0]]
    top2 = probabilities(logits, Sampling(1.0, top_k=2))[0]
    assert np.allclose(top2, [0, 0.5, 0, 0.5])
    # 0.43, 0.43, 0.16, ...: a nucleus of 0.5 needs two tokens, of 0.9 three.
    assert int((probabilities(logits, Sampling(1.0, top_p=0.5)) > 0).sum()) == 2
    assert int((probabilities(logits, Sampling(1.0, top_p=0.9)) > 0).sum()) == 3
    assert int((probabilities(logits, Sampling(1.0, top_p=0.0001)) > 0).sum()) == 1


def test_draws_follow_the_distribution_and_never_take_a_zero() -> None:
    p = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0]], dtype=torch.float64)
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.0) / 10_000
    tokens = draw(p.expand(10_000, -1), uniform)
    counts = torch.bincount(tokens, minlength=6) / 10_000
    assert torch.allclose(counts.double(), p[0], atol=1e-3)
    assert set(tokens.tolist()) == {1, 3, 4}


def test_generation_stays_inside_the_context(target_folder: Path, prompts: list[Prompt]) -> None:
    target = load_target(str(target_folder))
    target.max_positions = len(prompts[0].tokens) + 6
    batch = next(
        iter(
            generate_answers(
                target, prompts, [[0]], sampling=Sampling(), max_new_tokens=50, lookahead=3, seed=0
            )
        )
    )
    assert len(batch[0].tokens) == 6
    assert batch[0].length == 3  # the lookahead of 3 fits into the context too
