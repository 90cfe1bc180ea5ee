"""Merging: fold an adapter into plain dense weights, and take it out again.

Functions of tensors by name. What the tensors of each adapter become is its own file's; a tensor
that an adapter trained in place replaces the shared one of its name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kind import Tensors, adapter_of, by_adapter, every_kind, kinds_of, load
from .table import VOCABULARY, Method


def merge(shared: Tensors, adapter: Tensors) -> dict[str, Tensor]:
    """The merged tensors, in the shared tensors' dtypes. Neither input is changed.

    Raises ValueError when an adapter's tensor has no shared one to go with.
    """
    for name in adapter:
        if home_of(name) not in shared:
            raise ValueError(
                f"adapter tensor {name} has no shared tensor {home_of(name)} to go with"
            )
    merged = dict(shared)
    for kind, tensors in by_adapter(adapter):
        merged.update(kind.merge(merged, tensors))
    return merged


def extract(merged: Tensors, shared: Tensors, method: Method) -> dict[str, Tensor]:
    """The tensors of a merged draft's adapter, bit for bit; those that equal the shared are left out.

    Raises UserError for a method whose adapters cannot be taken out.
    """
    rest, found = dict(merged), {}
    for kind in (*kinds_of(method), load(VOCABULARY)):
        own, before = kind.extract(rest, shared)
        found.update(own)
        rest.update(before)
    replaced = {n: t.clone() for n, t in rest.items() if not torch.equal(t, shared[n])}
    return {**found, **replaced}


def home_of(name: str) -> str:
    """The shared tensor that one of an adapter goes with."""
    kind = adapter_of(name)
    return name if kind is None else kind.home(name)


def without_adapters(tensors: Tensors) -> dict[str, Tensor]:
    """A draft's tensors without those that an adapter brought."""
    return {n: t for n, t in tensors.items() if not any(kind.adds(n) for kind in every_kind())}
