"""An adapter as an object: attached to a draft for training, then taken off and kept.

Ownership is declared: after `prepare`, exactly the tensors that the method trains require a
gradient, and every other tensor of the draft is frozen. What is special about an adapter is in its
own file; these are loops over the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..drafts.base import Draft
from .kind import (
    Setup,
    adapter_of,
    by_adapter,
    kinds_of,
    load,
    stored_name,
)
from .merge import merge, without_adapters
from .table import ADAPTERS, Method


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by name (CPU), the method that made them, and what they belong to."""

    method: str
    tensors: dict[str, Tensor]
    card: dict[str, Any] = field(default_factory=dict)

    def parameter_count(self) -> int:
        return sum(t.numel() for t in self.tensors.values() if t.is_floating_point())

    def attached_to(self, draft: Draft) -> Draft:
        """A copy of `draft` with this adapter; it shares every tensor that the adapter does not replace."""
        return attached(draft, self.tensors)


def prepare(draft: Draft, method: Method, setup: Setup) -> list[tuple[str, nn.Parameter]]:
    """Attach a method's adapters to `draft` in place and return its trainable tensors.

    After this call the draft's outputs equal the unadapted draft's bit for bit (except for methods
    that start fresh and for `init='random'`). Raises UserError for an adapter that the draft cannot
    carry.
    """
    check_carries(draft, method, setup)
    if method.fresh:
        draft.reinitialise(setup.seed)
    for kind in kinds_of(method):
        kind.attach(draft, method, setup)
    return declare(draft, method)


def check_carries(draft: Draft, method: Method, setup: Setup) -> None:
    """Raise UserError, listing what is possible, for adapters that this draft cannot carry."""
    kinds = kinds_of(method)
    missing = [kind.name for kind in kinds if not kind.carries(draft)]
    if missing:
        trained = [load(row) for row in ADAPTERS.values() if not row.closed_form]
        fitting = [kind.name for kind in trained if kind.carries(draft)]
        raise UserError(
            f"this {draft.kind} draft has no {', '.join(missing)} to train (method {method.name}); "
            f"it can carry {', '.join(fitting)}"
        )
    if method.fresh:
        draft.check_fresh()
    for kind in kinds:
        kind.check(draft, method, setup)


def declare(draft: Draft, method: Method) -> list[tuple[str, nn.Parameter]]:
    """Freeze the shared tensors; return those that require a gradient, by stored name."""
    draft.requires_grad_(False)
    mine = owned(draft, method)
    for _, parameter in mine:
        parameter.requires_grad_(True)
    return mine


def owned(draft: Draft, method: Method) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a method trains, by stored name."""
    trainable, kinds = set(draft.trainable_names()), kinds_of(method)
    found = []
    for name, parameter in draft.named_parameters():
        stored = stored_name(name)
        kind = adapter_of(stored, kinds)
        if kind is not None and (kind.adds(stored) or name in trainable):
            found.append((stored, parameter))
    return found


def take(
    draft: Draft, method: Method, dtype: torch.dtype | None = None, kept: Mapping[str, Tensor] = {}
) -> dict[str, Tensor]:
    """A copy of the adapter tensors of now, on the CPU, in `dtype` (default: unchanged).

    `kept` are further tensors of the adapter that are not trained.
    """
    taken = {
        name: parameter.detach().to(device="cpu", dtype=dtype, copy=True)
        for name, parameter in owned(draft, method)
    }
    return {**kept, **taken}


def put(draft: Draft, tensors: Mapping[str, Tensor]) -> None:
    """Write adapter tensors into a draft, attaching what holds them first."""
    for kind, own in by_adapter(tensors):
        kind.restore(draft, own)


def attached(draft: Draft, tensors: Mapping[str, Tensor]) -> Draft:
    """A copy of `draft` with adapter tensors; it shares every tensor that they do not replace."""
    named = draft.named_parameters()
    own = [name for name, p in named if p.requires_grad or stored_name(name) in tensors]
    copy = draft.copy_sharing(own)
    put(copy, tensors)
    return copy


def merged_parameters(draft: Draft) -> int:
    """Parameters of the stock checkpoint that draft and adapter become."""
    state = {stored_name(n): t.to("meta") for n, t in draft.stored_state().items()}
    shared = without_adapters(state)
    merged = merge(shared, {name: state[name] for name in state if name not in shared})
    return sum(t.numel() for t in merged.values() if t.is_floating_point())
