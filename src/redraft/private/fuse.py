"""Fusing: fold a private part into plain dense weights, and take it out again.

Concatenation only. No arithmetic touches a stored weight, so the shared slices of a fused draft
hash-equal the published ones and `unfuse` gives the private part back bit for bit.

    gate = [Ws; Wp]    up = [Us; Up]    down = [Ds, Dp]

Everything here is a function of tensors by name; a name with `.private.` belongs to an expert, any
other private tensor replaces the shared one of its name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EXPERT = ".private."
CONCATENATED = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}
"""Dimension along which an FFN's stored tensor grows with its neurons."""


def fuse(shared: Mapping[str, Tensor], private: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fused tensors, in the shared tensors' dtypes. Neither input is changed.

    Raises ValueError when a private tensor has no shared one to go with.
    """
    fused = dict(shared)
    for name, tensor in private.items():
        home = name.replace(EXPERT, ".")
        if home not in shared:
            raise ValueError(f"private tensor {name} has no shared tensor {home} to go with")
        tensor = tensor.to(dtype=shared[home].dtype, device=shared[home].device)
        if EXPERT in name:
            fused[home] = torch.cat([shared[home], tensor], dim=_dimension(home))
        else:
            fused[home] = tensor
    return fused


def unfuse(
    fused: Mapping[str, Tensor], shared_widths: Mapping[str, int], replaced: list[str]
) -> dict[str, Tensor]:
    """The private tensors of a fused draft.

    `shared_widths` gives, for each widened FFN (its name), the number of shared neurons, which
    come first; `replaced` names the tensors that were trained in place.
    """
    private = {name: fused[name].clone() for name in replaced}
    for ffn, width in shared_widths.items():
        for suffix, dimension in CONCATENATED.items():
            whole = fused[f"{ffn}.{suffix}"]
            part = whole.narrow(dimension, width, whole.shape[dimension] - width)
            private[f"{ffn}{EXPERT}{suffix}"] = part.clone().contiguous()
    return private


def _dimension(home: str) -> int:
    for suffix, dimension in CONCATENATED.items():
        if home.endswith(suffix):
            return dimension
    raise ValueError(f"{home} is not a tensor that grows with an FFN's neurons")
