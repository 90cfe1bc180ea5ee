"""Drafts of one decoder layer: what kinds of them have in common.

A chain's state enters the layer together with the embedding of the next token, and what leaves it
is the chain's next state. A kind says how the target's features become the first state, what the
layer does with state and embedding, and how a state becomes logits; everything about positions,
attention, caches and the target's embedding is here.

The rotary position of pair i is i. Shapes: B batch, T tokens, S chain starts, H hidden,
N query heads, G key/value heads, C head_dim.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..models.kv_slots import Slots, positions, visible
from ..models.target import Target
from .base import Draft, token_count
from .chain_attention import chain_attention
from .layers import RMSNorm, Rotary, causal_attention, masked_attention, rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes and variants of the decoder layer."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    qkv_bias: bool = False
    o_bias: bool = False
    head_norms: bool = False  # q_norm and k_norm over head_dim, as Qwen3 has them
    sliding_window: int | None = None  # a query sees this many positions, its own included
    output_gate: bool = False  # q_proj makes a gate as well, head by head, as in Qwen3.5
    rotary_share: float = 1.0  # of a head's elements, the first ones, that are turned
    norm_offset: float = 0.0  # 1: norms multiply by 1 + weight


def shape_of(target: Target, width: int | None) -> dict[str, Any]:
    """The usual sizes of a draft for `target`: its hidden and head sizes, FFN twice the hidden."""
    config = target.model.config.get_text_config()
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "hidden_size": target.hidden_size,
        "intermediate_size": width or 2 * target.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or target.hidden_size // heads,
        "vocab_size": target.vocab_size,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "max_position_embeddings": target.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(rope.get("rope_theta", 10000.0)),
        },
    }


class Attention(nn.Module):
    """Grouped-query attention over inputs `wide`; how keys are attended to is the caller's."""

    def __init__(self, shape: LayerShape, wide: int):
        super().__init__()
        self.head_dim = C = shape.head_dim
        heads, groups = shape.num_attention_heads, shape.num_key_value_heads
        self.gated = shape.output_gate
        self.q_proj = nn.Linear(wide, heads * C * (1 + self.gated), bias=shape.qkv_bias)
        self.k_proj = nn.Linear(wide, groups * C, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(wide, groups * C, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(heads * C, shape.hidden_size, bias=shape.o_bias)
        norm = C, shape.rms_norm_eps, shape.norm_offset
        self.q_norm = RMSNorm(*norm) if shape.head_norms else None
        self.k_norm = RMSNorm(*norm) if shape.head_norms else None

    def forward(self, x: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x.shape
        C = self.head_dim
        k, v = (proj(x).view(B, T, -1, C) for proj in (self.k_proj, self.v_proj))
        q, *gate = self.q_proj(x).view(B, T, -1, C * (1 + self.gated)).split(C, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = attend(rotate(q, cos_TC, sin_TC), rotate(k, cos_TC, sin_TC), v)
        mixed = attended.transpose(1, 2).reshape(B, T, -1)
        for part in gate:
            mixed = mixed * part.reshape(B, T, -1).sigmoid()
        out: Tensor = self.o_proj(mixed)
        return out


class Cache:
    """Keys and values of each row's true pairs, followed by those of the chain being drafted."""

    def __init__(self, rows: int) -> None:
        self.slots = Slots()
        self.true_lengths = [0] * rows
        self.drafted = 0


class OneLayerDraft(Draft):
    """Rollout, decoding and ownership of a draft with one decoder layer."""

    def __init__(self, config: LayerShape):
        super().__init__()
        self.window = config.sliding_window
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.rotary = rotary_of(config)
        self.embed_tokens: nn.Embedding | None = None
        self.shared_embedding: Tensor | None = None

    @abstractmethod
    def first_state(self, features_BTF: Tensor) -> Tensor:
        """The state [B, T, H] in which a chain starts, from the target's features."""

    @abstractmethod
    def layer(
        self, embedded: Tensor, state: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend
    ) -> Tensor:
        """Next states [B, T, H] from the next tokens' embeddings and the present states."""

    @property
    def dtype(self) -> torch.dtype:
        return self.get_parameter("fc.weight").dtype

    def inputs(self, tokens_BT: Tensor, begins: Sequence[int]) -> Tensor:
        """What enters the layer of the tokens [B, T, H], a row's first being that of pair `begins`."""
        return self._embed(tokens_BT)

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.shared_embedding if self.embed_tokens is None else self.embed_tokens.weight
        if table is None:
            raise UserError(
                "this draft stores no embedding and shares the target's: load it with its target, "
                "load_draft(path, target=target)"
            )
        return nn.functional.embedding(tokens, table).to(self.dtype)

    def rollout(
        self, tokens_BT: Tensor, features_BTF: Tensor, first: int, steps: int
    ) -> Iterator[Tensor]:
        T = tokens_BT.shape[1]
        if T - 2 - first <= 0:
            return
        embedded = self.inputs(tokens_BT[:, 1 : T - 1], [0] * len(tokens_BT))
        cos, sin = self.rotary(T - 2, embedded)
        kept: list[Tensor] = []

        def attend_base(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.extend((k, v))
            return causal_attention(q, k, v, self.window)

        begun = self.first_state(features_BTF[:, : T - 2].to(self.dtype))
        state = self.layer(embedded, begun, cos, sin, attend_base)[:, first:]
        yield state
        own_k: list[Tensor] = []
        own_v: list[Tensor] = []

        def attend_chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own_k.append(k)
            own_v.append(v)
            return chain_attention(q, kept[0], kept[1], own_k, own_v, first, self.window)

        for step in range(1, steps):
            starts = T - 2 - step - first
            if starts <= 0:
                return
            here = slice(first + step, first + step + starts)
            state = self.layer(
                embedded[:, here], state[:, :starts], cos[here], sin[here], attend_chain
            )
            yield state

    def new_cache(self, first_B: Tensor) -> Cache:
        return Cache(len(first_B))

    def extend(
        self,
        cache: Cache,
        tokens_BT: Tensor,
        features_BTF: Tensor,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        cache.drafted = 0
        counts = counts or [tokens_BT.shape[1]] * tokens_BT.shape[0]
        out = self._decode(cache, tokens_BT, self.first_state(features_BTF.to(self.dtype)))
        cache.true_lengths = [n + c for n, c in zip(cache.true_lengths, counts, strict=True)]
        if min(counts) == max(counts):
            return out[:, counts[0] - 1 : counts[0]]
        last_B = torch.tensor(list(counts), device=out.device) - 1
        return out[torch.arange(len(last_B), device=out.device), last_B][:, None]

    def step(self, cache: Cache, token_B1: Tensor, state_B1H: Tensor) -> Tensor:
        out = self._decode(cache, token_B1, state_B1H)
        cache.drafted += 1
        return out

    def keep_rows(self, cache: Cache, rows: Sequence[int]) -> None:
        cache.slots.keep_rows(
            torch.tensor(list(rows), device=self.get_parameter("fc.weight").device)
        )
        cache.true_lengths = [cache.true_lengths[row] for row in rows]

    def _decode(self, cache: Cache, tokens_BT: Tensor, state_BTH: Tensor) -> Tensor:
        count, device = tokens_BT.shape[1], tokens_BT.device
        begins = [length + cache.drafted for length in cache.true_lengths]
        embedded = self.inputs(tokens_BT, begins)
        cos, sin = self.rotary(max(begins) + count, embedded)
        if min(begins) == max(begins):
            cos, sin = cos[begins[0] :], sin[begins[0] :]
            seen = None
        else:
            at_BT = positions(begins, count, device)
            cos, sin = cos[at_BT][:, None], sin[at_BT][:, None]  # over heads [B, 1, T, C]
            seen = visible(begins, count, self.window, device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = cache.slots.write(k, v, begins)
            if seen is None:
                return causal_attention(q, k, v, self.window)
            return masked_attention(q, k, v, seen)

        return self.layer(embedded, state_BTH, cos, sin, attend)

    # -- ownership ------------------------------------------------------------------------------

    def bind(self, target: Target) -> None:
        if target.vocab_size != self.vocab_size:
            tokens = token_count(target)
            why = (
                "that is more than padding, so its ids mean other tokens; a draft needs the target's own "
                "tokenizer"
                if tokens
                else "without the target's tokenizer nobody knows whether ids mean the same tokens"
            )
            raise UserError(
                f"vocabularies differ: target {target.name} has {target.vocab_size} rows"
                f"{f' for {tokens} tokens' if tokens else ''}, this draft has {self.vocab_size}; {why}"
            )
        if self.embed_tokens is None:
            if target.hidden_size != self.hidden_size:
                raise UserError(
                    f"this draft has no embed_tokens.weight and cannot share the target's: hidden "
                    f"sizes differ ({self.hidden_size} here, {target.hidden_size} there)"
                )
            self.shared_embedding = target.embedding_VH.detach()
        self.to(target.device)

    def trainable_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if not name.startswith("embed_tokens")]


def rotary_of(shape: LayerShape) -> Rotary:
    """The rotary embedding of a layer. Raises UserError where its settings give no frequencies."""
    from transformers import LlamaConfig

    rope = {key: value for key, value in shape.rope_parameters.items() if "mrope" not in key}
    turned = int(shape.head_dim * shape.rotary_share)
    try:
        config = LlamaConfig(
            hidden_size=turned,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=turned,
            max_position_embeddings=shape.max_position_embeddings,
            rope_parameters=rope,
        )
        with torch.device("cpu"):  # its numbers are checked, where all else may be shapes only
            rotary = Rotary(config)
    except Exception as problem:  # noqa: BLE001 - Transformers has no class of its own for this
        raise UserError(f"no rotary embedding can be made of {rope}: {problem}") from None
    if not bool(rotary.inv_freq.isfinite().all()) or not math.isfinite(rotary.scaling):
        raise UserError(f"the rotary embedding of {rope} has frequencies that are not finite")
    return rotary
