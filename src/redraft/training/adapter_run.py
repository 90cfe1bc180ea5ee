"""An adapter run: one adapter in training, with its own draft, optimizer and state.

What it shares with the others is the stream: the batches and the target's output on them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters.adapter import take
from ..adapters.kind import Fitted, adapter_of, kinds_of
from ..adapters.table import Method
from ..adapters.vocabulary_remap import HEAD, Remapped, extract
from ..config import TrainConfig
from ..core import ranks
from ..core.errors import UserError
from ..drafts.base import Draft
from .checkpoint import TrainState, owners_of
from .flops import Flops
from .optimizer import peak_rate, schedule
from .precision import autocast
from .teacher_batch import TeacherBatch, rollout_loss

RISE = 0.001
"""Held-out tau must rise by this much to count as progress."""


class DivergedError(UserError):
    """The loss stopped being finite."""


@dataclass
class AdapterRun:
    """`kept` are tensors of the adapter that were fitted before training and stay."""

    draft: Draft
    method: Method
    config: TrainConfig
    trainable: list[tuple[str, nn.Parameter]]
    optimizers: list[torch.optim.Optimizer]
    kept: dict[str, Tensor]
    planned: int
    remapped: Remapped | None = None
    hook: RemovableHandle | None = None  # keeps rows of the head in place while others train
    fitted: Fitted = field(default_factory=Fitted)
    diverged: bool = False
    loss: float = 0.0
    """Of what was added up for the next step."""
    start: dict[str, Tensor] = field(init=False)
    """The tensors before the first step."""
    state: TrainState = field(init=False)
    flops: Flops = field(default_factory=Flops)

    def __post_init__(self) -> None:
        self.start = self.take()
        self.state = TrainState(0, 0, [], 0, self.start, math.nan, 0.0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.trainable]

    def take(self) -> dict[str, Tensor]:
        taken = take(self.draft, self.method, kept=self.kept)
        if self.remapped is not None:
            taken |= extract(self.draft, self.remapped.original)
        return taken

    def trained_parameters(self) -> int:
        """Numbers that training moves; of a head whose new rows alone are trained, those."""
        count = sum(parameter.numel() for parameter in self.parameters)
        if self.remapped is not None and adapter_of(HEAD, kinds_of(self.method)) is None:
            head = self.draft.get_parameter(HEAD)
            count -= (len(head) - len(self.remapped.added)) * head.shape[1]
        return count

    def done(self) -> bool:
        return self.diverged or self.state.step >= self.planned or self.stalled()

    def stalled(self) -> bool:
        """Whether the last `patience` evaluations brought no rise over those before them, nor the last one over these.

        Not before half of the steps, and not while the start is the best: much of the rise comes as the learning rate falls,
        after a fall at first.
        """
        taus, patience = [tau for _, tau in self.state.heldout_tau], self.config.patience
        if len(taus) <= patience or 2 * self.state.step < self.planned or not self.state.best_step:
            return False
        rising = taus[-1] >= max(taus[-max(patience, 2) : -1]) + RISE
        return not rising and max(taus[-patience:]) < max(taus[:-patience]) + RISE

    def add(self, teacher_batch: TeacherBatch, precision: str, weight: float) -> None:
        """Add the gradients of a part of the step's batch, whose whole weight is `weight`."""
        began, state, c = time.monotonic(), self.state, self.config
        with autocast(teacher_batch.batch.tokens_BT.device, precision):
            loss, _ = rollout_loss(teacher_batch, self.draft, c, state.step, weight)
        self.loss += loss.item()
        if math.isfinite(self.loss):
            loss.backward()  # type: ignore[no-untyped-call]
        state.seconds += teacher_batch.seconds + time.monotonic() - began

    def learn(self, supervised_tokens: int) -> None:
        """One optimizer step by what was added up, on all ranks; the state moves on by one."""
        if not self.optimizers:
            raise AssertionError("nothing to train")
        began, state, c = time.monotonic(), self.state, self.config
        share = schedule(state.step, self.planned, c.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        state.last_loss, self.loss = self._of_all_ranks(), 0.0
        if not math.isfinite(state.last_loss):
            raise DivergedError(
                f"the loss became {state.last_loss} at step {state.step} (learning rate "
                f"{peak_rate(c, self.draft):g}); lower train.lr or set train.precision fp32. Everything "
                "finished before this step is kept"
            )
        nn.utils.clip_grad_norm_(self.parameters, c.clip)
        self._move()
        state.step += 1
        state.supervised_tokens += supervised_tokens
        self._average()
        state.seconds += time.monotonic() - began

    def _of_all_ranks(self) -> float:
        """The loss of all ranks; the gradients become theirs too. One that no rank has stays away."""
        if ranks.shares() == 1:
            return self.loss
        device = self.parameters[0].device
        has = torch.tensor([p.grad is not None for p in self.parameters], device=device)
        loss = torch.tensor(self.loss, dtype=torch.float64, device=device)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        anywhere = has.float()
        ranks.summed([anywhere, loss, *(p.grad for p in self.parameters if p.grad is not None)])
        for parameter, somewhere in zip(self.parameters, anywhere.tolist(), strict=True):
            if not somewhere:
                parameter.grad = None
        return float(loss)

    def _move(self) -> None:
        """One step of the optimizers. Each rank moves tensors of its own, whose state it alone keeps, and gets the others'."""
        owners = owners_of(self.trainable)
        for parameter, owner in zip(self.parameters, owners, strict=True):
            if owner != ranks.rank():
                parameter.grad = None
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ranks.given([parameter.detach() for parameter in self.parameters], owners)

    def note_tau(self, tau: float) -> None:
        """Record an evaluation of the present tensors, and keep them if they are the best so far."""
        state = self.state
        if tau > state.best_tau():
            state.best, state.best_step = self.take(), state.step
        state.heldout_tau.append((state.step, tau))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The running average of the weights in place of the present ones."""
        now = {name: parameter.detach().clone() for name, parameter in self.trainable}
        self._write(self.state.average)
        try:
            yield
        finally:
            self._write(now)

    @torch.no_grad()
    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainable:
            parameter.copy_(tensors[name])

    def _average(self) -> None:
        if not self.config.average:
            return
        decay = min(self.config.average, (1 + self.state.step) / (10 + self.state.step))
        for name, parameter in self.trainable:
            now = parameter.detach().cpu()
            if name not in self.state.average:
                self.state.average[name] = now.clone()
            self.state.average[name].lerp_(now, 1 - decay)
