"""The EAGLE-3 draft: three auxiliary hidden states through `fc`, one decoder layer, its own head.

Source: EAGLE-3 (arXiv 2503.01840) and the layout its engines agree on. For a pair i:

    g_i = fc(concat of the aux layers at position i)             the target's features, once
    x   = concat(input_layernorm(E[t_{i+1}]), hidden_norm(s)),  s = g_i or the chain's own state
    s'  = s + attention(x);  s'' = s' + mlp(post_attention_layernorm(s'))
    logits of t_{i+2} = lm_head(norm(s''));  the pre-norm s'' is what a chain feeds back

Published variants differ in where they norm; each is a flag of the config and computed as written:

    norm_before_fc         g_i = fc(input_norm(concat of the aux layers))
    fc_norm                g_i = fc(concat of fc_norm.k(aux layer k))
    norm_before_residual   s' = hidden_norm(s) + attention(x)
    norm_output            the chain feeds back norm(s'')

Tensor names are those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...models.target import Target, check_aux_layers, default_aux_layers
from ..base import vocabulary_map
from ..layers import GatedFFN, RMSNorm
from ..one_layer import Attend, Attention, LayerShape, OneLayerDraft, shape_of


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(LayerShape):
    """The shape of an EAGLE-3 draft. `feature_size` is the width of the concatenated aux layers."""

    draft_vocab_size: int
    feature_size: int
    aux_layers: tuple[int, ...] | None = (
        None  # None: the default set of whatever target it is bound to
    )
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: int = 0  # how many aux layers have a norm of their own; 0 or all of them
    norm_output: bool = False


class MidLayer(nn.Module):
    """The one decoder layer."""

    def __init__(self, config: Eagle3Config):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = Attention(config, 2 * H)
        self.mlp = GatedFFN(H, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(H, eps)
        self.hidden_norm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)

    def forward(
        self, embedded: Tensor, state: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend
    ) -> Tensor:
        normed = self.hidden_norm(state)
        x = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        residual = normed if self.norm_before_residual else state
        state = residual + self.self_attn(x, cos_TC, sin_TC, attend)
        out: Tensor = state + self.mlp(self.post_attention_layernorm(state))
        return out


class Eagle3Draft(OneLayerDraft):
    """An EAGLE-3 draft, with an embedding of its own or the target's."""

    kind: ClassVar[str] = "eagle3"

    def __init__(self, config: Eagle3Config, draft_vocab: Tensor | None = None):
        super().__init__(config)
        if (draft_vocab is None) != (config.draft_vocab_size == config.vocab_size):
            raise UserError(
                f"a draft vocabulary of {config.draft_vocab_size} under a target vocabulary of "
                f"{config.vocab_size} {'needs' if draft_vocab is None else 'must not have'} a map "
                "(d2t)"
            )
        H, F, eps = config.hidden_size, config.feature_size, config.rms_norm_eps
        self.config = config
        self.aux_layers = config.aux_layers or ()
        self.feature_size = F
        self.input_norm = RMSNorm(F, eps) if config.norm_before_fc else None
        parts = config.fc_norm
        self.fc_norm = nn.ModuleList(RMSNorm(F // parts, eps) for _ in range(parts))
        self.fc = nn.Linear(F, H, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = RMSNorm(H, eps)
        self.lm_head = nn.Linear(H, config.draft_vocab_size, bias=False)
        self.draft_vocab: Tensor | None
        self.register_buffer("draft_vocab", draft_vocab, persistent=False)

    @classmethod
    def for_target(
        cls,
        target: Target,
        *,
        width: int | None = None,
        draft_vocab: Tensor | None = None,
        aux_layers: tuple[int, ...] | None = None,
    ) -> Eagle3Draft:
        """A draft of the usual shape, not yet bound. `aux_layers` None is the engines' default set.

        Raises UserError when the default set collapses in a shallow target.
        """
        chosen = check_aux_layers(
            aux_layers or default_aux_layers(target.num_layers), target.num_layers
        )
        config = Eagle3Config(
            **shape_of(target, width),
            draft_vocab_size=target.vocab_size if draft_vocab is None else len(draft_vocab),
            feature_size=len(chosen) * target.hidden_size,
            aux_layers=aux_layers,
        )
        return cls(config, draft_vocab)

    def first_state(self, features_BTF: Tensor) -> Tensor:
        if self.input_norm is not None:
            features_BTF = self.input_norm(features_BTF)
        if len(self.fc_norm):
            parts = features_BTF.chunk(len(self.fc_norm), dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            features_BTF = torch.cat(normed, dim=-1)
        out: Tensor = self.fc(features_BTF)
        return out

    def layer(
        self, embedded: Tensor, state: Tensor, cos_TC: Tensor, sin_TC: Tensor, attend: Attend
    ) -> Tensor:
        out: Tensor = self.midlayer(embedded, state, cos_TC, sin_TC, attend)
        return self.norm(out) if self.config.norm_output else out

    def logits(self, states: Tensor) -> Tensor:
        out: Tensor = self.lm_head(states if self.config.norm_output else self.norm(states))
        return out

    def bind(self, target: Target) -> None:
        self.aux_layers = check_aux_layers(
            self.config.aux_layers or default_aux_layers(target.num_layers), target.num_layers
        )
        expected = len(self.aux_layers) * target.hidden_size
        if expected != self.feature_size:
            raise UserError(
                f"hidden sizes differ: {len(self.aux_layers)} aux layers of a target with hidden size "
                f"{target.hidden_size} are {expected} wide, but this draft's fc.weight takes "
                f"{self.feature_size}; was it trained for another model family?"
            )
        super().bind(target)

    def stored_state(self) -> dict[str, Tensor]:
        state = super().stored_state()
        if self.draft_vocab is not None:
            state.update(vocabulary_map(self.draft_vocab, self.vocab_size))
        return state
