"""The EAGLE-3 network against an independent implementation, and against itself step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from redraft.drafts import layers
from redraft.drafts.base import Draft
from redraft.drafts.eagle3 import Eagle3Config, Eagle3Draft, shape_for
from redraft.errors import UserError
from redraft.target import Target
from tests.conftest import fresh_draft, in_double
from tests.oracles.eagle3_plain import PlainEagle3, chain_logits

STEPS = 5
TOLERANCE = 1e-10
ORACLE_TOLERANCE = 1e-7  # rotary frequencies are float32 in checkpoints' own convention


@pytest.fixture(scope="module")
def target64(target_folder: Path) -> Target:
    return in_double(target_folder)


def read(target: Target, draft: Draft, length: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(5, 200, (2, length), generator=torch.Generator().manual_seed(1))
    return tokens, target.read(tokens, draft.taps).features_BTF


def oracle(draft: Eagle3Draft) -> PlainEagle3:
    c = draft.config
    assert draft.shared_embedding is not None
    return PlainEagle3(
        dict(draft.state_dict()),
        draft.shared_embedding,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.rms_norm_eps,
        c.rope_parameters["rope_theta"],
    )


def worst_difference(target: Target, draft: Eagle3Draft, first: int) -> float:
    tokens, features = read(target, draft)
    plain = oracle(draft)
    worst = 0.0
    with torch.no_grad():
        rolled = [draft.logits(s) for s in draft.rollout(tokens, features, first, STEPS)]
        for row in range(2):
            for start in range(first, tokens.shape[1] - 2 - STEPS):
                chain = chain_logits(plain, tokens[row].tolist(), features[row], start, STEPS)
                for step, expected in enumerate(chain):
                    got = rolled[step][row, start - first]
                    worst = max(worst, float((got - expected).abs().max()))
    return worst


@pytest.mark.parametrize("vocab", [None, 40])
@pytest.mark.parametrize("first", [0, 3])
def test_rollout_equals_independent_forward(
    target64: Target, vocab: int | None, first: int
) -> None:
    assert worst_difference(target64, fresh_draft(target64, vocab=vocab), first) < ORACLE_TOLERANCE


@pytest.mark.parametrize("mutant", ["position", "future", "diagonal"])
def test_the_oracle_catches_wrong_versions(
    target64: Target, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = fresh_draft(target64)
    chain = layers.chain_attention
    if mutant == "position":  # rotary positions of a chain that do not advance
        rotate = layers.rotate

        def stuck(x, cos, sin):  # type: ignore[no-untyped-def]
            return rotate(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin))

        monkeypatch.setattr("redraft.drafts.eagle3.rotate", stuck)
    elif mutant == "future":  # chains that see the true pair after their start
        monkeypatch.setattr(
            "redraft.drafts.eagle3.chain_attention",
            lambda q, k, v, ok, ov, first: chain(q, k, v, ok, ov, first + 1),
        )
    else:  # chains that forget their own earlier steps
        monkeypatch.setattr(
            "redraft.drafts.eagle3.chain_attention",
            lambda q, k, v, ok, ov, first: chain(q, k, v, ok[-1:], ov[-1:], first),
        )
    assert worst_difference(target64, draft, 1) > 1e-4


@pytest.mark.parametrize("vocab", [None, 40])
def test_rollout_equals_step_by_step_decoding(target64: Target, vocab: int | None) -> None:
    """Training sees exactly the logits that decoding computes, at every step of the rollout."""
    draft = fresh_draft(target64, vocab=vocab)
    tokens, features = read(target64, draft)
    with torch.no_grad():
        rolled = [draft.logits(s) for s in draft.rollout(tokens[:1], features[:1], 0, STEPS)]
        cache = draft.new_cache()
        for start in range(tokens.shape[1] - 2 - STEPS):
            pair = slice(start, start + 1)
            state = draft.absorb(cache, tokens[:1, start + 1 : start + 2], features[:1, pair])
            for step in range(STEPS):
                difference = (draft.logits(state)[0, 0] - rolled[step][0, start]).abs().max()
                assert difference < TOLERANCE, (start, step)
                token = tokens[:1, start + 2 + step : start + 3 + step]
                state = draft.advance(cache, token, state)


def test_a_bf16_draft_keeps_exact_rotary_angles(target: Target) -> None:
    """Engines compute the angles in float32 whatever the draft's dtype."""
    draft = fresh_draft(target)
    exact = draft.rotary(600, torch.zeros(1, dtype=torch.float64))
    cast = draft.to(torch.bfloat16).rotary(600, torch.zeros(1, dtype=torch.bfloat16))
    for a, b in zip(exact, cast, strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)
    rounded = draft.rotary.inv_freq.to(torch.bfloat16).double()
    angles = torch.outer(torch.arange(600), rounded)
    wrong = torch.cat([angles, angles], dim=-1).cos().to(torch.bfloat16)
    assert not torch.equal(cast[0], wrong)


