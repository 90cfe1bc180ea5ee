"""Fusing: fold an adapter into plain dense weights, and take it out again.

An expert is concatenated. No arithmetic touches a stored weight, so the shared slices of a merged
draft hash-equal the published ones and `extract` gives the adapter back bit for bit.

    gate = [Ws; Wp]    up = [Us; Up]    down = [Ds, Dp]

A low-rank pair is added, W + B A, summed in float32 and rounded once to the stored dtype.

Everything here is a function of tensors by name; a name with `.private.` belongs to an expert, one
with `.lora_` to a pair, a private vocabulary exchanges rows of the head (see `vocabulary_remap.py`), any
other adapter tensor replaces the shared one of its name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import vocabulary_remap
from .table import EXPERT, LORA

CONCATENATED = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
"""Dimension along which an FFN's stored tensor grows with its neurons."""


def merge(shared: Mapping[str, Tensor], private: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The merged tensors, in the shared tensors' dtypes. Neither input is changed.

    Raises ValueError when a adapter tensor has no shared one to go with.
    """
    merged = dict(shared)
    if vocabulary_remap.NEW_ROWS in private:
        merged.update(vocabulary_remap.apply(shared, private))
    # One tensor may be replaced, then added to, then concatenated.
    for name in sorted(private, key=lambda name: (EXPERT in name, LORA in name)):
        if name in vocabulary_remap.NAMES:
            continue
        home, tensor = home_of(name), private[name]
        if home not in shared:
            raise ValueError(f"adapter tensor {name} has no shared tensor {home} to go with")
        if LORA in name:
            if f"{LORA}B" in name:
                down = private[name.replace(f"{LORA}B", f"{LORA}A")]
                merged[home] = _added(merged[home], tensor, down)
            continue
        tensor = tensor.to(dtype=shared[home].dtype, device=shared[home].device)
        if EXPERT in name:
            merged[home] = torch.cat([merged[home], tensor], dim=_dimension(home))
        else:
            merged[home] = tensor
    return merged


def home_of(name: str) -> str:
    """The shared tensor that a private one goes with."""
    if LORA in name:
        return f"{name.split(LORA)[0]}.weight"
    if name in vocabulary_remap.NAMES:
        return vocabulary_remap.HEAD
    return name.replace(EXPERT, ".")


def _added(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """weight + up @ down, rounded once."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sum_ = weight.to(wide) + up.to(weight.device, wide) @ down.to(weight.device, wide)
    return sum_.to(weight.dtype)


def extract(
    merged: Mapping[str, Tensor], shared_widths: Mapping[str, int], replaced: list[str]
) -> dict[str, Tensor]:
    """The adapter tensors of a merged draft.

    `shared_widths` gives, for each widened FFN (its name), the number of shared neurons, which
    come first; `replaced` names the tensors that were trained in place.
    """
    private = {name: merged[name].clone() for name in replaced}
    for ffn, width in shared_widths.items():
        for suffix, dimension in CONCATENATED.items():
            whole = merged[f"{ffn}.{suffix}"]
            part = whole.narrow(dimension, width, whole.shape[dimension] - width)
            private[f"{ffn}{EXPERT}{suffix}"] = part.clone().contiguous()
    return private


def _dimension(home: str) -> int:
    for suffix, dimension in CONCATENATED.items():
        if home.endswith(suffix):
            return dimension
    raise ValueError(f"{home} is not a tensor that grows with an FFN's neurons")
