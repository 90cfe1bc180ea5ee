"""Training a private part: one loop with explicit arguments.

The target runs inside the loop (its features are streamed, nothing is stored). The draft is rolled
out over several steps on the true tokens and its own states, and each step's distribution is
pulled towards the target's. Batches, learning rates and evaluations are decided by step numbers,
never by the clock, so that a resumed run ends where an uninterrupted one does.

Shapes: B batch, T tokens, S chain starts, H draft hidden, V target vocabulary, D draft vocabulary,
N supervised labels.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, collate, plan_epochs
from ..config import TrainConfig
from ..console import Progress, say
from ..drafts.base import Draft, select_columns
from ..errors import UserError
from ..faults import point
from ..formats.folders import state_hash
from ..measuring.acceptance import pooled_tau
from ..measuring.replay import check_overrun, replay
from ..private.part import prepare, put, take
from ..records import Answer, TrainRecord
from ..target import Target
from .checkpoint import TrainState, load_checkpoint, save_checkpoint
from .losses import Teacher, forward_kl
from .memory import peak_memory, predict_peak, restart_peak
from .precision import autocast, choose_precision

CALIBRATION_BATCHES = 4
RISE = 0.001
"""Held-out tau must rise by this much to count as progress."""
AUTO_LR = 0.4
"""The automatic peak learning rate is this over the hidden size: 1e-4 at 4096, as published."""


@dataclass(frozen=True)
class Trained:
    """The private tensors at the best held-out tau (float32, CPU), and the record of the run."""

    tensors: dict[str, Tensor]
    record: TrainRecord


def train(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    config: TrainConfig,
    *,
    k: int,
    checkpoints: Path | None = None,
) -> Trained:
    """Train `config.method`'s private part of `draft` (float32, bound to `target`) in place.

    `heldout` answers, with K-1 tokens of overrun, decide when to stop and which step is best.
    Raises UserError when the loss stops being finite; the last checkpoint is kept.
    """
    answers = [answer for answer in answers if answer.length >= 2]
    heldout = [answer for answer in heldout if answer.length >= 2]
    if not answers or not heldout:
        raise UserError(
            f"{len(answers)} answers to train on and {len(heldout)} held out: both are needed, with "
            "two tokens or more (the first comes from the prefill); does the target answer at all?"
        )
    check_overrun(heldout, k)
    started = time.monotonic()
    lengths = [len(a.prompt) + a.length for a in answers]
    plan = plan_epochs(lengths, config.batch_tokens, config.epochs, config.seed)
    key = _key(config, plan, target, draft, answers, heldout, k)
    trainable = _prepare(target, draft, answers, plan, config)
    optimizer = _optimizer(trainable, config, draft)
    state = (checkpoints and load_checkpoint(checkpoints, trainable, optimizer, key)) or TrainState(
        0, 0, [], 0, take(draft, config.method), math.nan, 0.0
    )
    # Decided once: a resumed run computes as it began.
    state.precision = precision = state.precision or _precision(
        target, draft, answers, plan, config, optimizer
    )
    restart_peak(target.device)
    predicted = predict_peak(
        target, draft, trainable, config.batch_tokens, max(lengths), config.rollout
    )
    say(
        f"training {sum(p.numel() for _, p in trainable):,} parameters ({config.method}), "
        f"{len(plan)} steps, {precision}, about {predicted:,.0f} MB at the peak"
    )
    if state.step:
        say(f"continuing at step {state.step} of {len(plan)}")

    def evaluate() -> None:
        _evaluate(target, draft, heldout, config, k, state)
        if checkpoints:
            save_checkpoint(checkpoints, state, trainable, optimizer, key)

    if not state.heldout_tau:
        evaluate()  # what training has to beat
    every = math.ceil(len(plan) / config.evaluations)
    with Progress("training", len(plan), "steps") as progress:
        progress.advance(state.step)
        while state.step < len(plan) and not _stalled(state, config.patience):
            batch = collate([answers[i] for i in plan[state.step]], target.device)
            rate = schedule(state.step, len(plan), config.warmup)
            _step(target, draft, batch, config, trainable, optimizer, rate, precision, state)
            if state.step % every == 0 or state.step == len(plan):
                evaluate()
            point("training: after a step")
            progress.advance(1, _note(state))
    put(draft, state.best)
    record = TrainRecord(
        method=config.method,
        trained_parameters=sum(p.numel() for _, p in trainable),
        draft_parameters=draft.parameter_count(),
        unique_answer_tokens=sum(a.length for a in answers),
        seconds=time.monotonic() - started,
        precision=precision,
        predicted_peak_mb=predicted,
        peak_mb=peak_memory(target.device),
        **_progress_made(state, plan, lengths),
    )
    return Trained(state.best, record)


def _progress_made(state: TrainState, plan: list[list[int]], lengths: list[int]) -> dict[str, Any]:
    """The part of a run's record that its state holds."""
    read = sum(lengths[i] for batch in plan[: state.step] for i in batch)
    return {
        "steps": state.step,
        "planned_steps": len(plan),
        "supervised_tokens": state.supervised_tokens,
        "final_loss": state.last_loss,
        "heldout_tau": tuple(state.heldout_tau),
        "best_step": state.best_step,
        "tokens_per_second": read / max(state.seconds, 1e-9),
        "stopped_early": state.step < len(plan),
    }


