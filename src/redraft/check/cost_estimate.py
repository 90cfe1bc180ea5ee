"""Cost estimate: what adapting would cost on this machine, from a trial of each of its parts.

The rate of answers is that of the requests already answered, that of training the trial's (see `trial.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import resolve
from ..core.records import Answer
from .calibration_runs import ADAPT, CLOSED_FORM, KEEP, SCRATCH
from .recommendation import Cost


@dataclass(frozen=True)
class Plan:
    """An action's size: prompts that the target answers, and passes of training over the answers."""

    prompts: int
    epochs: float


PLANS = {ADAPT: Plan(256, 4.0), SCRATCH: Plan(1024, 4.0)}
"""What `redraft bench triage` did for the outcomes of the calibration runs."""
SETTINGS = {"train.method": "expert+fc+norms", "train.loss": "ce", "train.batch_tokens": 512}
"""How it trained, and fitted the closed form, where that is not the default: a check does the same. Its learning rate
was three times today's automatic one."""
TRAINING = resolve([("calibration runs", SETTINGS)]).config.train


def costs_of(
    answers: Sequence[Answer],
    answer_rate: float,
    train_rate: float,
    closed_form_seconds: float | None,
) -> dict[str, Cost]:
    """The cost of every action. Rates are in tokens per second; None: the closed form, which takes the answers
    that are there already, was not tried.

    A from-scratch draft is taken to train at the rate of the adapter: it costs less than the
    target's reading, which both need.
    """
    mean = sum(answer.length for answer in answers) / len(answers)
    found = {KEEP: Cost(0, 0.0)}
    if closed_form_seconds is not None:
        found[CLOSED_FORM] = Cost(0, closed_form_seconds)
    for action, plan in PLANS.items():
        tokens = round(plan.prompts * mean)
        found[action] = Cost(tokens, tokens / answer_rate + plan.epochs * tokens / train_rate)
    return found
