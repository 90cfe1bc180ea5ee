"""`redraft bench watch`: false alarms and delays of `redraft watch`, on the requests of a real run.

A look is a Poisson number of requests, drawn from the answers that a run of `redraft adapt` measured, with the steps that they take
with the adapted draft; after a fall a share of them takes those with the unadapted one. Time of day is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from redraft.core.console import Progress
from redraft.core.errors import UserError
from redraft.core.folders import read_json
from redraft.metrics.drift import FALLEN, Drift, Look
from redraft.pipeline.stages import STEPS

LEARN, DROP = 20, 0.1
MONTH = 43_200
"""Looks of 30 days, one a minute."""
REQUESTS = (5, 20, 100)
FALLS = (0.25, 0.5, 1.0)
MOST = 2_000
"""Looks after a fall that are waited for an alarm."""


@dataclass(frozen=True)
class WatchCell:
    """So many requests a look: alarms in `simulations` months without a fall, or looks from a fall (of tau to `after`) to the
    alarm: their median and the 95th percentile (above `MOST`: later than that), and how many falls were not found by then."""

    requests: int
    fallen: float
    before: float
    after: float
    simulations: int
    false_alarms: int | None = None
    median: float | None = None
    late: float | None = None
    missed: int | None = None


def bench_watch(run: Path, simulations: int = 20) -> list[WatchCell]:
    """The cells for a run's measured answers. Raises UserError for a run that kept no steps."""
    file = run / STEPS
    if not file.is_file():
        raise UserError(f"{file}: no such file; name a run folder of redraft adapt")
    steps = read_json(file)
    sets = [_requests(steps[f"eval-{when}"]) for when in ("after", "before")]
    taus = [1 + float(each[:, 1].sum() / each[:, 0].sum()) for each in sets]
    cells = []
    with Progress("simulating", len(REQUESTS) * (1 + len(FALLS)), "cells") as progress:
        for requests in REQUESTS:
            alarms = sum(_months(sets[0], requests, seed) for seed in range(simulations))
            cells.append(WatchCell(requests, 0.0, taus[0], taus[0], simulations, alarms))
            progress.advance(1)
            for fallen in FALLS:
                delays = [_delay(sets, requests, fallen, seed) for seed in range(10 * simulations)]
                missed = sum(delay is None for delay in delays)
                waited = [MOST + 1 if delay is None else delay for delay in delays]
                mixed = _mixed_tau(sets, fallen)
                cells.append(
                    WatchCell(
                        *(requests, fallen, taus[0], mixed, len(delays)),
                        median=float(np.quantile(waited, 0.5, method="higher")),
                        late=float(np.quantile(waited, 0.95, method="higher")),
                        missed=missed,
                    )
                )
                progress.advance(1)
    return cells


def _requests(accepted: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """For each answer: steps, accepted tokens, then those by position."""
    k = max(max(each, default=0) for each in accepted)
    rows = [
        [len(each), sum(each), *(sum(n >= at for n in each) for at in range(1, k + 1))]
        for each in accepted
        if each
    ]
    return np.array(rows)


def _looks(
    draw: np.random.Generator, requests: NDArray[np.int64], mean: int, count: int
) -> Iterator[Look]:
    for at in range(count):
        some = requests[draw.integers(0, len(requests), max(int(draw.poisson(mean)), 1))].sum(0)
        yield Look(float(at), int(some[0]), int(some[1]), tuple(some[2:].tolist()))


def _learned(draw: np.random.Generator, requests: NDArray[np.int64], mean: int) -> Drift:
    drift = Drift(expected=None, drop=DROP, between_alarms=MONTH, learn=LEARN)
    for look in _looks(draw, requests, mean, LEARN):
        drift.add(look)
    return drift


def _months(requests: NDArray[np.int64], mean: int, seed: int) -> int:
    """False alarms of a month; after each the evidence begins again."""
    draw = np.random.default_rng(seed)
    drift, alarms = _learned(draw, requests, mean), 0
    for look in _looks(draw, requests, mean, MONTH):
        if drift.add(look).state == FALLEN:
            alarms, drift.evidence = alarms + 1, 0.0
    return alarms


def _delay(sets: Sequence[NDArray[np.int64]], mean: int, fallen: float, seed: int) -> int | None:
    """Looks from a fall to the alarm."""
    draw = np.random.default_rng(seed)
    drift = _learned(draw, sets[0], mean)
    kept, lost = (
        _looks(draw, each, max(round(mean * share), 1), MOST)
        for each, share in zip(sets, (1 - fallen, fallen), strict=True)
    )
    for number, (one, other) in enumerate(zip(kept, lost, strict=True)):
        look = other if fallen == 1 else _sum(one, other)
        if drift.add(look).state == FALLEN:
            return number + 1
    return None


def _sum(one: Look, other: Look) -> Look:
    positions = tuple(a + b for a, b in zip(one.per_position, other.per_position, strict=False))
    return Look(one.at, one.drafts + other.drafts, one.accepted + other.accepted, positions)


def _mixed_tau(sets: Sequence[NDArray[np.int64]], fallen: float) -> float:
    """tau where a share of the requests takes the other steps."""
    kept, lost = (each.mean(0) for each in sets)
    whole: Any = (1 - fallen) * kept[:2] + fallen * lost[:2]
    return 1 + float(whole[1] / whole[0])


def print_cells(cells: Sequence[WatchCell]) -> None:
    """A line for each cell."""
    for cell in cells:
        begin = f"{cell.requests:4} requests a look  tau {cell.before:.2f} -> {cell.after:.2f}  "
        if cell.false_alarms is not None:
            typer.echo(f"{begin}{cell.false_alarms} alarms in {cell.simulations} months of looks")
        else:
            median, late = shown(cell.median), shown(cell.late)
            typer.echo(
                f"{begin}found after {median} looks (95 % within {late}; {cell.simulations} falls)"
            )


def shown(looks: float | None) -> str:
    """So many looks, or more than were waited for."""
    return f"{looks:.0f}" if looks is not None and looks <= MOST else f"> {MOST:,}"
