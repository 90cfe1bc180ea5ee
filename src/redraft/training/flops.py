"""Operations of a training step, counted on one batch apart from training.

Only forward passes run under PyTorch's counter, without gradients: training itself computes
otherwise while it is counted. A backward pass is taken as what its products cost: as much as the
forward pass for the gradient of inputs, and as much again for weights that train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import TrainConfig
from ..core.records import Answer
from ..drafts.base import Draft
from ..losses.functions import LOSSES
from .teacher_batch import TeacherBatch


@dataclass(frozen=True)
class Work:
    """What batches ask of a draft: tokens, which a rollout's first step reads; the chains that its later steps go on with; and
    labels, of all steps and of the first. Padding counts, but has no labels."""

    tokens: int
    chained: int
    labels: int
    first_labels: int


def work_of(batches: Iterable[Sequence[Answer]], steps: int) -> Work:
    """Of a rollout of so many steps over each of the batches."""
    tokens = chained = labels = first_labels = 0
    for batch in batches:
        longest = max(len(answer.prompt) + answer.length for answer in batch)
        first = max(min(len(answer.prompt) for answer in batch) - 1, 0)
        tokens += len(batch) * longest
        chained += chains(len(batch), longest, first, steps)
        lengths = [answer.length for answer in batch]
        labels += sum(max(n - 1 - step, 0) for n in lengths for step in range(steps))
        first_labels += sum(lengths) - len(batch)
    return Work(tokens, chained, labels, first_labels)


def chains(rows: int, length: int, first: int, steps: int) -> int:
    """Those that go on after the first step: of all rows from the start `first` on, which the shortest prompt needs."""
    return rows * sum(max(length - 2 - first - step, 0) for step in range(1, steps))


class Each(NamedTuple):
    """Operations for a token, for a chain that goes on, and for a label."""

    token: float = 0.0
    chained: float = 0.0
    label: float = 0.0

    def of(self, work: Work) -> float:
        return self.token * work.tokens + self.chained * work.chained + self.label * work.labels


NOTHING = Each()


@dataclass(frozen=True)
class Flops:
    """Operations of the draft's rollout and of a training step of it, and of the target's head for a label of the first step."""

    rollout: Each = NOTHING
    step: Each = NOTHING
    head: float = 0.0


@torch.no_grad()
def counted(work: Callable[[], object]) -> float:
    """Floating-point operations of `work`'s matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def count_flops(teacher_batch: TeacherBatch, draft: Draft, config: TrainConfig) -> Flops:
    """The operations of `draft`, from those on a batch. Answers of other batches may have more labels for a token, so each
    part is counted apart; attention grows with a row, and its mean is taken."""
    batch = teacher_batch.batch
    rows, length = batch.tokens_BT.shape
    steps = config.rollout if draft.feeds_back else 1
    last: list[Tensor] = []

    def roll_out(steps: int) -> None:
        rollout = draft.rollout(batch.tokens_BT, teacher_batch.features_BTF, batch.first, steps)
        last[:] = [states[:1, :1] for states in rollout]

    def cost(work: Callable[[], object]) -> tuple[float, float]:
        """All operations, and those in layers whose weights train."""
        with products_of_trained(draft) as products:
            return counted(work), sum(products)

    first = cost(lambda: roll_out(1))
    whole = cost(lambda: roll_out(steps)) if steps > 1 else first
    label = cost(lambda: draft.logits(last[0]))
    chained = chains(rows, length, batch.first, steps)
    rollout, trained = (
        Each(first[i] / (rows * length), (whole[i] - first[i]) / max(chained, 1), label[i])
        for i in (0, 1)
    )
    alone = replace(teacher_batch, hold=False)
    head = counted(lambda: alone.teacher(draft, LOSSES[config.loss].row.reads, slice(0, 1)))
    if not any(parameter.requires_grad for parameter in draft.parameters()):
        return Flops(rollout, NOTHING, head)
    step = Each(*(2 * all_of_it + part for all_of_it, part in zip(rollout, trained, strict=True)))
    return Flops(rollout, step, head)


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
