"""An adapter of a draft in PEFT's layout, for engines that keep one draft and many adapters of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.kind import AdapterKind, by_adapter
from ..core.errors import UserError
from ..core.files import write_tensors, write_text
from ..core.published import without_paths

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(folder: Path, adapter: Adapter) -> None:
    """Write an adapter as PEFT reads it. Raises UserError, before anything is written, for one that is no low-rank update."""
    parts = by_adapter(adapter.tensors)
    configs = [found for kind, own in parts if (found := kind.peft_config(own)) is not None]
    if not parts or len(configs) < len(parts):
        raise UserError(
            f"an adapter of method {adapter.method} is more than a low-rank update ({_others(parts)}), which is what PEFT adapters of a "
            "draft hold; export the merged draft, or train with --method lora"
        )
    config: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "inference_mode": True}
    config |= {"base_model_name_or_path": str(without_paths(adapter.card.get("shared", "")))}
    config["target_modules"] = sorted(m for one in configs for m in one.pop("target_modules"))
    for one in configs:
        if any(config.setdefault(key, value) != value for key, value in one.items()):
            raise UserError(
                f"its low-rank parts differ in {', '.join(one)}, which one PEFT adapter cannot"
            )
    write_tensors(
        folder / WEIGHTS,
        {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors.items()},
    )
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _others(parts: list[tuple[AdapterKind, dict[str, Tensor]]]) -> str:
    """The tensors that are no low-rank pairs, by the first of each part."""
    names = [next(iter(own)) for kind, own in parts if kind.peft_config(own) is None]
    return ", ".join(names) or "it has no tensors"
