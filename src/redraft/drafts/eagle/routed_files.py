"""Routed experts in checkpoint terms: EDA's reference layout of them, and when they are one dense FFN.

The layout is EAGLE-1/2's with `layers.0.block_sparse_moe.*` in place of `layers.0.mlp.*` (here
`mlp.*` throughout): `{shared,private}_gate.weight [E, H]` and
`{shared,private}_experts.{e}.{gate,up,down}_proj.weight`. config.json counts the experts but
leaves out the private ones' width, which the tensors tell.

Names here are relative to the layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ..stored.layer import config_values
from .routed import RoutedShape

NAMED = "mlp."
"""The FFN's prefix in redraft; in the file it is `ROUTED`."""
GROUPS = ("shared", "private")
PROJECTIONS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
"""Dimension of a projection's weight that its neurons are along."""


def read_routed(raw: Mapping[str, Any], names: Mapping[str, Tensor], where: Path) -> RoutedShape:
    """How the experts are counted and routed. Raises UserError where file and config.json disagree."""
    config = config_values(raw, where)
    count: dict[str, int] = {}
    top_k: dict[str, int] = {}
    for group in GROUPS:
        pattern = re.compile(rf"{NAMED}{group}_experts\.(\d+)\.")
        found = {int(match[1]) for name in names if (match := pattern.match(name))}
        count[group] = len(found)
        said = config.positive(f"num_{group}_experts", max(len(found), 1))
        if not found or said != len(found) or max(found) >= len(found):
            raise UserError(
                f"{where}: config.json says num_{group}_experts {said}, the file has {group} experts "
                f"{sorted(found)}; it should have 0 to {said - 1}, and one at least"
            )
        top_k[group] = config.positive(f"top_k_{group}", 1)
        if top_k[group] > len(found):
            raise UserError(
                f"{where}/config.json: top_k_{group} is {top_k[group]}, expected 1 to {len(found)}, "
                f"the number of {group} experts"
            )
    gate = names.get(f"{NAMED}private_experts.0.gate_proj.weight")
    return RoutedShape(
        shared=count["shared"],
        private=count["private"],
        top_k_shared=top_k["shared"],
        top_k_private=top_k["private"],
        private_width=0 if gate is None or not gate.dim() else gate.shape[0],
    )


def routed_shapes(shape: RoutedShape, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """Required tensors of the experts and routers: relative name -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    groups = zip(GROUPS, (shape.shared, shape.private), (width, shape.private_width), strict=True)
    for group, count, neurons in groups:
        shapes[f"{NAMED}{group}_gate.weight"] = (count, hidden)
        for index in range(count):
            for name, dimension in PROJECTIONS.items():
                size = (hidden, neurons) if dimension else (neurons, hidden)
                shapes[f"{NAMED}{group}_experts.{index}.{name}.weight"] = size
    return shapes


def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The one dense FFN that one shared and one private expert are: concatenated, bit for bit.

    Their routers are left out: a choice of one has weight 1.
    """
    routers = tuple(f"{NAMED}{group}_gate.weight" for group in GROUPS)
    folded = {
        name: t for name, t in tensors.items() if "_experts." not in name and name not in routers
    }
    for projection, dimension in PROJECTIONS.items():
        parts = [tensors[f"{NAMED}{group}_experts.0.{projection}.weight"] for group in GROUPS]
        folded[f"{NAMED}{projection}.weight"] = torch.cat(parts, dim=dimension)
    return folded


def refuse_routed(shape: RoutedShape | None) -> None:
    """Raise UserError for a draft that no engine has a layer for."""
    if shape is not None:
        raise UserError(
            f"this draft has routed experts, {shape}, and engines have dense drafts only: which "
            "experts run depends on the token, so no dense layer is equal to them and nothing can be "
            "merged or exported. It runs in redraft itself (generate, measure, check). To serve one, "
            "train a dense draft: redraft train --method scratch --kind eagle"
        )
