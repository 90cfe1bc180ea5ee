"""EAGLE-3 checkpoint folders: the layout that vLLM, SGLang and llama.cpp's converter all read.

Root-level names, `midlayer.` (or `layers.0.` on the way in), `lm_head.weight` over the draft
vocabulary, `d2t` as offsets (target id = draft id + d2t) and `t2d` as a mask, both only when the
draft vocabulary is smaller than the target's. Taps other than the default set are written in both
numberings (vLLM: hs[k]; SGLang: output of layer k-1), because the engines differ by one.

Variants with another function (norm before residual or before fc, normed output, biases, several
layers) are refused by name; none is approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drafts.eagle3 import Eagle3Config, Eagle3Draft
from ..drafts.layers import ACTIVATIONS
from ..errors import UserError
from .folders import check_names, read_json, read_tensors, write_folder

FORMAT = "eagle3"
ARCHITECTURE = "LlamaForCausalLMEagle3"
REFUSED = {
    "norm_before_residual": "norm before residual",
    "norm_before_fc": "norm before fc",
    "fc_norm": "a norm on each tap",
    "norm_output": "a normed state fed back",
    "attention_bias": "attention biases",
    "qkv_bias": "attention biases",
    "bias": "biases",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
REQUIRED = [
    "fc.weight",
    "norm.weight",
    "lm_head.weight",
    *(f"midlayer.self_attn.{p}.weight" for p in _PROJECTIONS),
    *(f"midlayer.mlp.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")),
    *(
        f"midlayer.{n}.weight"
        for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    ),
]


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes an EAGLE-3 draft in this layout."""
    names = " ".join(config.get("architectures") or [])
    return "eagle3" in names.lower() and "speculators_config" not in config


def read(folder: Path) -> tuple[Eagle3Config, dict[str, Tensor]]:
    """The shape of a stored draft and its tensors under redraft's names.

    Raises UserError naming what is missing, extra, or of another function.
    """
    raw = read_json(folder / "config.json")
    nested = raw.get("eagle_config") or {}
    if nested.get("use_aux_hidden_state") is False:
        raise UserError(f"{folder}: the draft reads one hidden state (use_aux_hidden_state false)")
    for key, meaning in REFUSED.items():
        if raw.get(key) or nested.get(key):
            raise UserError(f"{folder}: the draft uses {meaning} ('{key}'), which is not supported")
    if raw.get("num_hidden_layers", 1) != 1:
        raise UserError(
            f"{folder}: an eagle3 draft has one decoder layer, this one has "
            f"{raw['num_hidden_layers']} (num_hidden_layers)"
        )
    tensors = {_name(key): tensor for key, tensor in read_tensors(folder).items()}
    check_names(tensors, REQUIRED, ("embed_tokens.weight", "d2t", "t2d"), str(folder))
    config = _shape(raw, tensors, folder)
    for name, shape in expected_shapes(config).items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{folder}: {name} should be {list(shape)} according to config.json, found "
                f"{list(tensors[name].shape)}"
            )
    return config, tensors


