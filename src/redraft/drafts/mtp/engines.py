"""What each engine does with an MTP head: facts about vLLM 0.32 (run), llama.cpp b11434 (run, read) and SGLang 0.5.23
(read)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..kind import Config, Rule, Tensors
from ..stored.engine_rules import Findings, through_redraft
from .families import MIMO, NEXTN, QWEN, Family, count_declared, found_in
from .network import MtpConfig

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
    if family is not None and count == 0:
        yield "refused", f"{family.declared} is 0 in config.json: method mtp divides by it"
    if count is not None and count > 1:
        yield "wrong", f"config.json declares {count} MTP layers, the file has one"


def _vllm(raw: Config, tensors: Tensors) -> Findings:
    if _family(raw, tensors) not in VLLM:
        yield "unknown", "this family of MTP heads is not known to redraft's rules"
    yield "note", "says nothing of a linear layer that is missing: it runs on uninitialised values"


def _sglang(raw: Config, tensors: Tensors) -> Findings:
    family = _family(raw, tensors)
    if family is MIMO:
        yield "wrong", "hands on the state after the target's final norm, vLLM the one before it"
    if family is NEXTN:
        yield (
            "wrong",
            "from the second token on it feeds back the state after shared_head.norm, vLLM the one before it",
        )


def _llamacpp(raw: Config, tensors: Tensors) -> Findings:
    family = _family(raw, tensors)
    if family not in LLAMACPP:
        yield "refused", "has no graph for this family's head"
    if family is NEXTN:
        yield (
            "wrong",
            "from the second token on it feeds back the state after shared_head.norm, vLLM the one before it",
        )
    if family is not None and count_declared(raw, family) is None:
        yield "refused", f"its converter needs {family.declared} in config.json"
    yield (
        "note",
        "needs the head inside the target's GGUF, or as --model-draft of the same conversion",
    )


ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": (_vllm, _counts),
    "sglang": (_sglang, _counts),
    "llama.cpp": (_llamacpp, _counts),
    "transformers": (through_redraft,),
}