def _step(
    target: Target,
    draft: Draft,
    batch: Batch,
    config: TrainConfig,
    trainable: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    rate: float,
    precision: str,
    state: TrainState,
) -> None:
    """One optimizer step at `rate` of the peak learning rate; `state` moves on by one."""
    began = time.monotonic()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    with autocast(target.device, precision):
        loss, count = rollout_loss(target, draft, batch, config)
    state.last_loss = loss.item()
    if not math.isfinite(state.last_loss):
        raise UserError(
            f"the loss became {state.last_loss} at step {state.step} (learning rate "
            f"{_lr(config, draft):g}); lower --lr or use --precision fp32. Everything finished "
            "before this step is kept"
        )
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for _, p in trainable], config.clip)
    optimizer.step()
    state.step += 1
    state.supervised_tokens += count
    state.seconds += time.monotonic() - began


def rollout_loss(
    target: Target, draft: Draft, batch: Batch, config: TrainConfig
) -> tuple[Tensor, int]:
    """KL per supervised token over all rollout steps, weighted by step_decay ** j.

    Returns the loss and the number of supervised tokens (those of step 0).
    """
    row_N, label_N, offset_N = batch.labels()
    with torch.no_grad():
        # The target computes as it will be served, also where the draft trains under autocast.
        with torch.autocast(target.device.type, enabled=False):
            reading = target.read(batch.tokens_BT, draft.taps)
        # The target predicts a label from the position before it.
        logits_NV = reading.logits_BTV[row_N, label_N - 1]
        teacher = Teacher.from_logits(select_columns(logits_NV, draft.draft_vocab))
    total: Tensor | None = None
    weight = 0.0
    rollout = draft.rollout(batch.tokens_BT, reading.features_BTF, batch.first, config.rollout)
    for step, states_BSH in enumerate(rollout):
        begin = int((offset_N < 1 + step).sum())
        if begin == len(label_N):
            break
        start_N = label_N[begin:] - 2 - step - batch.first
        logits_ND = draft.logits(states_BSH[row_N[begin:], start_N])
        loss = forward_kl(teacher.last(len(start_N)), logits_ND)
        share = config.step_decay**step
        total = share * loss if total is None else total + share * loss
        weight += share * len(start_N)
    if total is None:
        raise UserError(
            "a batch holds no supervised token: its answers have fewer than two tokens, and the "
            "first comes from the prefill"
        )
    return total / weight, len(label_N)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to a tenth."""
    rising = max(round(steps * warmup), 1)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(steps - rising, 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def _prepare(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    plan: list[list[int]],
    config: TrainConfig,
) -> list[tuple[str, nn.Parameter]]:
    def calibrate() -> None:
        for indices in plan[:CALIBRATION_BATCHES]:
            batch = collate([answers[i] for i in indices], target.device)
            features = target.read(batch.tokens_BT, draft.taps).features_BTF
            for _ in draft.rollout(batch.tokens_BT, features, batch.first, config.rollout):
                pass

    return prepare(
        draft,
        config.method,
        width=config.width,
        init=config.init,
        seed=config.seed,
        calibrate=calibrate,
    )


def _lr(config: TrainConfig, draft: Draft) -> float:
    hidden = next(p.shape[0] for n, p in draft.named_parameters() if n.endswith("norm.weight"))
    return config.lr or AUTO_LR / hidden


def _optimizer(
    trainable: list[tuple[str, nn.Parameter]], config: TrainConfig, draft: Draft
) -> torch.optim.AdamW:
    """AdamW(.9, .95); vectors and the expert's zero-started projection are never decayed."""
    peak = _lr(config, draft)

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() > 1 and not name.endswith("private.down_proj.weight")

    groups = [
        {
            "params": [p for n, p in trainable if decays(n, p) == decayed],
            "weight_decay": config.weight_decay if decayed else 0.0,
            "peak": peak,
        }
        for decayed in (True, False)
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=peak, betas=(0.9, 0.95))


def _precision(
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    plan: list[list[int]],
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
) -> str:
    if config.precision != "auto":
        return config.precision

    def step(at: int) -> None:
        batch = collate([answers[i] for i in plan[at % len(plan)]], target.device)
        rollout_loss(target, draft, batch, config)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()

    return choose_precision(target.device, step)


def _evaluate(
    target: Target,
    draft: Draft,
    heldout: Sequence[Answer],
    config: TrainConfig,
    k: int,
    state: TrainState,
) -> None:
    tau = pooled_tau([t for t in replay(target, draft, heldout, k) if t.accepted])
    if tau > state.best_tau():
        state.best, state.best_step = take(draft, config.method), state.step
    state.heldout_tau.append((state.step, tau))


def _note(state: TrainState) -> str:
    note = f"loss {state.last_loss:.3f}"
    return note + (f"  held-out tau {state.heldout_tau[-1][1]:.3f}" if state.heldout_tau else "")


def _stalled(state: TrainState, patience: int) -> bool:
    """Whether the last `patience` evaluations brought no rise over those before them."""
    taus = [tau for _, tau in state.heldout_tau]
    if len(taus) <= patience:
        return False
    return max(taus[-patience:]) < max(taus[:-patience]) + RISE


def _key(
    config: TrainConfig,
    plan: list[list[int]],
    target: Target,
    draft: Draft,
    answers: Sequence[Answer],
    heldout: Sequence[Answer],
    k: int,
) -> str:
    """Identifies everything that a run's tensors depend on; a checkpoint of another is not continued."""
    about = [
        asdict(config),
        plan,
        target.fingerprint(),
        draft.taps,
        state_hash({**draft.stored_state(), "features": torch.tensor(draft.feature_size)}),
        [[a.id, a.tokens] for a in answers],
        [[a.id, a.tokens] for a in heldout],
        k,
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
