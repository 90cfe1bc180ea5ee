"""The decoder layer of a draft in checkpoint terms: config keys, tensor names and shapes.

What the layouts `eagle` and `eagle3` share. Names here are relative to the layer
(`self_attn.q_proj.weight`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drafts.layers import ACTIVATIONS
from ..drafts.one_layer import LayerShape
from ..errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAPS = {"d2t": (torch.int64, torch.int32), "t2d": (torch.bool, torch.int64, torch.uint8)}
QKV = ("q_proj", "k_proj", "v_proj")


def read_layer(raw: Mapping[str, Any], names: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """The `LayerShape` fields of a config.json; `names` are the layer's tensors by relative name.

    Raises UserError for a missing key, and for a layer whose function redraft does not compute.
    """
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        vocab, width = int(raw["vocab_size"]), int(raw["intermediate_size"])
    except KeyError as missing:
        raise UserError(f"{where}/config.json: expected a key {missing}, found none") from None
    layers = raw.get("num_hidden_layers", 1)
    if layers != 1:
        raise UserError(
            f"{where}: expected one decoder layer, this draft has {layers} (num_hidden_layers); "
            "drafts of several layers are not supported"
        )
    activation = str(raw.get("hidden_act", "silu"))
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act '{activation}' is not one of {', '.join(ACTIVATIONS)}"
        )
    everywhere = bool(raw.get("attention_bias"))
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": int(raw.get("num_key_value_heads") or heads),
        "head_dim": int(raw.get("head_dim") or hidden // heads),
        "vocab_size": vocab,
        "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "hidden_act": activation,
        "max_position_embeddings": int(raw.get("max_position_embeddings", 2048)),
        "rope_parameters": _rope(raw, where),
        "qkv_bias": bool(raw.get("qkv_bias", everywhere)),
        # Engines differ on o_proj under attention_bias; the file itself says whether it has one.
        "o_bias": everywhere and "self_attn.o_proj.bias" in names,
        "head_norms": raw.get("model_type") == "qwen3" or "self_attn.q_norm.weight" in names,
        "sliding_window": _window(raw),
    }


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
        config["layer_types"] = ["sliding_attention"]
    return config


def layer_shapes(c: LayerShape, wide: int) -> dict[str, tuple[int, ...]]:
    """Required tensors of the layer by relative name; `wide` is what q, k and v read."""
    H, C = c.hidden_size, c.head_dim
    width = c.intermediate_size
    rows = {
        "q_proj": c.num_attention_heads * C,
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
    problems = [f"missing {', '.join(missing)}"] if missing else []
    problems += [f"unknown {', '.join(extra)}"] if extra else []
    for name, shape in {**optional, **required}.items():
        if name in tensors:
            problems += _wrong(name, tensors[name], shape)
    if problems:
        raise UserError(f"{where}: tensors do not match the layout: {'; '.join(problems)}")


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


def _window(raw: Mapping[str, Any]) -> int | None:
    """The layer's sliding window, if its layer type says that it slides."""
    types = raw.get("layer_types")
    slides = types[0] == "sliding_attention" if types else bool(raw.get("use_sliding_window"))
    return int(raw["sliding_window"]) if slides and raw.get("sliding_window") else None


def _rope(raw: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """RoPE settings from either generation of config keys."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", float(raw.get("rope_theta", 10000.0)))
    if rope["rope_type"] in ("dynamic", "longrope"):
        raise UserError(
            f"{where}: a draft with '{rope['rope_type']}' rotary embeddings is not supported"
        )
    return rope
