"""Low-rank updates of a draft's linear layers, through the PEFT library: W x + B A x.

B starts at zero, so training starts exactly at the unadapted draft. The scale is 1 (lora_alpha = r), so
a merged weight is W + B A, summed in float32 and rounded once to the stored dtype; unlike an expert,
that sum cannot be taken apart again. Tensors are stored under PEFT's names (`fc.lora_A.weight` [r, in]).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.rng import seeded
from ..drafts.base import Draft
from .kind import AddedTensors, Setup, Tensors, adapter_of, kinds_of, stored_name
from .table import Method

MARK = ".lora_"
"""In the name of every tensor of a low-rank pair, as PEFT names them."""
HEADS = ("lm_head", "embed_out")
"""Output heads by module name: ours, and those of Transformers' language models."""


class LowRank(AddedTensors):
    """Pairs at every linear layer but the head that no other adapter of the method trains."""

    def wraps(self, layer: str) -> bool:
        return layer not in HEADS

    def layers(self, draft: Draft, method: Method) -> list[str]:
        """The linear layers that get a pair, by module name."""
        others = [kind for kind in kinds_of(method) if not isinstance(kind, LowRank)]
        return [
            name
            for name, module in draft.named_modules()
            if isinstance(module, nn.Linear)
            and MARK not in name
            and self.wraps(name)
            and adapter_of(f"{name}.weight", others) is None
        ]

    def check(self, draft: Draft, method: Method, setup: Setup) -> None:
        check_rank(draft, self.layers(draft, method), setup.rank)

    def attach(self, draft: Draft, method: Method, setup: Setup) -> None:
        attach(draft, self.layers(draft, method), setup.rank, setup.seed)

    def adds(self, name: str) -> bool:
        layer, mark, _ = name.partition(MARK)
        return bool(mark) and self.wraps(layer)

    def starts_at_zero(self, name: str) -> bool:
        return name.endswith("lora_B.weight")

    def peft_config(self, tensors: Tensors) -> dict[str, Any]:
        ranks = {n.split(MARK)[0]: t.shape[0] for n, t in tensors.items() if f"{MARK}A" in n}
        (rank,) = set(ranks.values())
        return {"target_modules": sorted(ranks), "r": rank, "lora_alpha": rank}

    def home(self, name: str) -> str:
        return f"{name.split(MARK)[0]}.weight"

    def restore(self, draft: Draft, tensors: Tensors) -> None:
        ranks = {n.split(MARK)[0]: t.shape[0] for n, t in tensors.items() if f"{MARK}A" in n}
        if not any(self.adds(name) for name, _ in draft.named_parameters()):
            attach(draft, list(ranks), max(ranks.values()), 0)
        super().restore(draft, tensors)

    def merge(self, merged: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        return {
            self.home(name): _added(
                merged[self.home(name)], up, tensors[name.replace(f"{MARK}B", f"{MARK}A")]
            )
            for name, up in tensors.items()
            if f"{MARK}B" in name
        }

    def extract(self, merged: Tensors, shared: Tensors) -> tuple[dict[str, Tensor], Tensors]:
        raise UserError(
            f"an adapter with {self.name} cannot be taken out of a merged draft: its update is summed into "
            "the weights; keep the adapter's own folder"
        )


class LowRankHead(LowRank):
    """A pair at the draft's own output head."""

    def wraps(self, layer: str) -> bool:
        return layer in HEADS

    def carries(self, draft: Draft) -> bool:
        return "lm_head.weight" in draft.trainable_names()


def check_rank(draft: Draft, layers: list[str], rank: int) -> None:
    """Raise UserError for a rank above a layer's size, and where there is no layer at all."""
    if not layers:
        raise UserError(
            f"a low-rank adapter finds no linear layer in this {draft.kind} draft that no other adapter trains"
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
    inject_adapter_in_model(config, draft, adapter_name="default")
    vars(draft).pop(
        "peft_config", None
    )  # PEFT would warn at the next injection, of the head's pair
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            layer, _, side = stored_name(name).partition(MARK)
            if side and layer in layers:
                parameter.data = parameter.data.to(
                    draft.get_parameter(f"{layer}.base_layer.weight")
                )
                if side.startswith("A"):
                    noise = torch.randn(
                        parameter.shape, generator=seeded(seed, "lora", stored_name(name))
                    )
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)


def _added(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """weight + up @ down, rounded once."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sum_ = weight.to(wide) + up.to(weight.device, wide) @ down.to(weight.device, wide)
    return sum_.to(weight.dtype)
