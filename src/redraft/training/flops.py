"""Operations of a training step, counted on one batch apart from training.

Only forward passes run under PyTorch's counter, without gradients: training itself computes
otherwise while it is counted. A backward pass is taken as what its products cost: as much as the
forward pass for the gradient of inputs, and as much again for weights that train.

Shapes: N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import TrainConfig
from ..drafts.base import Draft
from ..losses.functions import LOSSES
from .teacher_batch import TeacherBatch


@dataclass(frozen=True)
class Flops:
    """Operations per token of a batch (padding counts): of the draft's rollout, of a training step of
    the draft, and of the target's head."""

    rollout: float = 0.0
    step: float = 0.0
    head: float = 0.0


@torch.no_grad()
def counted(work: Callable[[], object]) -> float:
    """Floating-point operations of `work`'s matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def count_flops(teacher_batch: TeacherBatch, draft: Draft, config: TrainConfig) -> Flops:
    """The operations of `draft` on a batch such as `teacher batch`'s."""
    batch, tokens = teacher_batch.batch, teacher_batch.batch.tokens_BT.numel()
    steps = config.rollout if draft.feeds_back else 1
    last: list[Tensor] = []

    def roll_out() -> None:
        rollout = draft.rollout(batch.tokens_BT, teacher_batch.features_BTF, batch.first, steps)
        last.extend(states[:1, :1] for states in rollout)

    def one_label() -> None:
        draft.logits(last[0])

    counts = [int((teacher_batch.offset_N >= 1 + j).sum()) for j in range(steps)]
    reads = LOSSES[config.loss].row.reads
    total = trained = 0.0
    for work, times in ((roll_out, 1), (one_label, sum(counts))):
        with products_of_trained(draft) as products:
            total += times * counted(work)
        trained += times * sum(products)
    alone = replace(teacher_batch, hold=False)
    head = counted(lambda: alone.teacher(draft, reads, slice(0, 1))) * counts[0]
    trains = any(parameter.requires_grad for parameter in draft.parameters())
    step = 2 * total + trained if trains else 0.0
    return Flops(total / tokens, step / tokens, head / tokens)


@contextmanager
def products_of_trained(draft: Draft) -> Iterator[list[float]]:
    """Operations of the draft's linear layers whose weights train, one entry per call."""
    found: list[float] = []

    def note(layer: nn.Linear, _: object, output: Tensor) -> None:
        if layer.weight.requires_grad:
            found.append(2.0 * output.numel() * layer.in_features)

    layers = [module for module in draft.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
