"""A target that is larger than one device: its layers spread over GPUs, memory and disk, by accelerate's dispatch.

Embedding, final norm and head stay on the first device, because drafts use them too. Layers that are neither in memory
nor on a GPU are read from the model's own files, each time they are used.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ..core import ranks
from ..core.console import say
from ..core.errors import UserError, as_sentence

AUTO = "auto"
SIZE = re.compile(r"\d+(\.\d+)?[KMGT]i?B", re.IGNORECASE)
LARGEST = 1 << 62


def read_max_memory(text: str) -> dict[int | str, str]:
    """Memory by device, of "0=20GiB,cpu=60GiB". Raises UserError for anything else."""
    found: dict[int | str, str] = {}
    for entry in text.split(","):
        name, _, size = (part.strip() for part in entry.partition("="))
        if not (name == "cpu" or name.isdigit()) or not SIZE.fullmatch(size):
            raise UserError(
                f"--max-memory {text}: expected devices and sizes such as 0=20GiB,cpu=60GiB; got '{entry.strip()}'"
            )
        found[int(name) if name.isdigit() else name] = size
    return found


def layers_spread(
    source: str, config: Any, dtype: torch.dtype | str, max_memory: str | None
) -> dict[str, int | str]:
    """Where each part of the model of `config` goes: layer by layer on the GPUs, then memory, then the disk.

    Raises UserError for sizes that cannot be read or that leave no place on the first device.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_max_memory

    with as_sentence(f"target {source} could not be laid out"):
        model = empty_model(config)
    stored = getattr(config, "dtype", None) if dtype == AUTO else dtype
    kind = stored if isinstance(stored, torch.dtype) else torch.float32
    model.tie_weights()
    given = read_max_memory(max_memory) if max_memory else None
    memory = get_max_memory(given)
    if ranks.size() > 1:  # each has one GPU of its own
        own = ranks.local() % max(torch.cuda.device_count(), 1)
        memory = {name: size for name, size in memory.items() if name in ("cpu", own)}
    placed = infer_auto_device_map(
        model,
        max_memory=memory,
        no_split_module_classes=model._no_split_modules,
        dtype=kind,
    )
    first = next(iter(memory))
    layers = _layers_of(model)
    for name in placed:
        if name and not (layers.startswith(f"{name}.") or f"{name}.".startswith(layers)):
            placed[name] = first
    counts = {place: list(placed.values()).count(place) for place in dict.fromkeys(placed.values())}
    where = ", ".join(f"{count} on {place}" for place, count in counts.items())
    say(f"target {source}: parts of it {where}")
    return dict(placed)


def empty_model(config: Any) -> Any:
    """The model of `config` without any weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _layers_of(model: Any) -> str:
    """The beginning of the names of the decoder's layers."""
    names = (
        name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)
    )
    return f"{next(names)}."