def test_a_table_made_while_measuring_can_be_trained_with(target: Target) -> None:
    draft = fresh_draft(target).requires_grad_(True)
    tokens, features = read(target, draft)
    with torch.inference_mode():
        draft.rotary(4000, torch.zeros(1))
    loss = sum(draft.logits(s).sum() for s in draft.rollout(tokens, features, 1, 3))
    loss.backward()  # type: ignore[union-attr]
    assert draft.get_parameter("fc.weight").grad is not None


def test_absorbing_forgets_the_drafted_chain(target64: Target) -> None:
    draft = fresh_draft(target64)
    tokens, features = read(target64, draft)
    with torch.no_grad():
        whole = draft.absorb(draft.new_cache(), tokens[:1, 1:9], features[:1, :8])
        cache = draft.new_cache()
        state = draft.absorb(cache, tokens[:1, 1:6], features[:1, :5])
        draft.propose(cache, state, 4)
        pieced = draft.absorb(cache, tokens[:1, 6:9], features[:1, 5:8])
    assert float((whole - pieced).abs().max()) < TOLERANCE


def test_reduced_vocabulary_proposes_target_ids(target64: Target) -> None:
    draft = fresh_draft(target64, vocab=40)
    tokens, features = read(target64, draft)
    cache = draft.new_cache()
    state = draft.absorb(cache, tokens[:1, 1:6], features[:1, :5])
    assert draft.draft_vocab is not None
    assert set(draft.propose(cache, state, 4)) <= set(draft.draft_vocab.tolist())
    stored = draft.stored_state()
    assert torch.equal(stored["d2t"] + torch.arange(40), draft.draft_vocab)
    assert int(stored["t2d"].sum()) == 40


def test_default_taps_and_shape(target: Target) -> None:
    assert fresh_draft(target).taps == (2, 4, 5)
    shape = shape_for(target)
    assert shape.intermediate_size == 64
    assert shape.taps is None
    assert shape.feature_size == 96


def test_a_map_is_needed_exactly_when_the_vocabulary_is_reduced() -> None:
    shape = Eagle3Config(8, 8, 1, 1, 8, 50, 20, 24, None)
    with pytest.raises(UserError, match=r"20 under a target vocabulary of 50 needs a map"):
        Eagle3Draft(shape)


def test_binding_refuses_another_family(target: Target) -> None:
    draft = fresh_draft(target)
    other = Eagle3Draft(
        Eagle3Config(32, 24, 4, 2, 8, target.vocab_size, target.vocab_size, 90, None)
    )
    with pytest.raises(UserError, match="hidden sizes differ: 3 taps .* 96 wide"):
        other.bind(target)
    small = Eagle3Draft(Eagle3Config(32, 24, 4, 2, 8, 99, 99, 96, None))
    with pytest.raises(UserError, match="vocabularies differ"):
        small.bind(target)
    narrow = Eagle3Draft(
        Eagle3Config(16, 24, 2, 2, 8, target.vocab_size, target.vocab_size, 96, None)
    )
    with pytest.raises(UserError, match="no embed_tokens.weight"):
        narrow.bind(target)
    assert draft.shared_embedding is not None
    with pytest.raises(UserError, match="load it with its target"):
        Eagle3Draft(draft.config)._embed(torch.tensor([1]))
