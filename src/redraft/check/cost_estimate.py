"""What a repair would cost on this machine, from a trial of each of its parts.

The rate of answers is that of the requests already answered. For training, the adapter learns a few
batches of those answers and is thrown away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..adapters.table import read_method
from ..checkpoints.load import StoredDraft
from ..config import TrainConfig, resolve
from ..core.records import Answer
from ..models.target import Target
from ..training.train import train
from .prediction import ADAPT, KEEP, REFRESH, RETRAIN
from .recommendation import Bill


@dataclass(frozen=True)
class Plan:
    """An action's size: prompts that the target answers, and passes of training over the answers."""

    prompts: int
    epochs: float


PLANS = {ADAPT: Plan(256, 4.0), RETRAIN: Plan(1024, 4.0)}
"""What `redraft bench triage` did for the outcomes in the table of known cases."""
SETTINGS = {"train.loss": "ce", "train.batch_tokens": 512}
"""How it trained for them, and fitted the closed form, where that is not the default: a check goes by the same."""
TRAINING = resolve([("known cases", SETTINGS)]).config.train
TRIAL_PASSES = 2.0


def trial_of(method: str) -> TrainConfig:
    """The settings of a trial: two passes, without what is fitted in closed form."""
    trained = "+".join(read_method(method).trained)
    return dataclasses.replace(TRAINING, method=trained or TRAINING.method, epochs=TRIAL_PASSES)


def training_rate(
    target: Target, stored: StoredDraft, answers: Sequence[Answer], trial: TrainConfig, k: int
) -> float:
    """Answer tokens per second that an adapter learns from, on a few batches of `answers`."""
    draft = stored.build(target, torch.float32)
    trained = train(target, draft, answers, answers[:1], trial, k=k)
    return trained.record.supervised_tokens / max(trained.record.seconds, 1e-9)


def bills(
    answers: Sequence[Answer],
    answer_rate: float,
    train_rate: float,
    refresh_seconds: float | None,
) -> dict[str, Bill]:
    """The bill of every action. Rates are in tokens per second; None: refreshing was not tried, which
    takes the answers that are there already.

    A draft from nothing is taken to train at the rate of the adapter: it costs less than the
    target's reading, which both need.
    """
    mean = sum(answer.length for answer in answers) / len(answers)
    found = {KEEP: Bill(0, 0.0)}
    if refresh_seconds is not None:
        found[REFRESH] = Bill(0, refresh_seconds)
    for action, plan in PLANS.items():
        tokens = round(plan.prompts * mean)
        found[action] = Bill(tokens, tokens / answer_rate + plan.epochs * tokens / train_rate)
    return found
