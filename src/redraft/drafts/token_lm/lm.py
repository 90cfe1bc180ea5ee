"""The Transformers model behind a token LM: its config, its modules, and a small one for a target."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError, as_sentence
from ...core.rng import seeded
from ..layers import ACTIVATIONS, GatedFFN

LAYERS = 2
"""Decoder layers of a token LM that is made for a target."""
ATTENTION = {"full_attention", "sliding_attention"}
FFN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TokenLMConfig:
    """The LM's config.json, but for the width of its FFN, which an expert changes."""

    raw: Mapping[str, Any]
    intermediate_size: int

    @cached_property
    def of_transformers(self) -> Any:
        """The same as Transformers' own config. Raises UserError for what that does not take."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        model_type = self.raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise UserError(
                f"config.json: model_type '{model_type}' is none that Transformers knows without "
                "remote code"
            )
        with as_sentence(f"config.json of a {model_type} model"):
            return CONFIG_MAPPING[model_type].from_dict(self.json())

    def json(self) -> dict[str, Any]:
        """The whole config.json."""
        return {**self.raw, "intermediate_size": self.intermediate_size}

    @property
    def hidden_size(self) -> int:
        return int(self.of_transformers.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.of_transformers.vocab_size)

    @property
    def num_attention_heads(self) -> int:
        return int(self.of_transformers.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        own = getattr(self.of_transformers, "num_key_value_heads", None)
        return int(own or self.num_attention_heads)

    @property
    def num_hidden_layers(self) -> int:
        return int(self.of_transformers.num_hidden_layers)


def new_lm(
    config: TokenLMConfig, *, filled: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    """The Transformers model of a config, with fresh weights or (much faster) with none.

    Raises UserError for a model that is no plain causal LM with an attention cache.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    theirs = config.of_transformers
    name = theirs.model_type
    if theirs.get_text_config() is not theirs:
        raise UserError(
            f"a {name} model reads more than text; a token_lm draft is a plain causal LM"
        )
    unknown = set(getattr(theirs, "layer_types", None) or ()) - ATTENTION
    with (
        as_sentence(f"config.json of a {name} model"),
        contextlib.nullcontext() if filled else no_init_weights(),
    ):
        lm: Any = AutoModelForCausalLM.from_config(theirs, dtype=dtype, trust_remote_code=False)
    if unknown or getattr(lm, "_is_stateful", False):
        what = f"layers of kind {', '.join(sorted(unknown))}" if unknown else "a recurrent state"
        raise UserError(
            f"a {name} model has {what}, which cannot be rolled back after a rejected token; a "
            "token_lm draft needs full or sliding attention"
        )
    lm.tie_weights()
    lm.eval()
    return lm


@dataclass(frozen=True)
class Skeleton:
    """What a config says of the LM's checkpoint: tensors by name, those with a row per token, and
    patterns of names that old checkpoints hold and nobody reads."""

    shapes: dict[str, tuple[int, ...]]
    vocabulary: tuple[str, ...]
    tied: str | None
    ignored: tuple[str, ...]


def skeleton(config: TokenLMConfig) -> Skeleton:
    """Found without making a tensor. `tied` is the head's name where it is stored as the embedding."""
    with torch.device("meta"):
        lm = new_lm(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    head = f"{head_name(lm)}.weight"
    tied = head if is_tied(lm) else None
    if tied:
        del shapes[head]
    embedding = _name_of(lm, lm.get_input_embeddings())
    rows = [f"{embedding}.weight", head, head.replace(".weight", ".bias")]
    return Skeleton(
        shapes,
        tuple(name for name in rows if name in shapes),
        tied,
        tuple(getattr(lm, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )


def is_tied(lm: Any) -> bool:
    """Whether the LM's head is its embedding."""
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    return head is not None and head.weight is embedding.weight and head.bias is None


def shaped(config: Any, logits: Tensor) -> Tensor:
    """What an architecture does to its head's output: a scale, a soft cap."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if scale is not None:
        logits = logits * scale
    if divisor is not None:
        logits = logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap


def use_gated_ffns(lm: Any, width: int) -> None:
    """Replace gated FFNs by `GatedFFN` with the same tensors, in place, where that computes the same.

    All or none: an expert goes to every layer, and config.json has one width.
    """
    ffns = {name: module for name, module in lm.named_modules() if name.endswith(".mlp")}
    gated = {name: made for name, module in ffns.items() if (made := _gated(module, width))}
    if len(gated) != lm.config.num_hidden_layers or len({type(m) for m in ffns.values()}) != 1:
        return
    name, made = next(iter(gated.items()))
    x = torch.randn(1, made.gate_proj.in_features, generator=seeded(0, "gated"))
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=seeded(0, "gated", "weights")))
        if not torch.allclose(made(x), ffns[name](x), rtol=1e-4, atol=1e-4):
            return
    for name, made in gated.items():
        parent, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(parent), attribute, made)


def _gated(module: nn.Module, width: int) -> GatedFFN | None:
    """A `GatedFFN` of an FFN's own parts, if it has just those."""
    from transformers.activations import ACT2FN

    parts = [getattr(module, name, None) for name in FFN]
    linears: list[Any] = [p for p in parts if isinstance(p, nn.Linear) and p.bias is None]
    act = getattr(module, "act_fn", None)
    names = [name for name in ACTIVATIONS if type(ACT2FN[name]) is type(act)]
    if len(linears) != len(list(module.parameters())) or len(linears) != len(FFN) or not names:
        return None
    if linears[0].out_features != width:
        return None
    made = GatedFFN(1, 1, names[0])
    made.gate_proj, made.up_proj, made.down_proj = linears
    return made


def head_name(lm: Any) -> str:
    """The attribute of the LM that is its head. Raises UserError where there is none to take."""
    head = lm.get_output_embeddings()
    name = "" if head is None else _name_of(lm, head)
    others = {child for child, _ in lm.named_children()} - {lm.base_model_prefix, name}
    if lm.base_model is lm or not name or "." in name or others:
        raise UserError(
            f"{type(lm).__name__} is not a body and a head ({', '.join(sorted(others)) or 'no head'} "
            "next to them), so it cannot be a token_lm draft"
        )
    return name


def _name_of(lm: Any, module: nn.Module) -> str:
    names: dict[int, str] = {id(other): name for name, other in lm.named_modules()}
    return names[id(module)]


def small_config(config: Any, width: int | None) -> TokenLMConfig:
    """The config of a small LM of the same architecture and vocabulary."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    small = copy.deepcopy(config)
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    layers = min(LAYERS, config.num_hidden_layers)
    small.num_attention_heads = max(heads // 2, 1)
    small.hidden_size = max(round(hidden / 2 / size), 1) * size
    if not hasattr(config, "head_dim"):
        small.hidden_size = small.num_attention_heads * size
    if (groups := getattr(config, "num_key_value_heads", None)) is not None:
        small.num_key_value_heads = math.gcd(groups, small.num_attention_heads)
    ffn = getattr(config, "intermediate_size", None) or 4 * hidden
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, value[:layers])
    small.num_hidden_layers = layers
    small.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    raw = json.loads(small.to_json_string())
    for key in ("quantization_config", "dtype", "torch_dtype", "intermediate_size"):
        raw.pop(key, None)
    return TokenLMConfig(raw, width or max(ffn * small.hidden_size // hidden, 1))
