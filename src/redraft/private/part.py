"""A private part as an object: attached to a draft for training, then taken off and kept.

Ownership is declared: after `prepare`, exactly the method's tensors require a gradient, and every
other tensor of the draft is shared and frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..drafts.base import Draft
from ..drafts.layers import GatedFFN
from .expert import attach, widenable
from .table import METHODS


@dataclass(frozen=True)
class PrivatePart:
    """Private tensors by name (CPU), the method that made them, and what they belong to."""

    method: str
    tensors: dict[str, Tensor]
    card: dict[str, Any] = field(default_factory=dict)

    def parameter_count(self) -> int:
        return sum(t.numel() for t in self.tensors.values())


def prepare(
    draft: Draft,
    method: str,
    *,
    width: int,
    init: str,
    seed: int,
    calibrate: Callable[[], None] | None = None,
) -> list[tuple[str, nn.Parameter]]:
    """Attach a method's private part to `draft` in place and return its trainable tensors.

    After this call the draft's outputs equal the reused draft's bit for bit (except for methods
    that start fresh and for `init='random'`).
    """
    row = METHODS[method]
    if row.fresh:
        draft.reinitialise(seed)
    if row.expert:
        attach(draft, width, init, seed, calibrate)
    return declare(draft, method)


def declare(draft: Draft, method: str) -> list[tuple[str, nn.Parameter]]:
    """Freeze the shared tensors; return the private ones that require a gradient."""
    row = METHODS[method]
    trainable = {n for n in draft.trainable_names() if row.owns(n)}
    owned = []
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(name in trainable)
        if name in trainable:
            owned.append((name, parameter))
    return owned


def take(draft: Draft, method: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A copy of the private tensors as they are now, on the CPU, in `dtype` (default: as is)."""
    return {
        name: parameter.detach().to(device="cpu", dtype=dtype, copy=True)
        for name, parameter in declare(draft, method)
    }


def put(draft: Draft, tensors: dict[str, Tensor]) -> None:
    """Write private tensors into a draft, attaching the expert they need first."""
    for name, ffn in widenable(draft).items() if any(".private." in n for n in tensors) else ():
        gate = tensors[f"{name}.private.gate_proj.weight"]
        if ffn.private is None:
            ffn.private = GatedFFN(gate.shape[1], gate.shape[0], ffn.activation).to(
                ffn.gate_proj.weight
            )
    parameters = dict(draft.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
