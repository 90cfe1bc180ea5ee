"""The EAGLE-3 draft: three tapped hidden states through `fc`, one decoder layer, its own head.

Source: EAGLE-3 (arXiv 2503.01840) and the layout its engines agree on. For a pair i:

    g_i = fc(concat of the taps at position i)             the target's features, once
    x   = concat(input_layernorm(E[t_{i+1}]), hidden_norm(s)),  s = g_i or the chain's own state
    s'  = s + attention(x);  s'' = s' + mlp(post_attention_layernorm(s'))
    logits of t_{i+2} = lm_head(norm(s''));  the pre-norm s'' is what a chain feeds back

The rotary position of pair i is i. Tensor names are those of the published checkpoints.

Shapes: B batch, T tokens, S chain starts, F features, H hidden, V target vocabulary, D draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..rng import seeded
from ..target import Target, check_taps, default_taps
from .base import Draft
from .layers import GatedFFN, RMSNorm, Rotary, causal_attention, chain_attention, rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Eagle3Config:
    """The shape of an EAGLE-3 draft. `feature_size` is the width of the concatenated taps."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    feature_size: int
    taps: tuple[int, ...] | None = None  # None: the default set of whatever target it is bound to
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )


def shape_for(
    target: Target,
    *,
    width: int | None = None,
    draft_vocab_size: int | None = None,
    taps: tuple[int, ...] | None = None,
) -> Eagle3Config:
    """The usual shape of a draft for `target`: its hidden and head sizes, FFN twice the hidden size.

    `taps` None is the engines' default set. Raises UserError when that collapses.
    """
    config = target.model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or target.hidden_size // heads
    chosen = check_taps(taps or default_taps(target.num_layers), target.num_layers)
    rope = getattr(config, "rope_parameters", None) or {}
    return Eagle3Config(
        hidden_size=target.hidden_size,
        intermediate_size=width or 2 * target.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size or target.vocab_size,
        feature_size=len(chosen) * target.hidden_size,
        taps=taps,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=target.max_positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(rope.get("rope_theta", 10000.0)),
        },
    )


class Attention(nn.Module):
    """Grouped-query attention whose input is 2H wide; how keys are attended to is the caller's."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        self.head_dim = config.head_dim
        wide, C = 2 * config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(wide, config.num_attention_heads * C, bias=False)
        self.k_proj = nn.Linear(wide, config.num_key_value_heads * C, bias=False)
        self.v_proj = nn.Linear(wide, config.num_key_value_heads * C, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * C, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attend(rotate(q, cos_TC, sin_TC), rotate(k, cos_TC, sin_TC), v)
        out: Tensor = self.o_proj(attended.transpose(1, 2).reshape(B, T, -1))
        return out


class MidLayer(nn.Module):
    """The one decoder layer."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = GatedFFN(H, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(H, eps)
        self.hidden_norm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)

    def forward(
        self, embedded: Tensor, state: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend
    ) -> Tensor:
        x = torch.cat([self.input_layernorm(embedded), self.hidden_norm(state)], dim=-1)
        state = state + self.self_attn(x, cos_TC, sin_TC, attend)
        out: Tensor = state + self.mlp(self.post_attention_layernorm(state))
        return out


class Cache:
    """Keys and values of the true pairs, followed by those of the chain being drafted."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.true_length = 0
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, G, T, C] and return all keys and values so far; grows by doubling."""
        end = self.length + k.shape[2]
        if self.keys is None or self.values is None or self.keys.shape[2] < end:
            self.keys, self.values = (
                self._grown(self.keys, k, end),
                self._grown(self.values, v, end),
            )
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, old: Tensor | None, like: Tensor, need: int) -> Tensor:
        B, G, _, C = like.shape
        new = like.new_empty(B, G, 1 << max(need - 1, 127).bit_length(), C)
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new


