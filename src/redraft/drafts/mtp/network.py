"""The network of an MTP head, the layer for further tokens that a model is trained with.

    x       = fc([embedding_norm(E[token i+1]); hidden_norm(h_i)])
    x       = x + attention(layers.0.input_layernorm(x))
    x       = x + mlp(layers.0.post_attention_layernorm(x))
    logits  = target.lm_head(norm(x))

h_i is the target's state after its final norm for the first token, and the head's own norm(x) for those after;
families differ (`families.py`). Embedding and output head are always the target's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...models.target import Target
from ..layers import GatedFFN, RMSNorm
from ..one_layer import Attend, Attention, Cache, LayerShape, OneLayerDraft, shape_of
from .families import QWEN, declared_by, feeds_raw, text_config
from .routed import FROZEN, RoutedFFN, RoutedShape
from .routed_files import declared_experts, read_routed

MLP, BIAS = "layers.0.mlp.", "e_score_correction_bias"


@dataclass(frozen=True, kw_only=True)
class MtpConfig(LayerShape):
    """The shape of an MTP head. What says how it is computed has the names of `Family`."""

    family: str = QWEN.name
    state_first: bool = False
    before_norm: bool = False
    raw_feedback: bool = False
    zero_first: bool = False
    leading_pair: bool = False
    """The first pair is zeros with the first token, before the usual ones, as llama.cpp has it."""
    routed: RoutedShape | None = None
    """Routed experts for the FFN. They are not trained, and nor is their router."""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the checkpoint that it belongs to."""


