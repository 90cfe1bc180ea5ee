"""Token LMs against Transformers' own logits, and against themselves step by step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MambaConfig,
)

from redraft.adapters.expert import widenable
from redraft.checkpoints.load import load_draft, read_draft
from redraft.core.errors import UserError
from redraft.core.records import Prompt
from redraft.decoding.plain import decode_plain
from redraft.decoding.speculative import decode_speculative
from redraft.drafts.layers import GatedFFN
from redraft.drafts.new import new_draft
from redraft.drafts.token_lm.lm import TokenLMConfig
from redraft.drafts.token_lm.network import TokenLMDraft
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import FAMILIES, SHAPE, fresh_draft, in_double, make_tokenizer, save_target

SMALL = {**SHAPE, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
SHAPED: dict[str, Callable[[int], Any]] = {
    "gemma2": lambda v: Gemma2Config(
        vocab_size=v, head_dim=8, sliding_window=4, final_logit_softcapping=2.0, **SHAPE
    ),
    "granite": lambda v: GraniteConfig(vocab_size=v, logits_scaling=3.0, **SHAPE),
    "cohere": lambda v: CohereConfig(vocab_size=v, logit_scale=0.3, **SHAPE),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=256),
}
LMS = {**FAMILIES, **SHAPED}
V = len(make_tokenizer())
STEPS = 4


@pytest.fixture(scope="module")
def target64(target_folder: Path) -> Target:
    return in_double(target_folder)


def lm_draft(target: Target, folder: Path, family: str, rows: int = V) -> tuple[Any, TokenLMDraft]:
    """Transformers' own model and the draft of one folder, in the target's dtype."""
    save_target(folder, LMS[family](rows), seed=7)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=target.dtype).eval()
    draft = load_draft(str(folder), target)
    assert isinstance(draft, TokenLMDraft)
    return lm, draft


def some_tokens(length: int = 14) -> torch.Tensor:
    return torch.randint(5, 200, (2, length), generator=torch.Generator().manual_seed(1))


def rolled(draft: TokenLMDraft, tokens: torch.Tensor, first: int = 0) -> list[torch.Tensor]:
    with torch.no_grad():
        features = torch.zeros(*tokens.shape, 0)
        return [draft.logits(s) for s in draft.rollout(tokens, features, first, STEPS)]


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("family", LMS)
def test_its_logits_are_the_models_own(target64: Target, tmp_path: Path, family: str) -> None:
    """Chain step j of start i predicts token i+2+j from all before it; one off is another thing."""
    lm, draft = lm_draft(target64, tmp_path, family)
    tokens = some_tokens()
    with torch.no_grad():
        own = lm(input_ids=tokens).logits
    for first in (0, 3):
        for step, logits in enumerate(rolled(draft, tokens, first)):
            assert furthest(logits, own[:, first + 1 + step : -1]) < 1e-10
            assert furthest(logits, own[:, first + step : -2]) > 1e-2
            assert furthest(logits[:, :-1], own[:, first + 2 + step : -1]) > 1e-2


@pytest.mark.parametrize("family", LMS)
def test_rollout_equals_step_by_step_decoding(
    target64: Target, tmp_path: Path, family: str
) -> None:
    """With rows of different lengths, and the chain drafted before forgotten each time."""
    _, draft = lm_draft(target64, tmp_path, family)
    tokens = some_tokens(16)
    expected = rolled(draft, tokens)
    ends = [5, 2]  # pairs read so far
    with torch.no_grad():
        cache = draft.new_cache(tokens[:, 0])
        state = draft.extend(cache, tokens[:, 1:6], torch.zeros(2, 5, 0), ends)
        for _ in range(3):
            for step in range(STEPS):
                logits = draft.logits(state)
                for row, end in enumerate(ends):
                    assert furthest(logits[row, 0], expected[step][row, end - 1]) < 1e-10
                following = [tokens[row, end + 1 + step] for row, end in enumerate(ends)]
                state = draft.step(cache, torch.stack(following)[:, None], state)
            counts = [1, 2]
            pairs = [tokens[row, end + 1 : end + 3] for row, end in enumerate(ends)]
            state = draft.extend(cache, torch.stack(pairs), torch.zeros(2, 2, 0), counts)
            ends = [end + count for end, count in zip(ends, counts, strict=True)]
        draft.keep_rows(cache, [1])
        alone = draft.logits(draft.step(cache, tokens[1:, ends[1] + 1 : ends[1] + 2], state))
    assert furthest(alone[0, 0], expected[1][1, ends[1] - 1]) < 1e-10


def test_the_first_token_counts(target64: Target) -> None:
    """It belongs to no pair, and training reads it."""
    draft = fresh_draft(target64, kind="token_lm")
    tokens = some_tokens()
    states = []
    with torch.no_grad():
        for first in (tokens[:1, 0], tokens[:1, 0] + 1):
            cache = draft.new_cache(first)
            states.append(draft.extend(cache, tokens[:1, 1:5], torch.zeros(1, 4, 0)))
    assert furthest(states[0], states[1]) > 1e-3
    assert furthest(draft.logits(states[0])[0, 0], rolled(draft, tokens)[0][0, 3]) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_it_is_lossless(
    target64: Target, tmp_path: Path, family: str, prompts: list[Prompt]
) -> None:
    _, draft = lm_draft(target64, tmp_path, family)
    together = decode_speculative(target64, draft, [p.tokens for p in prompts[:3]], 3, 20)
    for prompt, decoded in zip(prompts, together, strict=False):
        assert decoded.tokens == decode_plain(target64, prompt.tokens, 20)


def test_a_wider_vocabulary_is_cut_and_a_narrower_one_left_impossible(
    target64: Target, tmp_path: Path, prompts: list[Prompt]
) -> None:
    tokens = some_tokens()
    lm, wider = lm_draft(target64, tmp_path / "wider", "llama", V + 40)
    assert (wider.vocab_size, wider.draft_vocab) == (V, None)
    own = lm(input_ids=tokens).logits
    assert furthest(rolled(wider, tokens)[0], own[:, 1:-1, :V]) < 1e-10
    padded = in_double(save_target(tmp_path / "padded", FAMILIES["llama"](V + 40)))
    lm, narrower = lm_draft(padded, tmp_path / "narrower", "qwen3", V)
    assert narrower.vocab_size == V + 40
    assert narrower.draft_vocab is not None
    assert narrower.draft_vocab.tolist() == list(range(V))
    assert furthest(rolled(narrower, tokens)[0], lm(input_ids=tokens).logits[:, 1:-1]) < 1e-10
    text = [p.tokens for p in prompts[:3]]
    in_vocab: set[int] = set()
    for target, draft in ((target64, wider), (padded, narrower)):
        for prompt, decoded in zip(
            text, decode_speculative(target, draft, text, 3, 40), strict=True
        ):
            assert decoded.tokens == decode_plain(target, prompt, 40)
            in_vocab |= set(decoded.tokens)
    assert max(in_vocab) >= V, "the target says something that the draft has no row for"


def test_more_than_padding_is_refused(target: Target, tmp_path: Path) -> None:
    for rows in (V - 1, V + 2000):
        draft = TokenLMDraft(TokenLMConfig(raw("llama", rows), 48))
        with pytest.raises(UserError, match=f"has {V} rows for {V} tokens, .* has {rows}, .* more"):
            draft.bind(target)
    bare = Target(target.model, None, ["bare"])
    TokenLMDraft(TokenLMConfig(raw("llama", V + 40), 48)).bind(bare)
    with pytest.raises(UserError, match="more than padding"):
        TokenLMDraft(TokenLMConfig(raw("llama", V + 2000), 48)).bind(bare)


def raw(family: str, rows: int = V, **changes: Any) -> dict[str, Any]:
    return {**json.loads(LMS[family](rows).to_json_string()), **changes}


def test_a_tied_head_is_the_embedding(target: Target, tmp_path: Path) -> None:
    _, draft = lm_draft(target, tmp_path, "gemma")
    names = set(draft.stored_state())
    assert "model.embed_tokens.weight" in names
    assert not any("lm_head" in name for name in names)
    before = rolled(draft, some_tokens())[0]
    with torch.no_grad():
        draft.get_parameter("model.embed_tokens.weight")[7] *= 2
    assert furthest(rolled(draft, some_tokens())[0][..., 7], before[..., 7]) > 1e-3


@pytest.mark.parametrize(("family", "widens"), [("llama", True), ("phi", False), ("phi3", False)])
def test_a_gated_ffn_can_be_widened(
    target: Target, tmp_path: Path, family: str, widens: bool
) -> None:
    lm, draft = lm_draft(target, tmp_path, family)
    assert set(draft.trainable_names()) == {name for name, _ in lm.named_parameters()}
    with torch.no_grad():
        own = lm(input_ids=some_tokens()).logits
        assert torch.equal(draft.logits(draft._states(some_tokens())), own)
    if widens:
        assert list(widenable(draft)) == [f"model.layers.{i}.mlp" for i in range(8)]
        return
    with pytest.raises(UserError, match="needs an FFN that sums over neurons"):
        widenable(draft)


def test_a_copy_shares_all_but_its_own(target: Target) -> None:
    draft = fresh_draft(target, kind="token_lm")
    own = "model.layers.1.mlp.up_proj.weight"
    before = rolled(draft, some_tokens())[0]
    other = draft.copy_sharing([own])
    with torch.no_grad():
        other.get_parameter(own).zero_()
    assert torch.equal(rolled(draft, some_tokens())[0], before)
    assert furthest(rolled(other, some_tokens())[0], before) > 1e-3
    shared = dict(draft.named_parameters())
    assert [n for n, p in other.named_parameters() if p is not shared[n]] == [own]


@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
def test_a_cast_is_a_model_made_in_that_dtype(
    target_folder: Path, tmp_path: Path, family: str
) -> None:
    """Rotary frequencies stay float32, as engines keep them: Transformers' own bf16 model, bit for bit."""
    target = load_target(str(target_folder), dtype="bfloat16")
    lm, draft = lm_draft(target, tmp_path, family)
    tokens = some_tokens(60)
    with torch.no_grad():
        own = lm(input_ids=tokens).logits
        assert torch.equal(draft.logits(draft._states(tokens)), own)
        other: Any = load_draft(str(tmp_path), target, torch.float32)
        for dtype in (torch.bfloat16, torch.float64, torch.bfloat16, torch.bfloat16):
            other = other.to(dtype)
        assert torch.equal(other.logits(other._states(tokens)), own)
        rotary = other.body.rotary_emb
        rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16)
        assert not torch.equal(other.logits(other._states(tokens)), own)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_for_a_target_is_small_and_of_its_architecture(family: str, tmp_path: Path) -> None:
    target = load_target(str(save_target(tmp_path, FAMILIES[family](V))))
    draft = TokenLMDraft.for_target(target, width=20)
    c = draft.config
    assert (c.hidden_size, c.num_hidden_layers, c.intermediate_size) == (16, 2, 20)
    assert c.of_transformers.model_type == target.model.config.model_type
    assert (draft.aux_layers, draft.feature_size, draft.feeds_back) == ((), 0, False)
    one, two, three = (fresh_weights(draft, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["model.embed_tokens.weight"], three["model.embed_tokens.weight"])
    norm = one["model.layers.0.input_layernorm.weight"]
    assert norm.eq(0.0 if family == "gemma" else 1.0).all(), "gemma's norms add one"


def fresh_weights(draft: TokenLMDraft, seed: int) -> dict[str, torch.Tensor]:
    draft.reinitialise(seed)
    return {name: tensor.clone() for name, tensor in draft.stored_state().items()}


def test_what_it_does_not_have_is_refused(target: Target) -> None:
    with pytest.raises(UserError, match="takes no --aux-layers; it is for --kind eagle3"):
        new_draft(target, [], kind="token_lm", aux_layers=(1, 2, 3))
    with pytest.raises(UserError, match="takes no --draft-vocab; it is for --kind eagle3"):
        fresh_draft(target, kind="token_lm", vocab=40)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2),
            "layers of kind linear_attention, which cannot be rolled back",
        ),
        (
            BertConfig(
                vocab_size=V,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=20,
                is_decoder=True,
            ),
            r"BertLMHeadModel is not a body and a head \(cls next to them\)",
        ),
    ],
)
def test_what_cannot_be_a_draft_is_called_by_its_name(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenLMDraft(TokenLMConfig(json.loads(config.to_json_string()), 20))


def test_an_unknown_shape_of_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.drafts.token_lm.network.shaped", lambda config, logits: logits)
    for family in ("gemma2", "granite", "cohere"):
        with pytest.raises(UserError, match="does more to its head's output than redraft knows"):
            TokenLMDraft(TokenLMConfig(raw(family), 48))
    TokenLMDraft(TokenLMConfig(raw("llama"), 48))


def test_an_ffn_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * plain(self, x))
    draft = TokenLMDraft(TokenLMConfig(raw("llama"), 48))
    assert not any(isinstance(module, GatedFFN) for module in draft.modules())


def test_learned_positions_must_reach_as_far_as_the_target(target: Target) -> None:
    short = TokenLMDraft(TokenLMConfig(raw("gpt2", n_positions=64), 64))
    with pytest.raises(UserError, match="learned positions for 64 tokens .* 256 of target"):
        short.bind(target)
    TokenLMDraft(TokenLMConfig(raw("llama", max_position_embeddings=64), 48)).bind(target)


def test_widths_follow_the_config() -> None:
    config = TokenLMConfig(raw("llama"), 48)
    wide = TokenLMDraft(dataclasses.replace(config, intermediate_size=56))
    assert {ffn.width for ffn in widenable(wide).values()} == {56}


def test_the_targets_own_folder_is_its_perfect_draft(
    target64: Target, target_folder: Path, prompts: list[Prompt]
) -> None:
    stored = read_draft(str(target_folder))
    assert stored.kind == "token_lm"
    [decoded] = decode_speculative(target64, stored.build(target64), [prompts[0].tokens], 3, 20)
    assert set(decoded.accepted) == {3}
