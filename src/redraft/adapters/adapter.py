"""An adapter as an object: attached to a draft for training, then taken off and kept.

Ownership is declared: after `prepare`, exactly the tensors that the method trains require a
gradient, and every other tensor of the draft is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..drafts.base import Draft
from ..drafts.layers import GatedFFN
from . import (
    expert,
    feature_map,
    lora,
    vocabulary_remap,
)
from .table import ADAPTERS, EXPERT, LORA, Method


@dataclass(frozen=True)
class Adapter:
    """Private tensors by name (CPU), the method that made them, and what they belong to."""

    method: str
    tensors: dict[str, Tensor]
    card: dict[str, Any] = field(default_factory=dict)

    def parameter_count(self) -> int:
        return sum(t.numel() for t in self.tensors.values() if t.is_floating_point())


def prepare(
    draft: Draft,
    method: Method,
    *,
    width: int,
    rank: int = 16,
    init: str,
    seed: int,
    calibrate: Callable[[], None] | None = None,
) -> list[tuple[str, nn.Parameter]]:
    """Attach a method's adapter to `draft` in place and return its trainable tensors.

    After this call the draft's outputs equal the unadapted draft's bit for bit (except for methods
    that start fresh and for `init='random'`). Raises UserError for a part that the draft cannot
    carry.
    """
    check_carries(draft, method)
    if method.fresh:
        draft.reinitialise(seed)
    if method.expert:
        expert.attach(draft, width, init, seed, calibrate)
    if method.lora:
        lora.attach(draft, lora.linear_layers(draft, method), rank, seed)
    return declare(draft, method)


def check_carries(draft: Draft, method: Method) -> None:
    """Raise UserError, listing what is possible, for parts that this kind of draft does not have."""
    if method.expert:
        expert.widenable(draft)
    if "feature-map" in method.closed_form and not method.expert:
        feature_map.mapped_layer(draft)
    names = draft.trainable_names()
    missing = [part for part in method.parts if not _carries(names, part)]
    if missing:
        fitting = [p for p, row in ADAPTERS.items() if not row.closed_form and _carries(names, p)]
        raise UserError(
            f"this {draft.kind} draft has no {', '.join(missing)} to train (method {method.name}); "
            f"it can carry {', '.join(fitting)}"
        )


def _carries(names: Sequence[str], part: str) -> bool:
    """Whether a draft with trainable tensors of these names has what a part goes with."""
    row, alone = ADAPTERS[part], Method("", (part,))
    if part == "head-lora":
        return vocabulary_remap.HEAD in names
    return row.closed_form or not row.in_place or any(alone.trains_in_place(name) for name in names)


def declare(draft: Draft, method: Method) -> list[tuple[str, nn.Parameter]]:
    """Freeze the shared tensors; return those that require a gradient, by stored name."""
    draft.requires_grad_(False)
    mine = owned(draft, method)
    for _, parameter in mine:
        parameter.requires_grad_(True)
    return mine


def owned(draft: Draft, method: Method) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a method trains, by stored name."""
    trainable = set(draft.trainable_names())
    found = []
    for name, parameter in draft.named_parameters():
        stored = lora.stored_name(name)
        added = EXPERT in stored or LORA in stored
        if method.owns(stored) and (added or name in trainable):
            found.append((stored, parameter))
    return found


def take(
    draft: Draft, method: Method, dtype: torch.dtype | None = None, kept: Mapping[str, Tensor] = {}
) -> dict[str, Tensor]:
    """A copy of the adapter tensors as they are now, on the CPU, in `dtype` (default: as is).

    `kept` are further tensors of the adapter that are not trained.
    """
    taken = {
        name: parameter.detach().to(device="cpu", dtype=dtype, copy=True)
        for name, parameter in owned(draft, method)
    }
    return {**kept, **taken}


def put(draft: Draft, tensors: Mapping[str, Tensor]) -> None:
    """Write adapter tensors into a draft, attaching what holds them first."""
    if vocabulary_remap.NEW_ROWS in tensors:
        vocabulary_remap.attach(draft, tensors)
    widths = {
        n.split(EXPERT)[0]: t for n, t in tensors.items() if n.endswith("private.gate_proj.weight")
    }
    for name, gate in widths.items():
        ffn = draft.get_submodule(name)
        if isinstance(ffn, GatedFFN) and ffn.private is None:
            ffn.private = GatedFFN(gate.shape[1], gate.shape[0], ffn.activation).to(
                ffn.gate_proj.weight
            )
    ranks = {n.split(LORA)[0]: t.shape[0] for n, t in tensors.items() if f"{LORA}A" in n}
    if ranks and not any(LORA in name for name, _ in draft.named_parameters()):
        lora.attach(draft, list(ranks), max(ranks.values()), 0)
    parameters = {lora.stored_name(name): p for name, p in draft.named_parameters()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in vocabulary_remap.NAMES:
                parameters[name].copy_(tensor)


def merged_parameters(draft: Draft) -> int:
    """Parameters of the stock checkpoint that draft and adapter become."""
    return sum(
        t.numel()
        for name, t in draft.stored_state().items()
        if t.is_floating_point() and LORA not in name
    )
