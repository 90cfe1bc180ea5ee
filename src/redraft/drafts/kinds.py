"""The kinds of draft redraft knows: one row per kind."""

from __future__ import annotations

from .eagle import EagleDraft
from .eagle3 import Eagle3Draft
from .one_layer import LayerShape
from .token_lm import TokenLMConfig, TokenLMDraft

KINDS: dict[str, type[EagleDraft] | type[Eagle3Draft] | type[TokenLMDraft]] = {
    EagleDraft.kind: EagleDraft,
    Eagle3Draft.kind: Eagle3Draft,
    TokenLMDraft.kind: TokenLMDraft,
}
Shape = LayerShape | TokenLMConfig
"""The config of a draft of any kind."""
