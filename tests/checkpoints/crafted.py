"""Checkpoints crafted in the layouts that others publish, from a draft that redraft made.

Written with the standard library and safetensors alone, from the layouts' descriptions, so that
the readers under test share nothing with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def retensor(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of a folder (`__` stands for a dot; None removes) and forget its record."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / WEIGHTS)
    (folder / "redraft.json").unlink(missing_ok=True)


def shape_keys(c: Any) -> dict[str, Any]:
    """What every layout's config.json says of the layer."""
    return {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_parameters["rope_theta"],
        "vocab_size": c.vocab_size,
    }


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
    return folder


def safeai_eagle3(folder: Path, draft: Any) -> Path:
    """The EAGLE authors' EAGLE-3: plain Llama architecture, `midlayer.`, no embedding."""
    c = draft.config
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape_keys(c)}
    config["draft_vocab_size"] = c.draft_vocab_size
    return write(folder, config, draft.stored_state())


def specforge(folder: Path, draft: Any) -> Path:
    """SpecForge's EAGLE-3: its own architecture name, aux layers in the layer-output numbering."""
    c = draft.config
    aux_layers = [aux_layer - 1 for aux_layer in draft.aux_layers]
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **shape_keys(c),
        "draft_vocab_size": c.draft_vocab_size,
        "tie_word_embeddings": False,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": aux_layers,
            "use_aux_hidden_state": True,
        },
    }
    return write(folder, config, draft.stored_state())


def speculators(folder: Path, draft: Any) -> Path:
    """speculators' EAGLE-3: a wrapped layer config, `layers.0.`, an embedding of its own."""
    c = draft.config
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": {"model_type": "llama", **shape_keys(c)},
        "draft_vocab_size": c.draft_vocab_size,
        "norm_before_residual": c.norm_before_residual,
        "norm_before_fc": c.norm_before_fc,
        "norm_output": c.norm_output,
        "eagle_aux_hidden_state_layer_ids": list(draft.aux_layers),
        "tie_word_embeddings": False,
    }
    tensors = {n.replace("midlayer.", "layers.0."): t for n, t in draft.stored_state().items()}
    tensors["embed_tokens.weight"] = draft.shared_embedding.clone()
    return write(folder, config, tensors)


def safeai_eagle(folder: Path, draft: Any) -> Path:
    """The EAGLE authors' EAGLE-1/2: root names, the base's embedding, `bias` meaning fc's."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape_keys(draft.config),
        "bias": draft.config.fc_bias,
        "pad_token_id": 0,
    }
    tensors = {**draft.stored_state(), "embed_tokens.weight": draft.shared_embedding.clone()}
    return write(folder, config, tensors)


def eda_reference(folder: Path, draft: Any) -> Path:
    """EDA's reference code: EAGLE-1/2 with routed experts; the private ones' width is not told."""
    c = draft.config
    config = {
        "architectures": ["SPMoEModel"],
        **shape_keys(c),
        "num_shared_experts": c.routed.shared,
        "num_private_experts": c.routed.private,
        "top_k_shared": c.routed.top_k_shared,
        "top_k_private": c.routed.top_k_private,
        "training_mode": "transfer",
    }
    tensors = {n.replace(".mlp.", ".block_sparse_moe."): t for n, t in draft.stored_state().items()}
    tensors["embed_tokens.weight"] = draft.shared_embedding.clone()
    return write(folder, config, tensors)


LAYOUTS: dict[str, Callable[[Path, Any], Path]] = {
    "safeai_eagle3": safeai_eagle3,
    "specforge": specforge,
    "speculators": speculators,
    "safeai_eagle": safeai_eagle,
}


def as_shards(folder: Path) -> None:
    """The same folder in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {n: f for f, members in parts.items() for n in members}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def as_pickle(folder: Path) -> None:
    """The same folder as the `.bin` file that older drafts were published in."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
