"""Families of MTP heads: whose names the tensors have, what declares them, and what they compute.

Facts of the loaders and graphs of vLLM 0.32 (run), SGLang, llama.cpp b11434 and Transformers 5.23 (read). Names do
not tell the function: which state of the target enters differs by family, and nothing breaks when it is the wrong
one; acceptance falls.

n is the target's number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.config_values import architectures_of
from ..kind import Config

EMBEDDING, HEAD = "embed_tokens.weight", "shared_head.head.weight"
TRUNK = re.compile(r"^(?:model\.|language_model\.)+layers\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """A way to name, declare and compute an MTP head.

    `prefix` is a pattern of what its tensors' names begin with, `{n}` in it the number of the target's layers;
    `write` is that beginning where none is given. `names` are redraft's names of the tensors by those in the file,
    relative to the prefix; the decoder layer's tensors follow `layer`.
    """

    name: str
    architecture: str
    model_type: str
    served: tuple[str, ...]
    """How names of architectures begin that have it."""
    prefix: str
    write: str
    names: Mapping[str, str]
    layer: str
    declared: str
    """The key of config.json that counts its layers."""
    norm_offset: float = 0.0
    gated: bool = False
    rotary_share: float = 1.0
    state_first: bool = False
    """fc reads [state; embedding]."""
    before_norm: bool = False
    """A chain starts in the target's state before its final norm."""
    raw_feedback: tuple[str, ...] = ()
    """How names of architectures begin whose chains go on in the state before the head's own final norm."""
    zero_first: bool = False
    """The embedding of the first pair is zeros."""
    copies: tuple[str, ...] = ()
    """Copies of the target's embedding and head that the file may hold; engines use the target's."""
    router: str = ""
    """How layers with routed experts choose them, as `routed.py` names it; "": redraft computes none in this family."""
    assumed: bool = False
    """Whether engines assume a head where config.json does not count its layers."""
    uncounted: tuple[str, ...] = ()
    """How names of architectures begin whose config.json has no such count and needs none: there is one layer."""


QWEN = Family(
    name="qwen3_5",
    architecture="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    served=("Qwen3_5", "Qwen3Next", "Qwen3_6", "Qwen3_8"),
    prefix=r"(?:[a-z_]+\.)*mtp\.",
    write="mtp.",
    names={
        "fc.weight": "fc.weight",
        "pre_fc_norm_embedding.weight": "embedding_norm.weight",
        "pre_fc_norm_hidden.weight": "hidden_norm.weight",
        "norm.weight": "norm.weight",
    },
    layer="layers.0.",
    declared="mtp_num_hidden_layers",
    norm_offset=1.0,
    gated=True,
    rotary_share=0.25,
    router="softmax",
    assumed=True,
    uncounted=("Qwen3Next",),
)
MIMO = Family(
    name="mimo",
    architecture="MiMoForCausalLM",
    model_type="qwen2",
    served=("MiMoForCausalLM",),
    prefix=r"model\.mtp_layers\.0\.",
    write="model.mtp_layers.0.",
    names={
        "input_proj.weight": "fc.weight",
        "token_layernorm.weight": "embedding_norm.weight",
        "hidden_layernorm.weight": "hidden_norm.weight",
        "final_layernorm.weight": "norm.weight",
    },
    layer="",
    declared="num_nextn_predict_layers",
    state_first=True,
    before_norm=True,  # in vLLM; SGLang hands on the state after the norm
    zero_first=True,
)
NEXTN = Family(
    name="nextn",
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    served=("Glm4", "Glm5", "GlmMoe", "GlmOcr", "DeepseekV3", "DeepseekV32"),
    prefix=r"(?:model\.|language_model\.)+layers\.{n}\.",
    write="model.layers.{n}.",
    names={
        "eh_proj.weight": "fc.weight",
        "enorm.weight": "embedding_norm.weight",
        "hnorm.weight": "hidden_norm.weight",
        "shared_head.norm.weight": "norm.weight",
    },
    layer="",
    declared="num_nextn_predict_layers",
    raw_feedback=(
        "Glm4Moe",
    ),  # in vLLM; llama.cpp, SGLang and Transformers feed back the normed state
    zero_first=True,  # in vLLM
    copies=(EMBEDDING, HEAD),
    router="sigmoid",
)
FAMILIES = (QWEN, MIMO, NEXTN)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def text_config(raw: Config) -> Mapping[str, Any]:
    """The keys of the language model, whether or not others see and hear with it."""
    inner = raw.get("text_config")
    return inner if isinstance(inner, Mapping) else raw


def layers_of(raw: Config) -> int:
    """The number of the target's layers; 0 where config.json gives none."""
    count = text_config(raw).get("num_hidden_layers")
    return count if isinstance(count, int) else 0


def found_in(raw: Config, names: Iterable[str]) -> tuple[Family, str] | None:
    """The family whose head is among these names, and what the head's names begin with.

    Of the tensors around the decoder layer one at least has to be there. Names alike mean other functions in
    architectures that are not known, so those have none.
    """
    names = list(names)
    architecture = (*architectures_of(raw), "")[0]
    for family in FAMILIES:
        if architecture and not architecture.startswith(family.served):
            continue
        around = "|".join(re.escape(name) for name in family.names)
        prefix = family.prefix.replace("{n}", str(layers_of(raw)))
        pattern = re.compile(f"^({prefix})(?:{around})$")
        for name in names:
            if found := pattern.match(name):
                return family, found[1]
    return None


def declared_by(raw: Config) -> Family | None:
    """The family that a target of this config.json has its head of, if it is to have one that is known."""
    architecture = (*architectures_of(raw), "")[0]
    for family in FAMILIES:
        count = count_declared(raw, family)
        if architecture.startswith(family.served) and (family.assumed if count is None else count):
            return family
    return None


def unknown_key(raw: Config) -> str | None:
    """The key that counts MTP layers in the config.json of a family that is not known."""
    if declared_by(raw) is not None:
        return None
    return next((f.declared for f in FAMILIES if (count_declared(raw, f) or 0) > 0), None)


def count_declared(raw: Config, family: Family) -> int | None:
    """How many layers config.json declares; None where it does not say."""
    for place in (text_config(raw), raw):
        count = place.get(family.declared)
        if isinstance(count, int):
            return count
    return 1 if _begins(raw, family.uncounted) else None


def feeds_raw(raw: Config, family: Family) -> bool:
    """Whether a chain of a target of this config.json goes on in the state before the head's norm."""
    return _begins(raw, family.raw_feedback)


def _begins(raw: Config, names: tuple[str, ...]) -> bool:
    """Whether the name of the architecture begins with one of these."""
    return (*architectures_of(raw), "")[0].startswith(names)


def has_trunk(raw: Config, names: Collection[str]) -> bool:
    """Whether layers of the target are among these names."""
    found = (TRUNK.match(name) for name in names)
    return any(one and int(one[1]) < layers_of(raw) for one in found)
