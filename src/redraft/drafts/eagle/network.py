"""The EAGLE draft (EAGLE-1, and EAGLE-2, which has the same weights and another tree).

Source: EAGLE (arXiv 2401.15077) and the layout its engines agree on. For a pair i:

    x_i = fc(concat(E[t_{i+1}], h_i))       h_i: the target's state after its final norm, hs[n]
    y   = x_i + attention(x_i)              no norm before the attention of the first layer
    s   = y + mlp(post_attention_layernorm(y))
    logits of t_{i+2} = the target's lm_head(s);  s is what a chain feeds back as the next h

The draft has no head and no vocabulary of its own: both are the target's, and so is the embedding
unless the checkpoint carries one. Tensor names are those of the published checkpoints. Drafts of
EDA's reference code have routed experts for the mlp (`routed.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...models.target import Target
from ..layers import GatedFFN, RMSNorm
from ..one_layer import Attend, Attention, LayerShape, OneLayerDraft, shape_of
from .routed import RoutedExperts, RoutedShape


@dataclass(frozen=True, kw_only=True)
class EagleConfig(LayerShape):
    """The shape of an EAGLE draft."""

    fc_bias: bool = False
    routed: RoutedShape | None = None  # experts behind routers for the FFN, as EDA trains them


class FirstLayer(nn.Module):
    """Decoder layer 0: a Llama layer without the norm before its attention."""

    def __init__(self, config: EagleConfig):
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size)
        sizes = config.hidden_size, config.intermediate_size
        self.mlp = (
            GatedFFN(*sizes, config.hidden_act)
            if config.routed is None
            else RoutedExperts(*sizes, config.routed, config.hidden_act)
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(x, cos_TC, sin_TC, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class EagleDraft(OneLayerDraft):
    """An EAGLE draft; it computes logits only when bound to a target, whose head it uses."""

    kind: ClassVar[str] = "eagle"

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        H = config.hidden_size
        self.config = config
        self.aux_layers = ()
        self.feature_size = H
        self.draft_vocab = None
        self.fc = nn.Linear(2 * H, H, bias=config.fc_bias)
        self.layers = nn.ModuleList([FirstLayer(config)])
        self.head: nn.Module | None = None

    @classmethod
    def for_target(
        cls,
        target: Target,
        *,
        width: int | None = None,
    ) -> EagleDraft:
        """A draft of the usual shape, not yet bound."""
        return cls(EagleConfig(**shape_of(target, width)))

    def first_state(self, features_BTF: Tensor) -> Tensor:
        return features_BTF

    def layer(
        self, embedded: Tensor, state: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend
    ) -> Tensor:
        x = self.fc(torch.cat([embedded, state], dim=-1))
        out: Tensor = self.layers[0](x, cos_TC, sin_TC, attend)
        return out

    def logits(self, states: Tensor) -> Tensor:
        if self.head is None:
            raise UserError(
                f"an {self.kind} draft has no head and uses the target's: load it with its target, "
                "load_draft(path, target=target)"
            )
        out: Tensor = self.head(states.to(next(self.head.parameters()).dtype))
        return out

    def bind(self, target: Target) -> None:
        if target.hidden_size != self.feature_size:
            raise UserError(
                f"hidden sizes differ: the target's is {target.hidden_size}, this {self.kind} "
                f"draft's is {self.feature_size}; it was trained for another model family"
            )
        super().bind(target)
        self.aux_layers = (target.num_layers,)
        # Kept out of the module tree: the target's head is neither this draft's state nor moved.
        object.__setattr__(self, "head", target.head)