class Eagle3Draft(Draft):
    """An EAGLE-3 draft, with an embedding of its own or the target's."""

    kind: ClassVar[str] = "eagle3"

    def __init__(self, config: Eagle3Config, draft_vocab: Tensor | None = None):
        super().__init__()
        if (draft_vocab is None) != (config.draft_vocab_size == config.vocab_size):
            raise UserError(
                f"a draft vocabulary of {config.draft_vocab_size} under a target vocabulary of "
                f"{config.vocab_size} {'needs' if draft_vocab is None else 'must not have'} a map "
                "(d2t)"
            )
        H = config.hidden_size
        self.config = config
        self.taps = config.taps or ()
        self.feature_size = config.feature_size
        self.vocab_size = config.vocab_size
        self.fc = nn.Linear(config.feature_size, H, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = RMSNorm(H, config.rms_norm_eps)
        self.lm_head = nn.Linear(H, config.draft_vocab_size, bias=False)
        self.rotary = Rotary(_rope_config(config))
        self.embed_tokens: nn.Embedding | None = None
        self.shared_embedding: Tensor | None = None
        self.draft_vocab: Tensor | None
        self.register_buffer("draft_vocab", draft_vocab, persistent=False)

    # -- the function ---------------------------------------------------------------------------

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.shared_embedding if self.embed_tokens is None else self.embed_tokens.weight
        if table is None:
            raise UserError(
                "this draft stores no embedding and shares the target's: load it with its target, "
                "load_draft(path, target=target)"
            )
        return nn.functional.embedding(tokens, table).to(self.fc.weight.dtype)

    def _project(self, features: Tensor) -> Tensor:
        out: Tensor = self.fc(features.to(self.fc.weight.dtype))
        return out

    def logits(self, states: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.norm(states))
        return out

    def rollout(
        self, tokens_BT: Tensor, features_BTF: Tensor, first: int, steps: int
    ) -> Iterator[Tensor]:
        T = tokens_BT.shape[1]
        if T - 2 - first <= 0:
            return
        embedded = self._embed(tokens_BT[:, 1 : T - 1])
        cos, sin = self.rotary(T - 2, embedded)
        kept: list[Tensor] = []

        def attend_base(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.extend((k, v))
            return causal_attention(q, k, v)

        projected = self._project(features_BTF[:, : T - 2])
        state = self.midlayer(embedded, projected, cos, sin, attend_base)
        state = state[:, first:]
        yield state
        own_k: list[Tensor] = []
        own_v: list[Tensor] = []

        def attend_chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own_k.append(k)
            own_v.append(v)
            return chain_attention(q, kept[0], kept[1], own_k, own_v, first)

        for step in range(1, steps):
            starts = T - 2 - step - first
            if starts <= 0:
                return
            here = slice(first + step, first + step + starts)
            state = self.midlayer(
                embedded[:, here], state[:, :starts], cos[here], sin[here], attend_chain
            )
            yield state

    def new_cache(self) -> Cache:
        return Cache()

    def absorb(self, cache: Cache, tokens_1T: Tensor, features_1TF: Tensor) -> Tensor:
        cache.length = cache.true_length
        out = self._decode(cache, tokens_1T, self._project(features_1TF))
        cache.true_length = cache.length
        return out[:, -1:]

    def advance(self, cache: Cache, token_11: Tensor, state_11H: Tensor) -> Tensor:
        return self._decode(cache, token_11, state_11H)

    def _decode(self, cache: Cache, tokens_1T: Tensor, state_1TH: Tensor) -> Tensor:
        embedded = self._embed(tokens_1T)
        begin, end = cache.length, cache.length + tokens_1T.shape[1]
        cos, sin = self.rotary(end, embedded)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, *cache.append(k, v))

        out: Tensor = self.midlayer(embedded, state_1TH, cos[begin:end], sin[begin:end], attend)
        return out

    # -- ownership ------------------------------------------------------------------------------

    def bind(self, target: Target) -> None:
        self.taps = check_taps(
            self.config.taps or default_taps(target.num_layers), target.num_layers
        )
        expected = len(self.taps) * target.hidden_size
        if expected != self.feature_size:
            raise UserError(
                f"hidden sizes differ: {len(self.taps)} taps of a target with hidden size "
                f"{target.hidden_size} are {expected} wide, but this draft's fc.weight takes "
                f"{self.feature_size}; was it trained for another model family?"
            )
        if target.vocab_size != self.vocab_size:
            raise UserError(
                f"vocabularies differ: target {target.name} has {target.vocab_size} tokens, the "
                f"draft was made for {self.vocab_size}; a draft needs the target's own tokenizer"
            )
        if self.embed_tokens is None:
            if target.hidden_size != self.config.hidden_size:
                raise UserError(
                    f"this draft has no embed_tokens.weight and cannot share the target's: hidden "
                    f"sizes differ ({self.config.hidden_size} here, {target.hidden_size} there)"
                )
            self.shared_embedding = target.embedding_VH.detach()
        self.to(target.device)

    def trainable_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if not name.startswith("embed_tokens")]

    def reinitialise(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith("embed_tokens"):
                continue
            with torch.no_grad():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    noise = torch.randn(parameter.shape, generator=seeded(seed, "init", name))
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)

    def stored_state(self) -> dict[str, Tensor]:
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        if self.draft_vocab is not None:
            rows = torch.arange(len(self.draft_vocab), device=self.draft_vocab.device)
            spoken = torch.zeros(self.vocab_size, dtype=torch.bool)
            spoken[self.draft_vocab.cpu()] = True
            state["d2t"], state["t2d"] = self.draft_vocab - rows, spoken
        return state


def _rope_config(config: Eagle3Config) -> Any:
    """The part of a Llama config that Transformers' rotary embedding reads."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
