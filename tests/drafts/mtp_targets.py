"""Tiny targets of families that have MTP heads, as folders without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from redraft.core.rng import seeded
from tests.conftest import make_tokenizer, save_target

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}


def qwen3_5_config(**changes: Any) -> Any:
    """Full attention in every layer, and rotary embeddings of half a head."""
    return Qwen3_5TextConfig(
        head_dim=32,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        **{
            "vocab_size": len(make_tokenizer()),
            "layer_types": ["full_attention"] * 3,
            **SIZES,
            **changes,
        },
    )


LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def save_qwen3_5(folder: Path, seed: int = 0, *, linear: bool = False) -> Path:
    """With `linear` layers that keep a recurrent state, and a tokenizer with a merge, which llama.cpp wants."""
    more = {**LINEAR, "vocab_size": len(make_tokenizer()) + 1} if linear else {}
    save_target(folder, qwen3_5_config(**more), seed)
    if linear:
        path = folder / "tokenizer.json"
        raw = json.loads(path.read_text())
        raw["model"]["vocab"]["th"] = len(make_tokenizer())
        raw["model"]["merges"] = [["t", "h"]]
        path.write_text(json.dumps(raw))
    return _changed(folder, mtp_num_hidden_layers=1)


def save_mimo(folder: Path, seed: int = 0) -> Path:
    """Qwen2 layers under MiMo's architecture, which vLLM takes for a MiMo."""
    save_target(folder, Qwen2Config(vocab_size=len(make_tokenizer()), **SIZES), seed)
    return _changed(folder, architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)


def _changed(folder: Path, **keys: Any) -> Path:
    """With these keys of config.json, and a final norm that is no identity."""
    weights = load_file(folder / "model.safetensors")
    norm = weights["model.norm.weight"]
    weights["model.norm.weight"] = norm + 0.5 * torch.rand(norm.shape, generator=seeded(0, "norm"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


SAVED = {"qwen3_5": save_qwen3_5, "mimo": save_mimo}
