"""Names that engines go by: architectures, config classes, tensors, and the keys that rules read.

From the registries and loaders of vLLM 0.32, SGLang 0.5.23 and llama.cpp 11434.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.config_values import (
    is_flag,
    is_integers,
    is_object,
    is_positive,
    is_text,
    is_texts,
)
from .layer import QKV

VLLM_EAGLE3 = {
    "LlamaForCausalLMEagle3": "llama",
    "Eagle3LlamaForCausalLM": "llama",
    "Eagle3MiniMaxM2ForCausalLM": "llama",
    "Eagle3Qwen2_5vlForCausalLM": "llama",
    "Eagle3Qwen3vlForCausalLM": "llama",
    "Eagle3Qwen3ForCausalLM": "qwen3",
}
"""EAGLE-3 drafts with dense attention, and the layer that their class has."""
VLLM_EAGLE = ("LlamaForCausalLM", "EagleLlamaForCausalLM")
SGLANG_EAGLE3 = ("LlamaForCausalLMEagle3",)
SGLANG_EAGLE = ("LlamaForCausalLMEagle", "Qwen2ForCausalLMEagle", "MistralForCausalLMEagle")
LLAMA_CPP = (
    "LlamaForCausalLM",
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3Speculator",
    "Eagle3DraftModel",
)
_QWEN = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
NOT_IN_VLLM_EAGLE = (*_QWEN, *SGLANG_EAGLE)
NOT_IN_SGLANG = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    *_QWEN,
    VLLM_EAGLE[1],
    *list(VLLM_EAGLE3)[1:],
)
NOT_IN_LLAMA_CPP = (*_QWEN, *list(VLLM_EAGLE3)[2:])
"""Names that end in a refusal: those of other engines, and of whole models."""
LLAMA_CPP_TARGETS = (
    *("llama", "mistral", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "gpt_oss"),
    *("gemma4", "gemma4_text", "lfm2", "minimax_m2", "nemotron_h"),
)
"""model_type of targets whose layers' states llama.cpp keeps for an EAGLE-3 draft."""
NOT_LLAMA_CPP_TARGETS = (
    *("qwen2", "qwen2_moe", "gemma", "gemma2", "gemma3", "gemma3_text", "mistral3", "phi", "phi3"),
    *("olmo2", "smollm3", "granite", "glm4", "starcoder2", "stablelm"),
)
"""model_type of targets on which it aborts instead."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Config classes whose defaults are Llama's in what the rules read."""

_PROJECTIONS = [*(f"self_attn.{name}" for name in (*QKV, "o_proj"))]
_FFN = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LAYER_TENSORS = [f"{name}.weight" for name in (*_PROJECTIONS, *_FFN, "post_attention_layernorm")]
"""Tensors that every engine needs of a layer, where config.json does not say it. The readers derive
theirs from config.json, which may itself be broken here."""

KEYS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("architectures", "layer_types"), is_texts),
    **dict.fromkeys(("model_type", "hidden_act", "name_or_path"), is_text),
    **dict.fromkeys(
        (
            "vocab_size",
            "draft_vocab_size",
            "num_hidden_layers",
            "num_aux_hidden_states",
            "hidden_size",
            "target_hidden_size",
            "kv_lora_rank",
            "sliding_window",
        ),
        is_positive,
    ),
    **dict.fromkeys(
        (
            "bias",
            "attention_bias",
            "qkv_bias",
            "norm_before_residual",
            "norm_before_fc",
            "norm_output",
            "fc_norm",
            "tie_word_embeddings",
            "use_sliding_window",
        ),
        is_flag,
    ),
    **dict.fromkeys(
        (
            "eagle_config",
            "transformer_layer_config",
            "speculators_config",
            "verifier",
            "rope_parameters",
            "rope_scaling",
        ),
        is_object,
    ),
    "eagle_aux_hidden_state_layer_ids": lambda found: is_integers(found, -1),
}
"""Keys that rules read, and what their values must be to be judged."""