class DecoderLayer(nn.Module):
    """A layer as the target has them, with full attention."""

    def __init__(self, config: MtpConfig):
        super().__init__()
        norm = config.hidden_size, config.rms_norm_eps, config.norm_offset
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = Attention(config, config.hidden_size)
        self.post_attention_layernorm = RMSNorm(*norm)
        sizes = config.hidden_size, config.intermediate_size
        self.mlp = (
            GatedFFN(*sizes, config.hidden_act)
            if config.routed is None
            else RoutedFFN(config.hidden_size, config.routed, config.hidden_act)
        )

    def forward(self, x: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_TC, sin_TC, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class MtpDraft(OneLayerDraft):
    """An MTP head; it computes logits only when bound to a target, whose output head it uses."""

    kind: ClassVar[str] = "mtp"

    def __init__(self, config: MtpConfig):
        super().__init__(config)
        H = config.hidden_size
        norm = H, config.rms_norm_eps, config.norm_offset
        self.config, self.feature_size, self.draft_vocab, self.aux_layers = config, H, None, ()
        self.embedding_norm, self.hidden_norm = RMSNorm(*norm), RMSNorm(*norm)
        self.fc = nn.Linear(2 * H, H, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config)])
        self.norm = RMSNorm(*norm)
        self.head: nn.Module | None = None
        self.target_norm: Tensor | None = None

    @classmethod
    def for_target(cls, target: Target, *, width: int | None = None) -> MtpDraft:
        """A head of the usual shape, not yet bound: of the target's family, else as Qwen3.5 has it.

        With routed experts where the target's layers have them, unless a dense `width` is named.
        """
        raw, layer = target.model.config.to_dict(), target.model.config.get_text_config()
        family = declared_by(raw) or QWEN
        routed = None if width else _routed_of(target)
        width = width or (routed.width if routed else getattr(layer, "intermediate_size", None))
        shape = shape_of(target, width)
        rope = getattr(layer, "rope_parameters", None) or {}
        biased = bool(getattr(layer, "attention_bias", family.model_type == "qwen2"))
        return cls(
            MtpConfig(
                **shape,
                hidden_act=getattr(layer, "hidden_act", "silu"),
                qkv_bias=biased,
                head_norms=family is QWEN or bool(getattr(layer, "use_qk_norm", False)),
                output_gate=family.gated and bool(getattr(layer, "attn_output_gate", True)),
                rotary_share=float(rope.get("partial_rotary_factor", family.rotary_share)),
                norm_offset=family.norm_offset,
                family=family.name,
                state_first=family.state_first,
                before_norm=family.before_norm,
                raw_feedback=feeds_raw(raw, family),
                zero_first=family.zero_first,
                routed=routed,
                checkpoint=raw if declared_by(raw) else {},
            )
        )

    @classmethod
    def from_last_layer(cls, target: Target) -> MtpDraft:
        """A head to begin training with: the target's last layer on the sum of both inputs.

        In float32 and not yet bound. Raises UserError where that layer is not like the head's.
        """
        draft = cls.for_target(target)
        wanted = draft.layers[0].state_dict()
        layers = list(getattr(target.decoder, "layers", ()))
        like = dict(layers[-1].state_dict()) if layers else {}
        if _shapes(like) != _shapes(wanted):
            raise UserError(
                f"the last layer of target {target.name} has not the tensors of an MTP head of family {draft.config.family}; train "
                "one from nothing (redraft train --method scratch --kind mtp)"
            )
        draft.layers[0].load_state_dict({name: t.float() for name, t in like.items()})
        if target.final_norm is not None:
            draft.norm.weight.data.copy_(target.final_norm.weight)
        identity = torch.eye(draft.hidden_size)
        draft.fc.weight.data.copy_(torch.cat([identity, identity], dim=-1) / 2)
        return draft

    def first_state(self, features_BTF: Tensor) -> Tensor:
        if self.target_norm is None:
            return features_BTF
        return features_BTF / self.target_norm.to(features_BTF)

    def inputs(self, tokens_BT: Tensor, begins: Sequence[int]) -> Tensor:
        embedded = super().inputs(tokens_BT, begins)
        if not self.config.zero_first or all(begins):
            return embedded
        kept = torch.ones(embedded.shape[:2], dtype=embedded.dtype, device=embedded.device)
        kept[[row for row, begin in enumerate(begins) if begin == 0], 0] = 0.0
        return embedded * kept[..., None]

    def rollout(
        self, tokens_BT: Tensor, features_BTF: Tensor, first: int, steps: int
    ) -> Iterator[Tensor]:
        if not self.config.leading_pair:
            return super().rollout(tokens_BT, features_BTF, first, steps)
        led = (
            _led(tokens_BT[:, :1], tokens_BT),
            _led(torch.zeros_like(features_BTF[:, :1]), features_BTF),
        )
        return super().rollout(*led, first + 1, steps)

    def new_cache(self, first_B: Tensor) -> Cache:
        cache = super().new_cache(first_B)
        if self.config.leading_pair:
            state = torch.zeros(len(first_B), 1, self.hidden_size, device=first_B.device)
            super().extend(cache, first_B[:, None], state.to(self.dtype))
        return cache

    def layer(
        self, embedded: Tensor, state: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend
    ) -> Tensor:
        parts = [self.embedding_norm(embedded), self.hidden_norm(state)]
        if self.config.state_first:
            parts.reverse()
        x: Tensor = self.layers[0](self.fc(torch.cat(parts, dim=-1)), cos_TC, sin_TC, attend)
        return x if self.config.raw_feedback else self.norm(x)

    def logits(self, states: Tensor) -> Tensor:
        if self.head is None:
            raise UserError(
                "an MTP head has no output head and uses the target's: load it with its target, "
                "load_draft(path, target=target)"
            )
        normed = self.norm(states) if self.config.raw_feedback else states
        out: Tensor = self.head(normed.to(next(self.head.parameters()).dtype))
        return out

    def trainable_names(self) -> list[str]:
        """All but routed experts and their router."""
        frozen = tuple(MLP + part for part in FROZEN)
        return [name for name in super().trainable_names() if not name.startswith(frozen)]

    def check_fresh(self) -> None:
        if self.config.routed is not None:
            raise UserError(
                f"an MTP head with {self.config.routed} is not trained from nothing: redraft never trains routed experts. Adapt the "
                "base's head, or one made of the target's last layer (redraft mtp); or name a --draft-width, for a dense head, "
                "which engines do not read under this config.json"
            )

    def reinitialise(self, seed: int) -> None:
        super().reinitialise(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, RMSNorm):
                    module.weight.fill_(1.0 - module.offset)

    def bind(self, target: Target) -> None:
        if target.hidden_size != self.hidden_size:
            raise UserError(
                f"hidden sizes differ: the target's is {target.hidden_size}, this MTP head's is {self.hidden_size}; "
                "it is of another model"
            )
        super().bind(target)
        self.aux_layers = (target.num_layers,)
        # Kept out of the module tree: neither is this draft's state.
        object.__setattr__(self, "head", target.head)
        scale = target.norm_scale if self.config.before_norm else None
        object.__setattr__(self, "target_norm", scale)


def _routed_of(target: Target) -> RoutedShape | None:
    """The routed experts of a target's layers, where heads of its family have them too."""
    raw = target.model.config.to_dict()
    family, text = declared_by(raw), text_config(raw)
    if family is None or not declared_experts(text, family.router):
        return None
    return read_routed(text, (), family.router, Path(target.name))


def _led(first: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([first, rest], dim=1)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
