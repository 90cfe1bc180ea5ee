"""Low-rank updates of a draft's linear layers, through the PEFT library: W x + B A x.

B starts at zero, so training starts exactly at reuse. The scale is 1 (lora_alpha = r), so a merged
weight is W + B A; unlike an expert's, that sum rounds in the stored dtype, and cannot be taken out
again. Private tensors are stored under PEFT's names (`fc.lora_A.weight` [r, in]).
"""

from __future__ import annotations

import torch
from torch import nn

from ..core.errors import UserError
from ..core.rng import seeded
from ..drafts.base import Draft
from .table import EXPERT, LORA, Method

ADAPTER = "default"
HEADS = ("lm_head", "embed_out")
"""Output heads by module name: ours, and those of Transformers' language models."""


def stored_name(name: str) -> str:
    """The name under which a parameter of an adapted draft is stored, without PEFT's wrapping."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.", ".")


def linear_layers(draft: Draft, method: Method) -> list[str]:
    """The linear layers that get a pair, by module name.

    For `lora` all but the head and experts, for `head-lora` the head; none that is trained in place.
    """
    return [
        name
        for name, module in draft.named_modules()
        if isinstance(module, nn.Linear)
        and EXPERT not in f"{name}."
        and LORA not in name
        and ("head-lora" if name in HEADS else "lora") in method.parts
        and not method.trains_in_place(f"{name}.weight")
    ]


def check_rank(draft: Draft, layers: list[str], rank: int) -> None:
    """Raise UserError for a rank above a layer's size, and where there is no layer at all."""
    if not layers:
        raise UserError(
            f"a low-rank part finds no linear layer in this {draft.kind} draft that no other part trains"
        )
    for name in layers:
        most = min(draft.get_submodule(name).weight.shape)  # type: ignore[arg-type,union-attr]
        if rank > most:
            raise UserError(
                f"train.rank {rank} is above the size of {name}, whose matrix has rank {most} at most; "
                f"choose 1 to {most}"
            )


def attach(draft: Draft, layers: list[str], rank: int, seed: int) -> None:
    """Wrap `layers` in place. Raises UserError as `check_rank` does."""
    from peft import LoraConfig, inject_adapter_in_model

    check_rank(draft, layers, rank)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, bias="none")
    inject_adapter_in_model(config, draft, adapter_name=ADAPTER)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if LORA in name:
                home = draft.get_parameter(f"{name.split(LORA)[0]}.base_layer.weight")
                parameter.data = parameter.data.to(home)
                if f"{LORA}A" in name:
                    generator = seeded(seed, "lora", stored_name(name))
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)
