"""Which mistakes in a draft's files are tried, and when one is named.

On targets this small neighbouring layers are nearly interchangeable, so acceptance is scripted
here; planted mistakes are found by measurement in the engine tests, on a trained family.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from redraft.checkpoints.config_variants import config_variants
from redraft.checkpoints.load import read_draft, stored
from redraft.core.records import Answer, StepTrace
from redraft.drafts.base import Draft
from redraft.metrics import config_diagnosis as module
from redraft.models.target import Target
from tests.checkpoints.crafted import edit
from tests.conftest import fresh_draft

TRUE_TAPS = (3, 5, 6)


def scripted(accepted: int, steps: int = 1) -> Any:
    """A replay in which only the true reading accepts tokens, in one of `steps` steps: one more and one
    less than `accepted` in turn."""

    def replay(target: Target, draft: Draft, answers: Sequence[Answer], k: int) -> list[StepTrace]:
        right = draft.aux_layers == TRUE_TAPS and not draft.config.norm_before_residual
        taken = [accepted + (-1) ** at if right and accepted else 0 for at in range(len(answers))]
        rest = [0] * (steps - 1)
        return [StepTrace(a.id, (n, *rest), a.length) for n, a in zip(taken, answers, strict=True)]

    return replay


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]},
            r"the aux layers .* but hs\[3, 5, 6\] accepts",
        ),
        (
            {"eagle_aux_hidden_state_layer_ids": [4, 6, 7]},
            r"the aux layers .* but hs\[3, 5, 6\] accepts",
        ),
        ({"norm_before_residual": True}, "norm_before_residual should be false"),
        ({}, None),
    ],
)
@pytest.mark.parametrize("accepted", [2, 0])
def test_the_reading_that_accepts_more_is_named(
    target: Target,
    answers: list[Answer],
    tmp_path: Path,
    changes: dict[str, Any],
    named: str | None,
    accepted: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = fresh_draft(target, aux_layers=TRUE_TAPS)
    stored(draft, target).save(tmp_path / "d")
    edit(tmp_path / "d", **changes)
    monkeypatch.setattr(module, "replay", scripted(accepted))
    found = module.better_variants(target, read_draft(str(tmp_path / "d")), answers, 4)
    if named is None or accepted == 0:
        assert found == []
    else:
        assert len(found) == 1
        assert re.match(named, found[0]), found
        assert "tau 3.00 that way, 1.00 as written, 24 prompts" in found[0]


@pytest.mark.parametrize(("steps", "count", "named"), [(5, 24, 1), (7, 24, 0), (5, 7, 0)])
def test_little_is_no_evidence(
    target: Target,
    answers: list[Answer],
    steps: int,
    count: int,
    named: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gain of 0.2 is named and one of 0.14 is not; nor is anything on few prompts."""
    draft = stored(fresh_draft(target, aux_layers=TRUE_TAPS), target)
    wrong = dataclasses.replace(draft.config, norm_before_residual=True)  # type: ignore[call-arg]
    monkeypatch.setattr(module, "replay", scripted(1, steps))
    draft = dataclasses.replace(draft, config=wrong)
    assert len(module.better_variants(target, draft, answers[:count], 4)) == named


def test_readings_that_cannot_be_are_not_tried(target: Target) -> None:
    causes = {
        name: [
            m.cause for m in config_variants(stored(fresh_draft(target, **options), target), target)
        ]
        for name, options in {
            "default": {},
            "last": {"aux_layers": (1, 3, 7)},
            "eagle": {"kind": "eagle"},
            "bias": {"kind": "eagle", "fc_bias": True},
        }.items()
    }
    assert [c.startswith("the aux layers") for c in causes["default"]] == [True, True, False]
    assert not any("hs[2, 4, 8]" in cause for cause in causes["last"])  # beyond the last layer
    assert any("trained on the default layers" in cause for cause in causes["last"])
    assert causes["eagle"] == []
    assert causes["bias"] == ["fc.bias should not be there"]
