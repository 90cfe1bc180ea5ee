"""EAGLE-3 checkpoint folders: the layout that vLLM, SGLang and llama.cpp's converter all read.

Root-level names, `midlayer.` (or `layers.0.` on the way in), `lm_head.weight` over the draft
vocabulary, `d2t` as offsets (target id = draft id + d2t) and `t2d` as a mask, both only when the
draft vocabulary is smaller than the target's. Taps other than the default set are written in both
numberings (vLLM: hs[k]; SGLang: output of layer k-1), because the engines differ by one.

Variants that norm in other places are read as flags and computed as written; what else has another
function is refused by name, none is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drafts.eagle3 import Eagle3Config, Eagle3Draft
from ..errors import UserError
from .layer import check_tensors, layer_shapes, read_layer, write_layer

ARCHITECTURE = "LlamaForCausalLMEagle3"
QWEN3 = "Eagle3Qwen3ForCausalLM"
LAYER = "midlayer."


def recognises(raw: Mapping[str, Any], names: set[str]) -> bool:
    """Whether this is an EAGLE-3 draft: by its architecture, or by the norm only it has."""
    architectures = " ".join(raw.get("architectures") or [])
    return "eagle3" in architectures.lower() or any(
        name.startswith(LAYER) or name.endswith("hidden_norm.weight") for name in names
    )


def canonical(stored: str) -> str:
    """A tensor's name as redraft uses it: no prefix, the layer called `midlayer`."""
    stored = stored.removeprefix("model.")
    return LAYER + stored.removeprefix("layers.0.") if stored.startswith("layers.0.") else stored


def parse(
    raw: Mapping[str, Any], stored: Mapping[str, Tensor], where: Path
) -> tuple[Eagle3Config, dict[str, Tensor]]:
    """The shape of a stored draft and its tensors under redraft's names.

    Raises UserError naming what is missing, extra, or of another function.
    """
    tensors = {canonical(name): tensor for name, tensor in stored.items()}
    nested = raw.get("eagle_config") or {}
    if nested.get("use_aux_hidden_state") is False:
        raise UserError(f"{where}: the draft reads one hidden state (use_aux_hidden_state false)")
    if raw.get("bias"):
        raise UserError(
            f"{where}: config.json says bias: true, which engines read as attention biases; an "
            "EAGLE-3 draft has none: remove the key"
        )
    if raw.get("norm_output") and "speculators_version" not in raw:
        raise UserError(
            f"{where}: norm_output means 'feed the normed state back' to engines and 'norm before "
            "lm_head' to SpecForge; this file does not say which, so it is not run. Remove the key "
            "if the draft was trained with SpecForge"
        )
    if raw.get("attention_bias") or raw.get("qkv_bias"):
        # Engines then create every attention bias; a missing one of o_proj counts as zero.
        out = tensors.get(f"{LAYER}self_attn.o_proj.weight", torch.zeros(0))
        tensors.setdefault(f"{LAYER}self_attn.o_proj.bias", out.new_zeros(out.shape[0]))
        raw = {**raw, "attention_bias": True}
    relative = {n.removeprefix(LAYER): t for n, t in tensors.items() if n.startswith(LAYER)}
    layer = read_layer(raw, relative, where)
    if "fc.weight" not in tensors:
        raise UserError(f"{where}: tensors do not match the layout: missing fc.weight")
    features = tensors["fc.weight"].shape[1]
    taps = read_taps(raw)
    count = int(raw.get("num_aux_hidden_states") or len(taps or (0, 0, 0)))
    config = Eagle3Config(
        **layer,
        draft_vocab_size=int(raw.get("draft_vocab_size") or layer["vocab_size"]),
        feature_size=features,
        taps=taps,
        norm_before_residual=bool(raw.get("norm_before_residual")),
        norm_before_fc=bool(nested.get("norm_before_fc", raw.get("norm_before_fc"))),
        fc_norm=count if raw.get("fc_norm") else 0,
        norm_output=bool(raw.get("norm_output")),
    )
    if config.draft_vocab_size == config.vocab_size and "d2t" in tensors:
        raise UserError(
            f"{where}: d2t maps a vocabulary that is not reduced (draft_vocab_size is missing or "
            f"{config.vocab_size}, like vocab_size); set draft_vocab_size or drop d2t and t2d"
        )
    check_tensors(tensors, *expected_shapes(config), str(where))
    draft_vocabulary(config, tensors)
    return config, tensors


