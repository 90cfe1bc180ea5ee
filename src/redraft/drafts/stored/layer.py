"""The decoder layer of a draft in checkpoint terms: config keys, tensor names and shapes.

What kinds of one decoder layer share. Names here are relative to the layer
(`self_attn.q_proj.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.config_values import ConfigValues
from ...core.errors import UserError
from ..layers import ACTIVATIONS
from ..one_layer import LayerShape, rotary_of
from .rope import read_rope

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAPS = {"d2t": (torch.int64, torch.int32), "t2d": (torch.bool, torch.int64, torch.uint8)}
QKV = ("q_proj", "k_proj", "v_proj")
NEUTRAL = ("partial_rotary_factor", "logit_scale")
"""Keys that change the function unless they are 1."""
ROUTED = "block_sparse_moe."
"""Prefix of an FFN of routed experts, within the layer."""
SLIDING = "sliding_attention"
MOST_NAMED = 8
"""As many tensors are named where one is missing or unknown. A layer of routed experts can have a thousand."""
LAYER_TYPES = ("full_attention", SLIDING)


VARIANTS = {
    "qkv_bias": "q, k and v have biases",
    "o_bias": "o_proj has a bias",
    "head_norms": "q and k are normed per head",
    "sliding_window": "attention sees a sliding window",
    "output_gate": "a gate on what attention yields",
    "norm_offset": "norms multiply by 1 + weight",
}
"""What a field of `LayerShape` means for the function when it is set."""


def read_layer(raw: Mapping[str, Any], names: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The `LayerShape` fields of a config.json; `names` are the layer's tensors by relative name.

    Raises UserError for a missing key, a value that is none of its kind, and a layer whose function
    redraft does not compute. `num_hidden_layers` is not read: the file says how many it has (see
    `refuse_other_layers`), and published drafts keep their target's number.
    """
    config = config_values(raw, where)
    if config.given("kv_lora_rank") or any("kv_a_proj" in name for name in names):
        raise UserError(
            f"{where}: a draft with multi-head latent attention (kv_lora_rank, as in DeepSeek and "
            "Kimi models) is not supported; redraft computes attention with q_proj, k_proj and v_proj"
        )
    for key in NEUTRAL:
        if config.number(key, 1.0) != 1.0:
            raise UserError(f"{where}: a draft with {key} {raw[key]} is not supported, only with 1")
    heads, hidden = config.positive("num_attention_heads"), config.positive("hidden_size")
    groups = config.positive("num_key_value_heads", heads)
    if heads % groups:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    head_dim = config.positive("head_dim", max(hidden // heads, 1))
    if head_dim % 2:
        raise UserError(
            f"{config.where}: rotary embeddings need an even head_dim, found {head_dim} "
            f"(hidden_size {hidden}, {heads} heads)"
        )
    activation = config.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act '{activation}' is not one of {', '.join(ACTIVATIONS)}"
        )
    everywhere = config.flag("attention_bias")
    return {
        "hidden_size": hidden,
        "intermediate_size": config.positive("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "vocab_size": config.positive("vocab_size"),
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6),
        "hidden_act": activation,
        "max_position_embeddings": config.positive("max_position_embeddings", 2048),
        "rope_parameters": read_rope(config),
        "qkv_bias": config.flag("qkv_bias", everywhere),
        # Engines differ on o_proj under attention_bias; the file itself says whether it has one.
        "o_bias": everywhere and "self_attn.o_proj.bias" in names,
        "head_norms": config.text("model_type", "") == "qwen3"
        or "self_attn.q_norm.weight" in names,
        "sliding_window": _window(config),
    }


def config_values(raw: Mapping[str, Any], where: Path) -> ConfigValues:
    """The values of the config.json of a folder."""
    return ConfigValues(raw, f"{where}/config.json")


def renamed(
    stored: Mapping[str, Tensor], canonical: Callable[[str], str], where: Path
) -> dict[str, Tensor]:
    """Tensors under redraft's names. Raises UserError where two of a file are the same one."""
    origins: dict[str, str] = {}
    for name in stored:
        first = origins.setdefault(canonical(name), name)
        if first != name:
            raise UserError(
                f"{where}: {first} and {name} are two names of one tensor; remove the stale one"
            )
    return {name: stored[origin] for name, origin in origins.items()}


def refuse_routing(where: Path) -> None:
    """Raise UserError for routed experts in another draft than EDA's."""
    raise UserError(
        f"{where}: routed shared and private experts ({ROUTED[:-1]}) are read in EDA's "
        "reference layout only, an EAGLE-1/2 draft with fc.weight and one layer, layers.0"
    )


def refuse_other_layers(names: Iterable[str], where: Path) -> None:
    """Raise UserError where the file has tensors of a second decoder layer."""
    others = sorted({found[0] for name in names if (found := re.match(r"layers\.[1-9]\d*", name))})
    if others:
        raise UserError(
            f"{where}: expected one decoder layer, the file also has {', '.join(others[:3])}; "
            "drafts of several layers are not supported"
        )


def write_layer(c: LayerShape) -> dict[str, Any]:
    """The config.json keys of a layer, complete enough for engines that fill in no defaults."""
    config: dict[str, Any] = {
        "model_type": "qwen3" if c.head_norms else "llama",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": c.hidden_act,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_parameters["rope_theta"],
        "rope_parameters": c.rope_parameters,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": False,
    }
    if c.rope_parameters["rope_type"] != "default":
        config["rope_scaling"] = c.rope_parameters
    if c.o_bias:
        config["attention_bias"] = True
    elif c.qkv_bias:
        config["qkv_bias"] = True
    if c.sliding_window is not None:
        config["sliding_window"] = c.sliding_window
        config["layer_types"] = [SLIDING]
    return config


def layer_shapes(c: LayerShape, wide: int) -> dict[str, tuple[int, ...]]:
    """Required tensors of the layer by relative name; `wide` is what q, k and v read."""
    H, C = c.hidden_size, c.head_dim
    width = c.intermediate_size
    rows = {
        "q_proj": c.num_attention_heads * C * (1 + c.output_gate),
        "k_proj": c.num_key_value_heads * C,
        "v_proj": c.num_key_value_heads * C,
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}.weight": (rows[name], wide) for name in QKV
    }
    if c.qkv_bias:
        shapes.update({f"self_attn.{name}.bias": (rows[name],) for name in QKV})
    shapes["self_attn.o_proj.weight"] = (H, c.num_attention_heads * C)
    if c.o_bias:
        shapes["self_attn.o_proj.bias"] = (H,)
    if c.head_norms:
        shapes.update({f"self_attn.{name}_norm.weight": (C,) for name in "qk"})
    shapes.update({f"mlp.{name}_proj.weight": (width, H) for name in ("gate", "up")})
    shapes["mlp.down_proj.weight"] = (H, width)
    shapes["post_attention_layernorm.weight"] = (H,)
    return shapes


