"""Tiny targets of families that have MTP heads, as folders without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Qwen2Config, Qwen3NextConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from redraft.core.rng import seeded
from redraft.drafts.mtp.network import MtpDraft
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import fresh_draft, make_tokenizer, save_target

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


EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
    "num_experts": 8,
    "shared_expert_intermediate_size": 40,
}
GLM_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}


def qwen3_5_config(make: Any = Qwen3_5TextConfig, **changes: Any) -> Any:
    """Full attention in every layer, and rotary embeddings of half a head."""
    return make(
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


def save_qwen3_5(
    folder: Path,
    seed: int = 0,
    *,
    linear: bool = False,
    make: Any = Qwen3_5TextConfig,
    **sizes: Any,
) -> Path:
    """With `linear` layers that keep a recurrent state, and a tokenizer with a merge, which llama.cpp wants."""
    more = {**LINEAR, "vocab_size": len(make_tokenizer()) + 1} if linear else {}
    save_target(folder, qwen3_5_config(make, **{**more, **sizes}), seed)
    if linear:
        path = folder / "tokenizer.json"
        raw = json.loads(path.read_text())
        raw["model"]["vocab"]["th"] = len(make_tokenizer())
        raw["model"]["merges"] = [["t", "h"]]
        path.write_text(json.dumps(raw))
    return _changed(folder, mtp_num_hidden_layers=1)


def save_qwen3_5_moe(folder: Path, seed: int = 0, *, linear: bool = False) -> Path:
    """With `linear` a row more: Transformers gives the tokenizer of this model_type a token."""
    more = {"vocab_size": len(make_tokenizer()) + 2} if linear else {}
    return save_qwen3_5(folder, seed, linear=linear, make=Qwen3_5MoeTextConfig, **EXPERTS, **more)


def save_qwen3_next(folder: Path, seed: int = 0) -> Path:
    """Its config.json does not count MTP layers."""
    changes = {**EXPERTS, "norm_topk_prob": False}
    save_target(folder, qwen3_5_config(Qwen3NextConfig, **changes), seed)
    return _changed(folder)


def glm4_moe_config() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return Glm4MoeConfig(
        vocab_size=len(make_tokenizer()),
        head_dim=32,
        attention_bias=True,
        use_qk_norm=True,
        rope_parameters=rope,
        **GLM_EXPERTS,
        **SIZES,
    )


def save_glm4_moe(folder: Path, seed: int = 0) -> Path:
    save_target(folder, glm4_moe_config(), seed)
    return _changed(folder, num_nextn_predict_layers=1)


def routed_head(target: Target, **variant: Any) -> MtpDraft:
    """An untrained head with routed experts like the target's; all its tensors are lively."""
    draft: MtpDraft = fresh_draft(target, kind="mtp", width=None, **variant)
    for name, tensor in draft.state_dict().items():
        if ".mlp.experts." in name or ".mlp.gate." in name:
            noise = torch.randn(tensor.shape, generator=seeded(0, name), dtype=tensor.dtype)
            tensor.copy_(noise * (1.0 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5))
    return draft


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
ROUTED = {
    "qwen3_5_moe": save_qwen3_5_moe,
    "qwen3_next": save_qwen3_next,
    "glm4_moe": save_glm4_moe,
}


def routed_in_double(folder: Path) -> Target:
    """Transformers' usual way to run experts has no float64."""
    found = load_target(str(folder))
    found.model.set_experts_implementation("eager")
    found.model.double()
    return found