def build(config: Eagle3Config, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Eagle3Draft:
    """A draft computing in `dtype` from tensors as stored."""
    draft = Eagle3Draft(config, draft_vocabulary(config, tensors))
    if "embed_tokens.weight" in tensors:
        draft.embed_tokens = torch.nn.Embedding(*tensors["embed_tokens.weight"].shape)
    weights = {n: t.to(dtype) for n, t in tensors.items() if n not in ("d2t", "t2d")}
    draft.to(dtype).load_state_dict(weights)
    return draft.eval().requires_grad_(False)


def draft_vocabulary(config: Eagle3Config, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Target ids of the draft's rows, int64 [D]; None when it speaks the whole vocabulary.

    Raises UserError when d2t cannot be offsets, or disagrees with t2d.
    """
    if "d2t" not in tensors:
        return None
    d2t = tensors["d2t"].long()
    ids = d2t + torch.arange(len(d2t))
    absolute = "expected offsets (target id = row + d2t), these look like absolute ids"
    inside = int(ids.min()) >= 0 and int(ids.max()) < config.vocab_size
    if not inside or not bool((ids[1:] > ids[:-1]).all()):
        raise UserError(
            f"d2t does not lead to ascending target ids inside the vocabulary: {absolute}"
        )
    if "t2d" in tensors:
        spoken = tensors["t2d"].bool().nonzero().flatten()
        if torch.equal(spoken, d2t):
            raise UserError(f"d2t equals the ids that t2d marks: {absolute}")
        if not torch.equal(spoken, ids):
            raise UserError(
                f"d2t and t2d disagree: d2t names {len(ids)} target ids, t2d marks {len(spoken)}"
            )
    elif len(d2t) >= 64 and bool((d2t[1:] > d2t[:-1]).all()):
        raise UserError(f"d2t keeps no two neighbouring tokens: {absolute}")
    return ids


def expected_shapes(
    c: Eagle3Config,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Required and optional tensors of a draft of shape `c`: name -> shape."""
    H, D, F = c.hidden_size, c.draft_vocab_size, c.feature_size
    required: dict[str, tuple[int, ...]] = {
        "fc.weight": (H, F),
        "norm.weight": (H,),
        "lm_head.weight": (D, H),
        **{LAYER + name: shape for name, shape in layer_shapes(c, 2 * H).items()},
        **{f"{LAYER}{name}.weight": (H,) for name in ("input_layernorm", "hidden_norm")},
    }
    if c.norm_before_fc:
        required["input_norm.weight"] = (F,)
    required.update({f"fc_norm.{k}.weight": (F // c.fc_norm,) for k in range(c.fc_norm)})
    if c.vocab_size != D:
        required["d2t"] = (D,)
    return required, {"embed_tokens.weight": (c.vocab_size, H), "d2t": (D,), "t2d": (c.vocab_size,)}


def read_taps(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """hs[] indices from either numbering; None for the default set."""
    nested = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    taps = raw.get("eagle_aux_hidden_state_layer_ids") or (nested and [k + 1 for k in nested])
    return tuple(taps) if taps else None


def config_json(c: Eagle3Config) -> dict[str, Any]:
    """The config.json that vLLM, SGLang and llama.cpp's converter read."""
    config: dict[str, Any] = {
        "architectures": [QWEN3 if c.head_norms else ARCHITECTURE],
        **write_layer(c),
        "draft_vocab_size": c.draft_vocab_size,
    }
    count = len(c.taps or (0, 0, 0))
    if c.feature_size // count != c.hidden_size:
        config["target_hidden_size"] = c.feature_size // count
    for flag in ("norm_before_residual", "norm_before_fc", "norm_output"):
        if getattr(c, flag):
            config[flag] = True
    if c.fc_norm:
        config["fc_norm"] = True
    if c.taps is not None:
        config["eagle_aux_hidden_state_layer_ids"] = list(c.taps)
        config["num_aux_hidden_states"] = len(c.taps)
        config["eagle_config"] = {
            "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in c.taps],
            "use_aux_hidden_state": True,
        }
    return config
