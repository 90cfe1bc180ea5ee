"""A draft's loss over all rollout steps, computed a few labels at a time, gradients included.

Logits over a vocabulary are the largest numbers of a training step: of the teacher and, at every
rollout step, of the draft. Here they exist for one chunk of labels at a time. The teacher's are
computed once per chunk and serve all rollout steps; the draft's are computed once, because each
chunk's gradients are taken at once and its graph is dropped. The backward pass multiplies them by
the gradient of the loss.

Source of the idea: merged linear cross-entropy (Liger Kernel, arXiv 2410.10989), here for any loss of
the table and several rollout steps.

Shapes: N labels, M <= N labels of one rollout step (the last M), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functions import Loss, Teacher


@dataclass(frozen=True)
class Fused:
    """What is summed: `loss` between `teacher(labels)` and `draft_logits(states)`.

    `weights` are one per rollout step, `rows` the labels of one chunk.
    """

    loss: Loss
    teacher: Callable[[slice], Teacher]
    draft_logits: Callable[[Tensor], Tensor]
    weights: Sequence[float]
    rows: int


def fused_loss(fused: Fused, states: Sequence[Tensor]) -> Tensor:
    """Sum over rollout steps of weight * loss, a scalar.

    `states` are the draft's, [M, H] for each step: step j predicts the last M labels. Differentiable
    in them and in whatever parameters `draft_logits` uses.
    """
    device = states[0].device.type
    scope = _Autocast(device)
    with torch.enable_grad(), scope():
        leaves = leaves_of(fused.draft_logits(states[0][:1].detach()))
    wanted = torch.is_grad_enabled() and (leaves or any(s.requires_grad for s in states))
    if not wanted:
        return _walk(fused, scope, states, [], None)
    total: Tensor = _Fused.apply(fused, scope, len(states), *states, *leaves)  # type: ignore[no-untyped-call]
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
    """The autocast setting of the caller, for every chunk.

    Without its cache: weights cast in one chunk, where no gradient is wanted, would be handed to
    another, where one is.
    """

    def __init__(self, device: str):
        self.device = device
        self.enabled = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def __call__(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Fused, scope: _Autocast, steps: int, *tensors: Tensor) -> Tensor:
        grads = [torch.zeros_like(tensor) for tensor in tensors]
        total = _walk(fused, scope, tensors[:steps], tensors[steps:], grads)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(grad * own for own in ctx.saved_tensors)


def _walk(
    fused: Fused,
    scope: _Autocast,
    states: Sequence[Tensor],
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
) -> Tensor:
    """The sum; with `grads` also its gradients, added in place: of `states`, then of `leaves`."""
    count = len(states[0])
    total: Tensor | None = None
    for begin in range(0, max(count, 1), fused.rows):
        labels = slice(begin, min(begin + fused.rows, count))
        with torch.no_grad():
            teacher = fused.teacher(labels)
        for j, (weight, states_MH) in enumerate(zip(fused.weights, states, strict=True)):
            before = count - len(states_MH)  # labels that this step does not predict
            begins, ends = max(begin - before, 0), labels.stop - before
            if ends <= begins and count:
                continue
            here = states_MH[begins:ends].detach()
            with torch.set_grad_enabled(grads is not None), scope():
                here.requires_grad_(grads is not None)
                logits = fused.draft_logits(here)
                part = weight * fused.loss(teacher.last(len(here)), logits, here)
            if grads is not None:
                # The graph before the chunks, if there is one, serves them all.
                found = torch.autograd.grad(
                    part, [here, *leaves], retain_graph=True, materialize_grads=True
                )
                grads[j][begins:ends] = found[0]
                for whole, own in zip(grads[len(states) :], found[1:], strict=True):
                    whole += own
                del found
            part = part.detach()
            total = part if total is None else total.add_(part)
            del here, logits, part
        del teacher
    assert total is not None, "a rollout has a step"
    return total
