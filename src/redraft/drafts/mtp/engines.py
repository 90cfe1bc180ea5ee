"""What each engine does with an MTP head: facts about vLLM 0.32 (run), llama.cpp b11434 (run, read) and SGLang 0.5.23
(read)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..kind import Config, Rule, Tensors
from ..stored.engine_rules import Findings
from .families import (
    MIMO,
    NEXTN,
    QWEN,
    Family,
    count_declared,
    feeds_raw,
    found_in,
    text_config,
)
from .network import MtpConfig
from .routed_files import declared_experts, has_experts, is_packed

FUNCTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sglang": {
        MIMO.name: {"before_norm": False},
        NEXTN.name: {"raw_feedback": False, "zero_first": False},
    },
    "llama.cpp": {
        QWEN.name: {"leading_pair": True},
        NEXTN.name: {"leading_pair": True, "raw_feedback": False, "zero_first": False},
    },
}
"""What an engine computes otherwise than vLLM, by family."""


def _as_served(engine: str) -> Callable[[MtpConfig], MtpConfig]:
    return lambda c: dataclasses.replace(c, **FUNCTIONS[engine].get(c.family, {}))


AS_SERVED = {engine: _as_served(engine) for engine in FUNCTIONS}
VLLM, LLAMACPP = (QWEN, MIMO, NEXTN), (QWEN, NEXTN)


def _family(raw: Config, tensors: Tensors) -> Family | None:
    found = found_in(raw, tensors)
    return found[0] if found else None


def _counts(raw: Config, tensors: Tensors) -> Findings:
    family = _family(raw, tensors)
    count = None if family is None else count_declared(raw, family)
    if count is not None and count > 1:
        yield "wrong", f"config.json declares {count} MTP layers, the file has one"


def _vllm(raw: Config, tensors: Tensors) -> Findings:
    family = _family(raw, tensors)
    if family not in VLLM:
        yield "unknown", "this family of MTP heads is not known to redraft's rules"
    elif count_declared(raw, family) == 0:
        yield "refused", f"{family.declared} is 0 in config.json: method mtp divides by it"
    yield from _ffn(raw, family, tensors, "refused")
    if family is NEXTN and is_packed(tensors):
        yield "refused", "its loader for this family takes experts one by one, and these are packed"
    yield "note", "says nothing of a linear layer that is missing: it runs on uninitialised values"


def _ffn(raw: Config, family: Family | None, tensors: Tensors, level: str) -> Findings:
    """Where engines build another kind of FFN than the head has, by config.json."""
    declared = 0 if family is None else declared_experts(text_config(raw), family.router)
    routed = has_experts(tensors)
    if declared and not routed:
        yield level, f"builds {declared} routed experts by config.json, and this head is dense"
    elif family is NEXTN and not routed:
        yield (
            "unknown",
            "builds a layer with routed experts for most architectures of this family, and this head has none",
        )
    elif routed and not declared:
        yield level, "builds a dense FFN by config.json, and this head has routed experts"


def _sglang(raw: Config, tensors: Tensors) -> Findings:
    family = _family(raw, tensors)
    if family is MIMO:
        yield "wrong", "hands on the state after the target's final norm, vLLM the one before it"
    yield from _ffn(raw, family, tensors, "wrong")
    if family is NEXTN and is_packed(tensors):
        yield "unknown", "whether its loader for this family takes packed experts is not known"
    yield from _other_feedback(raw, family)


def _other_feedback(raw: Config, family: Family | None) -> Findings:
    if family is not None and feeds_raw(raw, family):
        yield (
            "note",
            "from the second token on it feeds back the normed state, vLLM the one before the norm",
        )


def _llamacpp(raw: Config, tensors: Tensors) -> Findings:
    family = _family(raw, tensors)
    if family not in LLAMACPP:
        yield "refused", "has no graph for this family's head"
    elif not count_declared(raw, family):
        yield "refused", f"its converter needs {family.declared} in config.json"
    yield from _ffn(raw, family, tensors, "refused")
    if family is NEXTN and is_packed(tensors):
        yield (
            "refused",
            "its converter for this family takes experts one by one, and these are packed",
        )
    if family is NEXTN and has_experts(tensors) and int(text_config(raw).get("n_group") or 1) > 1:
        yield "wrong", "its converter writes no groups of experts (n_group): others are chosen"
    yield from _other_feedback(raw, family)
    yield "note", "reads it from the target's own GGUF: stitch it in, then convert"


def _transformers(raw: Config, tensors: Tensors) -> Findings:
    yield (
        "note",
        "drops MTP heads when it loads a model: redraft.generate runs them inside its generate",
    )


ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": (_vllm, _counts),
    "sglang": (_sglang, _counts),
    "llama.cpp": (_llamacpp, _counts),
    "transformers": (_transformers,),
}
