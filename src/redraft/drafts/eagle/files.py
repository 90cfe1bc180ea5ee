"""EAGLE-1/EAGLE-2 checkpoint folders: SafeAILab's files, and what vLLM and SGLang want of them.

Root-level names, layer 0 without `input_layernorm`, no head and no final norm (both are the
target's). `fc.bias` divides the engines: SafeAILab's files have it unless config.json says
`bias: false`, vLLM drops it without a word, SGLang always has one and leaves it at random values
when the file has none. So one set of weights becomes two folders: `vllm-eagle` without it,
`sglang-eagle` with (zeros where the draft has none).

EDA's reference code stores the same with routed experts for the FFN (`routed.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...core.errors import UserError
from ...models.target import Target
from ..base import Draft
from ..kind import Config, Files, Named, Tensors
from ..stored.layer import (
    ROUTED,
    check_rotary,
    check_tensors,
    config_values,
    has_values,
    layer_shapes,
    read_layer,
    refuse_other_layers,
    refuse_routing,
    renamed,
    write_layer,
)
from ..stored.second_reading import IDS, by_the_reference, target_head
from .network import EagleConfig, EagleDraft
from .routed_files import (
    NAMED,
    fold,
    read_routed,
    refuse_routed,
    routed_shapes,
)

Value = TypeVar("Value")
LAYER = "layers.0."
REFERENCE = "EDA reference"
VLLM_ARCHITECTURE = "LlamaForCausalLM"
SGLANG_ARCHITECTURE = "LlamaForCausalLMEagle"
SGLANG_QWEN2 = "Qwen2ForCausalLMEagle"


def recognises(raw: Config, tensors: Tensors, where: Path) -> bool:
    """Whether these tensor names are an EAGLE-1/2 draft's."""
    return "fc.weight" in tensors and any(name.startswith(LAYER) for name in tensors)


def recognises_reference(raw: Config, tensors: Tensors, where: Path) -> bool:
    """Whether this is a draft of EDA's reference code. Raises UserError for other routed experts."""
    routed = any(ROUTED in name for name in tensors)
    if routed and not recognises(raw, tensors, where):
        refuse_routing(where)
    return routed


def in_words(raw: Config, stored: Tensors, where: Path) -> str:
    """What a checkpoint of EDA's reference code is."""
    try:
        shape = read_routed(raw, _relative(stored), where)
    except UserError:  # `parse` says why
        return REFERENCE
    if shape.dense:
        return f"{REFERENCE} (one shared and one private expert, read as one dense FFN)"
    return f"{REFERENCE} ({shape})"


def parse(
    raw: Mapping[str, Any], stored: Mapping[str, Tensor], where: Path
) -> tuple[EagleConfig, dict[str, Tensor]]:
    """The shape of a stored draft and its tensors under redraft's names.

    A bias of zeros is dropped: it changes nothing, and exports write what each engine wants. One
    shared and one private expert become the dense FFN that they are. Raises UserError naming what is missing, extra, or of another function.
    """
    tensors = renamed(stored, _named, where)
    for name, what in (
        (f"{LAYER}input_layernorm.weight", "a norm before the first layer's attention"),
        ("norm.weight", "a final norm"),
        ("lm_head.weight", "a head of its own"),
    ):
        if name in tensors:
            raise UserError(
                f"{where}: an EAGLE-1/2 draft has no {name} ({what} is another function, and vLLM "
                "refuses the file)"
            )
    refuse_other_layers(tensors, where)
    relative = _relative(stored)
    # `bias` is fc's here; engines read the same key as attention biases.
    layer = read_layer(raw, relative, where)
    biased = config_values(raw, where).flag("bias")
    if "fc.bias" in tensors and not has_values(tensors["fc.bias"]):
        del tensors["fc.bias"]
    elif biased and "fc.bias" not in tensors:
        raise UserError(
            f"{where}: config.json says bias: true, but there is no fc.bias; a tensor is missing, "
            "or the key should be false (engines read it as attention biases)"
        )
    config = EagleConfig(**layer, fc_bias="fc.bias" in tensors)
    if not any(ROUTED in name for name in stored):
        check_tensors(tensors, *expected_shapes(config), str(where))
        check_rotary(config, where)
        return config, tensors
    shape = read_routed(raw, relative, where)
    config = dataclasses.replace(config, routed=shape)
    required, optional = expected_shapes(config)
    check_tensors(_as_stored(tensors), _as_stored(required), optional, str(where))
    check_rotary(config, where)
    if not shape.dense:
        return config, tensors
    outside = {name: t for name, t in tensors.items() if not name.startswith(LAYER)}
    dense = {LAYER + name: t for name, t in fold(relative).items()}
    width = config.intermediate_size + shape.private_width
    return dataclasses.replace(config, routed=None, intermediate_size=width), {**outside, **dense}


