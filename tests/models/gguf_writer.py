"""Tiny Llama models as GGUF files, with blocks of Q8_0 that are made and read here in loops of numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from redraft_experiments.language_model import END, PAD, SPECIALS, TEMPLATE
from tests.conftest import make_tokenizer

BLOCK = 32
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def q8_0(weight: Any) -> tuple[Any, Any]:
    """A matrix as blocks, uint8 [rows, bytes], and the numbers that these mean, float32 [rows, columns]."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scales = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
    wide = scales.astype(np.float32)
    codes = np.round(blocks / np.where(wide == 0, 1, wide)).clip(-127, 127).astype(np.int8)
    raw = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1)
    return raw.reshape(len(weight), -1), (codes * wide).reshape(weight.shape)


def write(
    file: Path,
    folder: Path,
    *,
    interleaved: bool = True,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    left_out: str = "",
) -> dict[str, Any]:
    """Write the Llama model of a folder as `file`, its matrices in Q8_0 where rows are whole blocks; returns what the weights mean there, by their
    names in the folder.

    `interleaved` is whether rows of queries and keys are stored in the order of llama.cpp's rotary embedding. `fields` and
    `tensors` are put in too, and the tensor `left_out` is not.
    """
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    add_tokenizer(writer)
    for key, value in (fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    meaning = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        layer = name.split(".")[2] if ".layers." in name else None
        inner = name.removesuffix(".weight").removeprefix(f"model.layers.{layer}.")
        short = NAMES[inner]
        blocks = weight.ndim == 2 and weight.shape[1] % BLOCK == 0
        raw, meaning[name] = q8_0(weight) if blocks else (weight, weight)
        if interleaved and short in heads:
            count, rows = heads[short], len(raw)
            halves = raw.reshape(count, 2, rows // count // 2, -1)
            raw = halves.swapaxes(1, 2).reshape(rows, -1)
        if short != left_out:
            place = short if layer is None else f"blk.{layer}.{short}"
            kind = gguf.GGMLQuantizationType.Q8_0 if blocks else None
            writer.add_tensor(f"{place}.weight", np.ascontiguousarray(raw), raw_dtype=kind)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def add_tokenizer(writer: Any) -> None:
    vocabulary = make_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if t in SPECIALS else kinds.NORMAL for t in tokens])
    writer.add_token_scores([0.0] * len(tokens))  # of which no merges follow: one token per byte
    writer.add_eos_token_id(SPECIALS.index(END))
    writer.add_pad_token_id(SPECIALS.index(PAD))
    writer.add_chat_template(TEMPLATE)
