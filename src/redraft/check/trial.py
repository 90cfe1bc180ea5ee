"""What a way to adapt brings here: tried on one half of a check's answers, and measured on the other."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..adapters.table import read_method
from ..checkpoints.load import StoredDraft
from ..config import TrainConfig, resolve
from ..core.records import Answer, StepTrace
from ..metrics import intervals
from ..metrics.acceptance import pooled_tau, prompt_counts
from ..metrics.replay import replay_each
from ..models.target import Target
from ..pipeline.stages import merge_draft, train_adapter

BATCH_TOKENS = 1024
"""Of a trial: the answers are few, and in larger batches they would be few steps."""
WATCHED = 8
"""Answers by which the trained tensors are taken instead of the unadapted ones; they are trained on, too."""
DEFAULTS = resolve([]).config.train
MORE = (0.05, 0.35)
"""What adapting on 200 to 240 answers brings beyond the rise of a trial on 32, in tokens a step (body, greedy): a little more than the range
of what it brought on fine-tunes of SmolLM2-135M (docs/check.md). No multiple of the rise: few answers can lower tau where many raise it."""


@dataclass(frozen=True)
class Trial:
    """A draft adapted to `answers` answers in `seconds`, measured on `prompts` others with the unadapted draft.

    `difference` is the 95 % interval of the rise in tau, `rate` the answer tokens learned from per second.
    """

    method: str
    answers: int
    tau: float
    unadapted: float
    difference: tuple[float, float]
    prompts: int
    seconds: float
    rate: float


def adapting(method: str) -> TrainConfig:
    """How `redraft adapt` would train by default, in smaller batches; what is fitted in closed form aside."""
    trained = "+".join(read_method(method).trained)
    return dataclasses.replace(
        DEFAULTS, method=trained or DEFAULTS.method, batch_tokens=BATCH_TOKENS, evaluations=1
    )


def tried(
    target: Target,
    stored: StoredDraft,
    answers: Sequence[Answer],
    config: TrainConfig,
    k: int,
    level: float,
    base: Target | None = None,
    *,
    seed: int,
) -> tuple[Trial, Any]:
    """A trial of `config` on these answers, and the rise in tau as draws [N]; `level` is the intervals' nominal one.

    `seed` is of the draws: those of tau, and of another trial, come from other prompts.
    """
    half = len(answers) // 2
    learned, others = answers[:half], answers[half:]
    began = time.monotonic()
    adapter = train_adapter(target, stored, learned, learned[:WATCHED], config, k, base=base)
    seconds = time.monotonic() - began
    drafts = [stored.build(target), merge_draft(stored, adapter, target).build(target)]
    was, now = map(walked, replay_each(target, drafts, others, k))
    pair = prompt_counts(now), prompt_counts(was)
    record = adapter.card["train"]
    trial = Trial(
        method=config.method,
        answers=half,
        tau=pooled_tau(now),
        unadapted=pooled_tau(was),
        difference=intervals.difference(*pair, k, level).ends,
        prompts=len(now),
        seconds=seconds,
        rate=record["supervised_tokens"] / max(record["seconds"], 1e-9),
    )
    return trial, intervals.difference_draws(*pair, k, level, seed=seed)


def grown(now_N: Any, rise_N: Any, k: int, seed: int = 3) -> Any:
    """Tau after adapting as draws [N], from those of tau now and of a trial's rise. A draft that got worse is not kept."""
    more_N = np.random.default_rng(seed).uniform(*MORE, len(rise_N))
    return np.clip(now_N + rise_N + more_N, now_N, k + 1)


def walked(traces: Sequence[StepTrace]) -> list[StepTrace]:
    return [trace for trace in traces if trace.accepted]