def canonical(stored: str) -> str:
    """A stored tensor's name without its prefix."""
    return stored.removeprefix("model.")


def _named(stored: str) -> str:
    """redraft's name of a stored tensor."""
    return canonical(stored).replace(f"{LAYER}{ROUTED}", f"{LAYER}{NAMED}")


def _as_stored(named: Mapping[str, Value]) -> dict[str, Value]:
    """By the names in EDA's files, which messages quote."""
    return {n.replace(f"{LAYER}{NAMED}", f"{LAYER}{ROUTED}"): value for n, value in named.items()}


def _relative(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's tensors under redraft's names, relative to the layer."""
    named = {_named(name): tensor for name, tensor in stored.items()}
    return {n.removeprefix(LAYER): t for n, t in named.items() if n.startswith(LAYER)}


def build(config: EagleConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> EagleDraft:
    """A draft computing in `dtype` from tensors as stored."""
    draft = EagleDraft(config)
    if "embed_tokens.weight" in tensors:
        draft.embed_tokens = torch.nn.Embedding(*tensors["embed_tokens.weight"].shape)
    draft.to(dtype).load_state_dict({n: t.to(dtype) for n, t in tensors.items()})
    return draft.eval().requires_grad_(False)


def expected_shapes(
    c: EagleConfig,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Required and optional tensors of a draft of shape `c`: name -> shape."""
    H = c.hidden_size
    layer = layer_shapes(c, H)
    if c.routed is not None:
        layer = {name: shape for name, shape in layer.items() if not name.startswith(NAMED)}
        layer |= routed_shapes(c.routed, H, c.intermediate_size)
    required = {"fc.weight": (H, 2 * H), **{LAYER + n: shape for n, shape in layer.items()}}
    if c.fc_bias:
        required["fc.bias"] = (H,)
    return required, {"embed_tokens.weight": (c.vocab_size, H)}


def for_vllm(c: EagleConfig, tensors: dict[str, Tensor], target: str) -> Files:
    """config.json and tensors for vLLM's `method: eagle`. Raises UserError for a draft with fc.bias."""
    if c.fc_bias:
        raise UserError(
            "this draft has an fc.bias that is not zero, and vLLM would drop it without a word and "
            "serve at low acceptance; export it with --format sglang-eagle, or train a draft "
            "without one (redraft train --method scratch --kind eagle)"
        )
    return _config_json(c, VLLM_ARCHITECTURE), dict(tensors)


def for_sglang(c: EagleConfig, tensors: dict[str, Tensor], target: str) -> Files:
    """config.json and tensors for SGLang's EAGLE: fc.bias is always written."""
    weight = tensors["fc.weight"]
    bias = tensors.get("fc.bias", torch.zeros(weight.shape[0], dtype=weight.dtype))
    return _config_json(c, SGLANG_ARCHITECTURE), {**tensors, "fc.bias": bias}


def _config_json(c: EagleConfig, architecture: str) -> dict[str, Any]:
    refuse_routed(c.routed)
    if architecture == SGLANG_ARCHITECTURE and c.qkv_bias:
        architecture = SGLANG_QWEN2  # its q, k and v always have a bias
    if c.head_norms:
        raise UserError("no engine serves an EAGLE-1/2 draft with q_norm and k_norm")
    return {"architectures": [architecture], **write_layer(c), "bias": False}


def check_servable(c: EagleConfig) -> None:
    """Raise UserError for routed experts."""
    refuse_routed(c.routed)


def reads(c: EagleConfig | None, num_layers: int | None) -> str:
    """What it reads of the target, in words."""
    return "hs[n], the state after the target's final norm"


def config_variants(
    c: EagleConfig, tensors: Tensors, target: Target
) -> Iterator[tuple[str, Named]]:
    """Without the bias of fc."""
    if c.fc_bias:
        without = {name: t for name, t in tensors.items() if name != "fc.bias"}
        yield "fc.bias should not be there", (dataclasses.replace(c, fc_bias=False), without)


def second_reading(draft: Draft, folder: Path) -> float:
    """The reference's, with a head as the target would have."""
    assert isinstance(draft, EagleDraft)
    draft.head = torch.nn.Linear(draft.hidden_size, IDS, bias=False, dtype=torch.float64)
    draft.head.weight.copy_(target_head(draft.hidden_size))
    return by_the_reference(draft, folder)
