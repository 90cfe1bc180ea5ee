"""The state that enters the target's final norm, which no model returns: found, caught and put back.

Hugging Face's hs[n] is the state after that norm, vLLM's is the one before. What is stored of a
target is the one before: the other follows from it, but not the reverse.

Shapes: B batch, T tokens, H target hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from .target import Target


@torch.no_grad()
def find_final_norm(target: Target) -> nn.Module:
    """The norm whose output is what enters the head, found by reading two tokens.

    Raises UserError for a model that does something else between its layers and its head.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []
    entering: list[Tensor] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        outputs.append((module, output))

    norms = [
        module
        for module in target.model.modules()
        if "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
    ]
    hooks = [module.register_forward_hook(note) for module in norms]
    hooks.append(target.head.register_forward_pre_hook(lambda _, args: entering.append(args[0])))
    try:
        target.model(input_ids=torch.tensor([[0, 1]], device=target.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for module, output in reversed(outputs):
        if entering and torch.equal(output, entering[-1]):
            return module
    raise UserError(
        f"target {target.name} ({type(target.model).__name__}) has no final norm whose output enters "
        "its head unchanged, so its last state cannot be stored; train without --features, which reads "
        "the target itself"
    )


@contextlib.contextmanager
def states_entering(norm: nn.Module) -> Iterator[list[Tensor]]:
    """What enters `norm` during the block: one [B, T, H] for each time it is run."""
    caught: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        yield caught
    finally:
        hook.remove()


@contextlib.contextmanager
def in_place_of(norm: nn.Module, last_BTH: Tensor, pre_norm: bool) -> Iterator[list[Tensor]]:
    """Put stored states into the model for the block, whatever its layers would say.

    They are what enters `norm`, or with `pre_norm` False what leaves it. The list gets what
    leaves it, hs[n], each time the model is run.
    """
    left: list[Tensor] = []

    def leave(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        left.append(output if pre_norm else last_BTH)
        return left[-1]

    hooks = [norm.register_forward_hook(leave)]
    if pre_norm:
        hooks.append(norm.register_forward_pre_hook(lambda _, args: (last_BTH, *args[1:])))
    try:
        yield left
    finally:
        for hook in hooks:
            hook.remove()