def check_tensors(
    tensors: Mapping[str, Tensor],
    required: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Raise UserError naming every missing, unknown, misshapen, mistyped or non-finite tensor.

    Engines load a draft with a missing tensor without complaint and serve it at low acceptance.
    """
    missing = sorted(set(required) - set(tensors))
    extra = sorted(set(tensors) - set(required) - set(optional))
    problems = [f"missing {_listed(missing)}"] if missing else []
    problems += [f"unknown {_listed(extra)}"] if extra else []
    for name, shape in {**optional, **required}.items():
        if name in tensors:
            problems += _wrong(name, tensors[name], shape)
    if problems:
        raise UserError(f"{where}: tensors do not match the layout: {'; '.join(problems)}")


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _wrong(name: str, tensor: Tensor, shape: tuple[int, ...]) -> list[str]:
    if tuple(tensor.shape) != shape:
        return [
            f"{name} should be {list(shape)} according to config.json, found {list(tensor.shape)}"
        ]
    if name in MAPS:
        if tensor.dtype not in MAPS[name]:
            return [f"{name} is stored as {tensor.dtype}, expected {MAPS[name][0]}"]
    elif tensor.dtype not in FLOATS:
        return [
            f"{name} is stored as {tensor.dtype}, expected float32, bfloat16 or float16 (quantised "
            "drafts are not supported)"
        ]
    elif not bool(torch.isfinite(tensor).all()):
        return [f"{name} holds values that are not finite: the file is damaged"]
    return []


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds anything but zeros."""
    return bool(tensor.to(torch.float32).any())


def check_rotary(c: LayerShape, where: Path) -> None:
    """Raise UserError where a layer's rotary frequencies cannot be computed."""
    try:
        rotary_of(c)
    except UserError as problem:
        raise UserError(f"{where}/config.json: {problem}") from None


def _window(config: ConfigValues) -> int | None:
    """The layer's sliding window, if its layer type says that it slides."""
    types = config.texts("layer_types")
    if types and types[0] not in LAYER_TYPES:
        config.refuse("layer_types", f"one of {', '.join(LAYER_TYPES)} first")
    slides = types[0] == SLIDING if types else config.flag("use_sliding_window")
    return config.positive("sliding_window") if slides and config.given("sliding_window") else None
