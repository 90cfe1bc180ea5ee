"""One server tried on one set of prompts: its answers, its counters, and its speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.records import Prompt, Throughput
from .counters import Counters
from .engine import RunningEngine

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Trial:
    """What a server did: per concurrency the answers of the first pass and the throughput, and the
    counters of the first pass with one request at a time."""

    answers: dict[int, list[list[int]]]
    speed: dict[int, Throughput]
    counted: Counters


def try_server(
    engine: RunningEngine,
    prompts: Sequence[Prompt],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    concurrencies: Sequence[int],
    repeats: int,
    label: str,
) -> Trial:
    """Send all prompts at every concurrency, `repeats` times each, after a short warm-up.

    One request at a time is always among the concurrencies: there an engine's steps can be counted
    against redraft's.
    """
    levels = sorted({1, *concurrencies})
    warm = list(prompts[: levels[-1]])
    engine.complete_all(
        warm, WARM_UP_TOKENS, stop_ids, concurrency=levels[-1], label=f"{label}, warm-up"
    )
    answers: dict[int, list[list[int]]] = {}
    speed = {}
    counted = Counters()
    for level in levels:
        rates = []
        for repeat in range(repeats):
            before = engine.counters()
            began = time.perf_counter()
            found = engine.complete_all(
                prompts,
                max_new_tokens,
                stop_ids,
                concurrency=level,
                label=f"{label}, {level} at a time",
            )
            rates.append(sum(map(len, found)) / (time.perf_counter() - began))
            if repeat == 0:
                answers[level] = found
                counted = engine.counters().since(before) if level == 1 else counted
        speed[level] = _throughput(label, rates, answers[level])
    return Trial(answers, speed, counted)


def _throughput(name: str, rates: list[float], answers: Sequence[Sequence[int]]) -> Throughput:
    ranked = sorted(rates)
    middle = ranked[len(ranked) // 2]
    tokens = sum(map(len, answers))
    return Throughput(name, middle, ranked[0], ranked[-1], len(ranked), len(answers), tokens)
