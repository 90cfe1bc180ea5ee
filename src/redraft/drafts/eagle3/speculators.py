"""The speculators layout: an EAGLE-3 draft whose folder says how it is to be served.

The tensors are those of `eagle3` under `layers.0.`; config.json wraps the layer's own config in
`transformer_layer_config` and names the verifier. `norm_before_residual` counts as true where the
key is absent, as its reader in vLLM has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.errors import UserError
from ..kind import Config, Files, Tensors
from ..stored.layer import config_values
from . import files
from .network import Eagle3Config

TYPE = "speculators_model_type"
SERVED_K = 4
"""Draft tokens per step that a folder asks vLLM for."""
SHARED_KEYS = (
    "draft_vocab_size",
    "target_hidden_size",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "eagle_aux_hidden_state_layer_ids",
)


def recognises(raw: Config, tensors: Tensors, where: Path) -> bool:
    """Whether a config.json is in this layout."""
    return files.wrapped(raw)


def flatten(raw: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The same draft's config in the plain layout, as vLLM derives it.

    Raises UserError for a speculator of another kind.
    """
    values = config_values(raw, where)
    kind = values.text(TYPE, "not recorded")
    if kind != "eagle3":
        raise UserError(f"{where}: a speculators draft of type '{kind}'; redraft reads eagle3")
    if not values.given("transformer_layer_config"):
        raise UserError(f"{where}/config.json: expected a mapping transformer_layer_config")
    aux_layers = values.integers(files.AUX_LAYERS)
    return {
        **values.inside("transformer_layer_config").raw,
        **{key: raw[key] for key in SHARED_KEYS if values.given(key)},
        "norm_before_residual": values.flag("norm_before_residual", True),
        "num_aux_hidden_states": len(aux_layers) if aux_layers else 3,
        "speculators_version": raw.get("speculators_version", "not recorded"),
    }


def parse(
    raw: Mapping[str, Any], stored: Mapping[str, Tensor], where: Path
) -> tuple[Eagle3Config, dict[str, Tensor]]:
    """The shape of a stored draft and its tensors under redraft's names."""
    return files.parse(flatten(raw, where), stored, where)


def lay_out(c: Eagle3Config, tensors: dict[str, Tensor], target: str) -> Files:
    """config.json and tensors."""
    plain = files.config_json(c)
    layer = {
        key: value
        for key, value in plain.items()
        if key not in ("architectures", "eagle_config", "num_aux_hidden_states", *SHARED_KEYS)
        and key != "norm_before_residual"
    }
    config = {
        "architectures": ["Eagle3Speculator"],
        TYPE: "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": SERVED_K,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target, "architectures": []},
        },
        "transformer_layer_config": layer,
        **{key: plain[key] for key in SHARED_KEYS if key in plain},
        "norm_before_residual": c.norm_before_residual,
        "tie_word_embeddings": False,
    }
    renamed = {
        name.replace(files.LAYER, "layers.0.", 1) if name.startswith(files.LAYER) else name: t
        for name, t in tensors.items()
    }
    return config, renamed
