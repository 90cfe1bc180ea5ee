"""A trial: trained on one half of the answers, measured on the other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from redraft.check.trial import MORE, adapting, grown, tried
from redraft.checkpoints.load import stored
from redraft.core.records import Answer
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.replay import replay
from redraft.models.target import Target
from redraft.pipeline.stages import merge_draft, train_adapter
from tests.conftest import fresh_draft


def test_one_half_is_learned_and_the_other_measured(target: Target, answers: list[Answer]) -> None:
    """Against the same by hand; measuring on the half that was learned would be seen."""
    draft, k = stored(fresh_draft(target), target), 3
    config = dataclasses.replace(adapting("full"), lr=0.02, epochs=20.0, precision="fp32")
    trial, rise = tried(target, draft, answers, config, k, 0.95, seed=1)
    half = len(answers) // 2
    adapter = train_adapter(target, draft, answers[:half], answers[:8], config, k)
    built = merge_draft(draft, adapter, target).build(target)

    def tau(some: list[Answer]) -> float:
        return pooled_tau([trace for trace in replay(target, built, some, k) if trace.accepted])

    assert trial.tau == pytest.approx(tau(answers[half:]))
    assert trial.tau != pytest.approx(tau(answers[:half]))
    assert trial.tau > trial.unadapted, "what is trained has to matter"
    assert (trial.answers, trial.prompts) == (half, len(answers) - half)
    again = tried(target, draft, answers, config, k, 0.95, seed=2)[1]
    assert abs(np.corrcoef(rise, again)[0, 1]) < 0.1, "two trials are of different prompts"
    low, high = trial.difference
    assert np.percentile(rise, [2.5, 97.5]) == pytest.approx([low, high], abs=0.1)


def test_what_is_fitted_in_closed_form_is_left_to_the_closed_form() -> None:
    assert adapting("feature-map+weight-sync+expert").method == "expert"
    assert adapting("feature-map").method == "body"


def test_a_rise_grows_with_the_answers_and_a_fall_is_not_kept() -> None:
    now, rise = np.full(6000, 1.5), np.tile([0.1, -0.1, -0.5], 2000)
    found = grown(now, rise, 4) - now
    least, most = MORE
    assert found[::3].min() == pytest.approx(0.1 + least, abs=0.01)
    assert found[::3].max() == pytest.approx(0.1 + most, abs=0.01)
    assert found[1::3].min() == 0
    assert found[1::3].max() == pytest.approx(most - 0.1, abs=0.01), "a trial that fell says little"
    assert (found[2::3] == 0).all()
    assert grown(now, rise + 9, 4).max() == 5
