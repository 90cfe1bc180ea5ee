"""The interval that a check reports covers 95 % although the check stops when the interval is narrow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from redraft.check import evidence
from redraft.check.calibration_runs import KEEP
from redraft.check.evidence import BATCH, gather
from redraft.checkpoints.load import read_draft
from redraft.config import RegenerateConfig
from redraft.core.records import StepTrace
from redraft.metrics import intervals
from redraft.metrics.acceptance import pooled_tau, prompt_counts
from redraft.metrics.replay import replay
from redraft.models.target import Target
from tests.conftest import write_prompts

K, CHECKS, MOST = 4, 1500, 64
BAR = 0.95 - 3 * (0.95 * 0.05 / CHECKS) ** 0.5


def traces(mean: float, concentration: float) -> list[StepTrace]:
    """A population of prompts: chains of K, answers of 60 tokens or so."""
    rng = np.random.default_rng(0)
    found = []
    for at in range(2000):
        rate = min(rng.beta(mean * concentration, (1 - mean) * concentration), 0.999)
        steps = int(np.clip(40 * np.exp(0.6 * rng.normal()), 1, 128))
        accepted = np.minimum(rng.geometric(1 - rate, steps) - 1, K)
        found.append(StepTrace(str(at), tuple(accepted.tolist()), steps))
    return found


@pytest.mark.parametrize(("mean", "concentration", "narrow"), [(0.13, 3, 0.05), (0.13, 5, 0.05)])
def test_a_check_that_stops_early_still_covers(
    mean: float, concentration: float, narrow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "NARROW", narrow)
    everyone, rng = traces(mean, concentration), np.random.default_rng(1)
    truth = pooled_tau(everyone)

    def covered(level: float) -> tuple[float, float]:
        """How often the last interval holds the truth, and the mean of prompts asked."""
        held, asked = [], []
        for _ in range(CHECKS):
            chosen = [everyone[at] for at in rng.integers(0, len(everyone), MOST)]
            for count in range(BATCH, MOST + 1, BATCH):
                if evidence._narrow(chosen[:count], K, level):
                    break
            low, high = intervals.tau(prompt_counts(chosen[:count]), K, level).ends
            held.append(low <= truth <= high)
            asked.append(count)
        return float(np.mean(held)), float(np.mean(asked))

    share, asked = covered(intervals.level_of(MOST // BATCH))
    assert share >= BAR
    assert BATCH < asked < MOST - 0.5, "the rule does not act"
    assert covered(intervals.level_of(1))[0] < BAR, "one look's level would pass"


@pytest.mark.parametrize(("most", "looks"), [(16, 1), (40, 3)])
def test_a_check_reports_the_interval_for_its_looks(
    most: int, looks: int, target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    stored, prompts = read_draft(str(draft_folder)), write_prompts(tmp_path / "p.jsonl", 40)
    found = gather(
        target,
        stored,
        str(prompts),
        tmp_path / "out",
        base=target,
        most=most,
        answering=RegenerateConfig(max_new_tokens=16),
    )
    level = intervals.level_of(looks)
    assert level == (0.95 if looks == 1 else 0.98)
    walked = [t for t in replay(target, stored.build(target), found.answers, K) if t.accepted]
    seen = found.evidence
    assert seen.unadapted.ci == intervals.tau(prompt_counts(walked), K, level).ends
    assert seen.on_base
    assert seen.on_base.ci == pytest.approx(seen.unadapted.ci)
    assert seen.retention
    both = intervals.ratio(prompt_counts(walked), prompt_counts(walked), K, level)
    assert seen.retention == pytest.approx((both.value, both.low, both.high))
    low, high = np.percentile(found.draws[KEEP], [2.5, 97.5])
    width = seen.unadapted.ci[1] - seen.unadapted.ci[0]
    assert (low, high) == pytest.approx(seen.unadapted.ci, abs=0.1 * width)
