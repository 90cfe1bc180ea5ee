"""What each engine does with an EAGLE-1/2 folder: facts about the loaders of vLLM 0.32 (run) and SGLang
0.5.23 (read)."""

from __future__ import annotations

from ...core.config_values import architectures_of
from ..kind import Config, Rule, Tensors
from ..stored.engine_names import (
    LAYER_TENSORS,
    NOT_IN_SGLANG,
    NOT_IN_VLLM_EAGLE,
    SGLANG_EAGLE,
    VLLM_EAGLE,
)
from ..stored.engine_rules import (
    Findings,
    architecture,
    layers,
    missing,
    no_window,
    silu,
    surplus,
    through_redraft,
    unknown_attention,
    vllm_biases,
    vllm_model_type,
    vllm_window,
)
from .files import LAYER

PLACED = ("fc.weight", *(f"{LAYER}{name}" for name in LAYER_TENSORS))
"""Tensors that every engine needs."""
KNOWN = (
    *PLACED,
    "embed_tokens.weight",
    f"{LAYER}self_attn.rotary_emb.",
    f"{LAYER}block_sparse_moe.",
)
"""Beginnings of names that have a place, are judged by a rule of their own, or that nobody reads."""


def judged(raw: Config, tensors: Tensors) -> tuple[Config, list[str]]:
    return raw, unknown_attention(raw, tensors)


def _needed(raw: Config) -> list[str]:
    return list(PLACED)


def _vllm_eagle(raw: Config, tensors: Tensors) -> Findings:
    yield from architecture(VLLM_EAGLE, NOT_IN_VLLM_EAGLE, architectures_of(raw))
    yield from vllm_model_type(raw, tensors)
    if "embed_tokens.weight" in tensors:
        yield "note", "embed_tokens.weight is kept where it differs from the target's"


def _sglang_eagle(raw: Config, tensors: Tensors) -> Findings:
    yield from architecture(SGLANG_EAGLE, NOT_IN_SGLANG, architectures_of(raw))
    if "fc.bias" not in tensors:
        yield "wrong", "no fc.bias: fc has one all the same, at random values"
    if raw.get("bias"):
        yield "wrong", "bias: true is read as attention biases, which nothing fills"
    if "embed_tokens.weight" in tensors:
        yield "note", "embed_tokens.weight is ignored: the target's embedding is used"


def _no_routing(raw: Config, tensors: Tensors) -> Findings:
    if any("block_sparse_moe" in name for name in tensors):
        yield "refused", "routed experts (block_sparse_moe): it has no such layer"


def _no_eagle(raw: Config, tensors: Tensors) -> Findings:
    yield "refused", "EAGLE-1/2 drafts are not supported"


ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": (
        _vllm_eagle,
        _no_routing,
        missing(_needed),
        surplus(KNOWN, "refused"),
        layers,
        vllm_biases(LAYER),
        vllm_window,
        silu,
    ),
    "sglang": (
        _sglang_eagle,
        _no_routing,
        missing(_needed),
        surplus(KNOWN, "wrong"),
        layers,
        no_window,
        silu,
    ),
    "llama.cpp": (_no_eagle,),
    "transformers": (through_redraft,),
}