def build(config: Eagle3Config, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Eagle3Draft:
    """A draft computing in `dtype` from tensors as stored."""
    draft_vocab = None
    if "d2t" in tensors:
        draft_vocab = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        if (
            not bool((draft_vocab[1:] > draft_vocab[:-1]).all())
            or int(draft_vocab[-1]) >= config.vocab_size
        ):
            raise UserError(
                "d2t does not lead to ascending target ids inside the vocabulary: expected offsets "
                "(target id = draft id + d2t), perhaps these are absolute ids"
            )
    draft = Eagle3Draft(config, draft_vocab)
    if "embed_tokens.weight" in tensors:
        draft.embed_tokens = torch.nn.Embedding(*tensors["embed_tokens.weight"].shape)
    weights = {n: t.to(dtype) for n, t in tensors.items() if n not in ("d2t", "t2d")}
    draft.to(dtype).load_state_dict(weights)
    return draft.eval().requires_grad_(False)


def write(
    folder: Path, config: Eagle3Config, tensors: Mapping[str, Tensor], extra: Mapping[str, str]
) -> None:
    """Write a checkpoint folder; `extra` are further text files (card, provenance) by name.

    Raises UserError when the tensors do not match the layout, before anything is written.
    """
    check_names(tensors, REQUIRED, ("embed_tokens.weight", "d2t", "t2d"), str(folder))
    for name, shape in expected_shapes(config).items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise UserError(
                f"cannot export {name}: {list(tensors[name].shape)}, expected {list(shape)}"
            )
    text = json.dumps(_config_json(config, tensors["fc.weight"].dtype), indent=2) + "\n"
    write_folder(folder, tensors, {**extra, "config.json": text})


def expected_shapes(c: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a draft of shape `c`."""
    H, heads, kv = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
    return {
        "fc.weight": (H, c.feature_size),
        "norm.weight": (H,),
        "lm_head.weight": (c.draft_vocab_size, H),
        "embed_tokens.weight": (c.vocab_size, H),
        "d2t": (c.draft_vocab_size,),
        "t2d": (c.vocab_size,),
        "midlayer.self_attn.q_proj.weight": (heads * c.head_dim, 2 * H),
        "midlayer.self_attn.k_proj.weight": (kv * c.head_dim, 2 * H),
        "midlayer.self_attn.v_proj.weight": (kv * c.head_dim, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, heads * c.head_dim),
        "midlayer.mlp.gate_proj.weight": (c.intermediate_size, H),
        "midlayer.mlp.up_proj.weight": (c.intermediate_size, H),
        "midlayer.mlp.down_proj.weight": (H, c.intermediate_size),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.hidden_norm.weight": (H,),
        "midlayer.post_attention_layernorm.weight": (H,),
    }


def _name(stored: str) -> str:
    stored = stored.removeprefix("model.")
    return (
        "midlayer." + stored.removeprefix("layers.0.") if stored.startswith("layers.0.") else stored
    )


def _shape(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Eagle3Config:
    try:
        heads = int(raw["num_attention_heads"])
        hidden = int(raw["hidden_size"])
        vocab = int(raw["vocab_size"])
        width = int(raw["intermediate_size"])
    except KeyError as missing:
        raise UserError(f"{folder}/config.json: expected a key {missing}, found none") from None
    activation = str(raw.get("hidden_act", "silu"))
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{folder}: hidden_act '{activation}' is not one of {', '.join(ACTIVATIONS)}"
        )
    nested = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    taps = raw.get("eagle_aux_hidden_state_layer_ids") or (nested and [k + 1 for k in nested])
    return Eagle3Config(
        hidden_size=hidden,
        intermediate_size=width,
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        vocab_size=vocab,
        draft_vocab_size=int(raw.get("draft_vocab_size") or vocab),
        feature_size=tensors["fc.weight"].shape[1],
        taps=tuple(taps) if taps else None,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        hidden_act=activation,
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
        rope_parameters=_rope(raw),
    )


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE settings from either generation of config keys."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", float(raw.get("rope_theta", 10000.0)))
    if rope["rope_type"] in ("dynamic", "longrope"):
        raise UserError(f"a draft with '{rope['rope_type']}' rotary embeddings is not supported")
    return rope


def _config_json(c: Eagle3Config, dtype: torch.dtype) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
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
        "draft_vocab_size": c.draft_vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    target_hidden = c.feature_size // len(c.taps or (0, 0, 0))
    if target_hidden != c.hidden_size:
        config["target_hidden_size"] = target_hidden
    if c.rope_parameters["rope_type"] != "default":
        config["rope_scaling"] = c.rope_parameters
    if c.taps is not None:
        config["eagle_aux_hidden_state_layer_ids"] = list(c.taps)
        config["num_aux_hidden_states"] = len(c.taps)
        config["eagle_config"] = {
            "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in c.taps],
            "use_aux_hidden_state": True,
        }
    return config
