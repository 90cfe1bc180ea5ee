"""Every kind and variant of draft against an independent reading, and against itself step by step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.checkpoints.load import load_draft, stored
from redraft.core.errors import UserError
from redraft.drafts import chain_attention, layers
from redraft.drafts.base import Draft
from redraft.drafts.eagle.network import EagleDraft
from redraft.drafts.eagle3.network import Eagle3Draft
from redraft.drafts.new import new_draft
from redraft.drafts.stored.reference_reader import Reference
from redraft.models.target import Target
from tests.conftest import fresh_draft, in_double

VARIANTS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3, reduced vocabulary": {"vocab": 40},
    "norm before residual": {"norm_before_residual": True},
    "norm before fc": {"norm_before_fc": True},
    "a norm per aux layer": {"fc_norm": 3},
    "norm output": {"norm_output": True, "norm_before_residual": True},
    "attention biases": {"qkv_bias": True, "o_bias": True},
    "q and k norms": {"head_norms": True},
    "sliding window": {"sliding_window": 4},
    "sliding window shorter than the chain": {"sliding_window": 2},
    "scaled rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 100.0,
        }
    },
    "eagle": {"kind": "eagle"},
    "eagle with fc bias": {"kind": "eagle", "fc_bias": True},
    "eagle with q, k, v biases": {"kind": "eagle", "qkv_bias": True},
}
STEPS = 5
TOLERANCE = 1e-10
ORACLE_TOLERANCE = 1e-7  # rotary frequencies are float32 in checkpoints' own convention


@pytest.fixture(scope="module")
def target64(target_folder: Path) -> Target:
    return in_double(target_folder)


def read(target: Target, draft: Draft, length: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(5, 200, (2, length), generator=torch.Generator().manual_seed(1))
    return tokens, target.read(tokens, draft.aux_layers).features_BTF


def export(target: Target, draft: Draft, folder: Path) -> Path:
    """The draft as checkpoints of its kind store it."""
    form = "sglang-eagle" if draft.kind == "eagle" else "auto"
    speculators = draft.kind == "eagle3" and draft.config.norm_output
    stored(draft, target).save(folder, "speculators" if speculators else form)
    return folder


def worst_difference(target: Target, draft: Draft, first: int, folder: Path) -> float:
    tokens, features = read(target, draft)
    reference = Reference(folder, target.embedding_VH, target.head.weight)
    worst = 0.0
    with torch.no_grad():
        rolled = [draft.logits(s) for s in draft.rollout(tokens, features, first, STEPS)]
        for row in range(2):
            for start in range(first, tokens.shape[1] - 2 - STEPS):
                chain = reference.chain_logits(tokens[row].tolist(), features[row], start, STEPS)
                for step, expected in enumerate(chain):
                    got = rolled[step][row, start - first]
                    worst = max(worst, float((got - expected).abs().max()))
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_equals_independent_forward(target64: Target, variant: str, tmp_path: Path) -> None:
    """What is exported and read back computes what the trained network computes."""
    draft = fresh_draft(target64, **VARIANTS[variant])
    folder = export(target64, draft, tmp_path / "draft")
    assert worst_difference(target64, draft, 3, folder) < ORACLE_TOLERANCE
    back = load_draft(str(folder), target64)
    assert worst_difference(target64, back, 0, folder) < ORACLE_TOLERANCE


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ("norm before residual", {"norm_before_residual": False}),
        ("norm output", {"norm_output": False}),
        ("sliding window", {"sliding_window": 5}),
        ("scaled rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}),
    ],
)
def test_the_oracle_tells_variants_apart(
    target64: Target, variant: str, wrong: dict[str, Any], tmp_path: Path
) -> None:
    draft = fresh_draft(target64, **VARIANTS[variant])
    folder = export(target64, draft, tmp_path / "draft")
    other = Eagle3Draft(dataclasses.replace(draft.config, **wrong)).to(torch.float64)
    other.load_state_dict(draft.state_dict())
    other.bind(target64)
    assert worst_difference(target64, other, 0, folder) > 1e-3


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
@pytest.mark.parametrize("mutant", ["position", "future", "diagonal"])
def test_the_oracle_catches_wrong_versions(
    target64: Target, kind: str, mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = fresh_draft(target64, kind=kind)
    folder = export(target64, draft, tmp_path / "draft")
    chain = chain_attention.chain_attention
    if mutant == "position":  # rotary positions of a chain that do not advance
        rotate = layers.rotate

        def stuck(x, cos, sin):  # type: ignore[no-untyped-def]
            return rotate(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin))

        monkeypatch.setattr("redraft.drafts.one_layer.rotate", stuck)
    elif mutant == "future":  # chains that see the true pair after their start
        monkeypatch.setattr(
            "redraft.drafts.one_layer.chain_attention",
            lambda q, k, v, ok, ov, first, w: chain(q, k, v, ok, ov, first + 1, w),
        )
    else:  # chains that forget their own earlier steps
        monkeypatch.setattr(
            "redraft.drafts.one_layer.chain_attention",
            lambda q, k, v, ok, ov, first, w: chain(q, k, v, ok[-1:], ov[-1:], first, w),
        )
    assert worst_difference(target64, draft, 1, folder) > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollout_equals_step_by_step_decoding(target64: Target, variant: str) -> None:
    """Training sees exactly the logits that decoding computes, at every step of the rollout."""
    draft = fresh_draft(target64, **VARIANTS[variant])
    tokens, features = read(target64, draft)
    with torch.no_grad():
        rolled = [draft.logits(s) for s in draft.rollout(tokens[:1], features[:1], 0, STEPS)]
        cache = draft.new_cache(tokens[:1, 0])
        for start in range(tokens.shape[1] - 2 - STEPS):
            pair = slice(start, start + 1)
            state = draft.extend(cache, tokens[:1, start + 1 : start + 2], features[:1, pair])
            for step in range(STEPS):
                difference = (draft.logits(state)[0, 0] - rolled[step][0, start]).abs().max()
                assert difference < TOLERANCE, (start, step)
                token = tokens[:1, start + 2 + step : start + 3 + step]
                state = draft.step(cache, token, state)


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
        whole = draft.extend(draft.new_cache(tokens[:1, 0]), tokens[:1, 1:9], features[:1, :8])
        cache = draft.new_cache(tokens[:1, 0])
        state = draft.extend(cache, tokens[:1, 1:6], features[:1, :5])
        draft.step(cache, tokens[:1, 6:7], state)
        pieced = draft.extend(cache, tokens[:1, 6:9], features[:1, 5:8])
    assert float((whole - pieced).abs().max()) < TOLERANCE


def test_reduced_vocabulary_proposes_target_ids(target64: Target) -> None:
    draft = fresh_draft(target64, vocab=40)
    tokens, features = read(target64, draft)
    cache = draft.new_cache(tokens[:1, 0])
    state = draft.extend(cache, tokens[:1, 1:6], features[:1, :5])
    assert draft.draft_vocab is not None
    assert int(draft.to_target_ids(draft.logits(state).argmax(-1))) in draft.draft_vocab.tolist()
    stored = draft.stored_state()
    assert torch.equal(stored["d2t"] + torch.arange(40), draft.draft_vocab)
    assert int(stored["t2d"].sum()) == 40


def test_default_taps_and_shape(target: Target) -> None:
    assert fresh_draft(target).aux_layers == (2, 4, 5)
    config = Eagle3Draft.for_target(target).config
    assert config.intermediate_size == 64
    assert config.aux_layers is None
    assert config.feature_size == 96
    assert fresh_draft(target, kind="eagle").aux_layers == (8,)


def test_an_eagle_draft_reads_the_normed_state_and_uses_the_targets_head(target64: Target) -> None:
    draft = fresh_draft(target64, kind="eagle")
    tokens, features = read(target64, draft)
    logits = target64.read(tokens, ()).logits_BTV
    assert float((draft.logits(features) - logits).abs().max()) < TOLERANCE
    assert not any("lm_head" in name for name in draft.stored_state())
    with pytest.raises(UserError, match="has no head and uses the target's"):
        EagleDraft(draft.config).logits(features)


def test_what_a_kind_does_not_have_is_refused(target: Target) -> None:
    with pytest.raises(
        UserError, match="an? eagle draft takes no --aux-layers; it is for --kind eagle3"
    ):
        new_draft(target, [], kind="eagle", aux_layers=(1, 2, 3))
    with pytest.raises(UserError, match="unknown kind of draft 'eagel'; did you mean 'eagle'"):
        new_draft(target, [], kind="eagel")


def test_a_map_is_needed_exactly_when_the_vocabulary_is_reduced(target: Target) -> None:
    shape = dataclasses.replace(fresh_draft(target).config, draft_vocab_size=20)
    with pytest.raises(UserError, match=r"20 under a target vocabulary of 261 needs a map"):
        Eagle3Draft(shape)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("eagle3", {"feature_size": 90}, "hidden sizes differ: 3 aux layers .* 96 wide"),
        ("eagle3", {"vocab_size": 99, "draft_vocab_size": 99}, "vocabularies differ"),
        ("eagle3", {"hidden_size": 16}, "no embed_tokens.weight"),
        ("eagle", {"hidden_size": 16}, "hidden sizes differ: the target's is 32, this eagle"),
        ("eagle", {"vocab_size": 99}, "vocabularies differ"),
    ],
)
def test_binding_refuses_another_family(
    target: Target, kind: str, changes: dict[str, Any], message: str
) -> None:
    draft = fresh_draft(target, kind=kind)
    other = type(draft)(dataclasses.replace(draft.config, **changes))
    with pytest.raises(UserError, match=message):
        other.bind(target)
    with pytest.raises(UserError, match="load it with its target"):
        type(draft)(draft.config)._embed(torch.tensor([1]))
