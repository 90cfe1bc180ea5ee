"""A base with its draft, its fine-tunes, and calibration runs made up for the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from redraft.check.calibration_runs import CalibrationRun
from redraft.check.prediction import tau_of, z_of
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import write_prompts

KINDS = ("sft", "lora", "merge", "int8", "dpo")


def made_up_runs(count: int = 25, noise: float = 0.1, seed: int = 0) -> list[CalibrationRun]:
    """Outcomes that follow from the predictors by a line, and noise, part of it common to a kind."""
    rng = np.random.default_rng(seed)
    common = {kind: rng.normal(0, noise / 2, 2) for kind in KINDS}
    runs = []
    for at in range(count):
        kind = KINDS[at % len(KINDS)]
        predictors = {
            "unadapted": float(rng.uniform(1.1, 3)),
            "on_base": float(rng.uniform(2, 3.5)),
            "base_states": float(rng.uniform(1.1, 3)),
            "closed_form": float(rng.uniform(1.1, 3)),
            "entropy": float(rng.uniform(0.2, 2)),
        }
        z = 0.5 * z_of(predictors["unadapted"], 4) + 0.3 * z_of(predictors["closed_form"], 4) + 0.4
        ends = z + np.array([0.0, 0.5]) + common[kind] + rng.normal(0, noise, 2)
        adapt, scratch = (float(t) for t in tau_of(ends, 4))
        taus = {
            "keep": predictors["unadapted"],
            "closed-form": predictors["unadapted"],
            "adapt": adapt,
        }
        taus["from-scratch"] = scratch
        runs.append(
            CalibrationRun(
                predictors=predictors,
                k=4,
                name=f"m{at}",
                family="made up",
                kind=kind,
                taus=taus,
                intervals={},
                quantiles={},
                asked=16,
                step=1.5,
            )
        )
    return runs


@pytest.fixture
def runs() -> list[CalibrationRun]:
    return made_up_runs()


@pytest.fixture(scope="session")
def tuned(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Target]:
    """The target of all tests with every weight moved by a share of its size: a fine-tune of it."""

    def make(share: float) -> Target:
        child = load_target(str(target_folder))
        torch.manual_seed(5)
        with torch.no_grad():
            for weight in child.model.parameters():
                weight.add_(share * weight.std().nan_to_num(0.0) * torch.randn_like(weight))
        folder = tmp_path_factory.mktemp("tuned")
        child.model.save_pretrained(folder)
        child.tokenizer.save_pretrained(folder)
        return load_target(str(folder))

    return make


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 40)
