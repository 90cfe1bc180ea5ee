"""A sum over rows, computed a few rows at a time, forward and again backward.

Nothing of a chunk outlives it: the forward pass keeps no graph, and the backward pass makes each
chunk's anew. That is what checkpointing every chunk would do, but its graph nodes live on between
the chunks' large blocks, and the C allocator then returns none of those (at 150,000 columns and
2,000 rows the process grew by 2 GB; this way by 0.1).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

OfChunk = Callable[[Tensor, slice], Tensor]
"""Some rows, and which they are, to a scalar."""


def sum_in_chunks(of_chunk: OfChunk, rows: Tensor, size: int) -> Tensor:
    """Sum of `of_chunk` over chunks of `size` rows.

    Differentiable in `rows` and in whatever else `of_chunk` uses, which one row tells.
    """
    begun = _Autocast(rows.device.type)
    with torch.enable_grad(), begun():
        leaves = leaves_of(of_chunk(rows[:1].detach(), slice(0, len(rows[:1]))))
    total: Tensor = _Sum.apply(of_chunk, size, begun, rows, *leaves)  # type: ignore[no-untyped-call]
    return total


def leaves_of(result: Tensor) -> list[Tensor]:
    """The tensors whose gradients a backward pass from `result` would accumulate."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    stack: list[Any] = [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [before for before, _ in node.next_functions]
    return found


class _Autocast:
    """The autocast setting of the forward pass, for every chunk of both passes.

    Without its cache: weights cast in one chunk, where no gradient is wanted, would be handed to
    another, where one is.
    """

    def __init__(self, device: str):
        self.device = device
        self.enabled = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def __call__(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, of_chunk: OfChunk, size: int, begun: _Autocast, rows: Tensor, *leaves: Tensor
    ) -> Tensor:
        ctx.of_chunk, ctx.size, ctx.begun = of_chunk, size, begun
        ctx.save_for_backward(rows, *leaves)
        total: Tensor | None = None
        with begun():
            for chunk in _chunks(len(rows), size):
                part = of_chunk(rows[chunk], chunk)
                total = part if total is None else total.add_(part)
        assert total is not None
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *leaves = ctx.saved_tensors
        grad_rows, *grads = [torch.zeros_like(tensor) for tensor in (rows, *leaves)]
        for chunk in _chunks(len(rows), ctx.size):
            with torch.enable_grad(), ctx.begun():
                here = rows[chunk].detach().requires_grad_()
                part = ctx.of_chunk(here, chunk)
            # The graph before the chunks, if there is one, serves them all.
            found = torch.autograd.grad(
                part, [here, *leaves], grad, retain_graph=True, materialize_grads=True
            )
            grad_rows[chunk] = found[0]
            for whole, own in zip(grads, found[1:], strict=True):
                whole += own
            del here, part, found
        return None, None, None, grad_rows, *grads


def _chunks(count: int, size: int) -> list[slice]:
    """Slices of `size` rows that cover `count`; one, of none, where there are none."""
    return [slice(b, min(b + size, count)) for b in range(0, max(count, 1), size)]
