"""The runs that crashes and damage are tried on: one unbroken, one of other settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.models.target import Target
from tests.conftest import write_prompts
from tests.faults.crashes import PROMPTS, SETTINGS, Job, artefacts

OTHER = {"regenerate.max_new_tokens": 4, "train.width": 2}


@pytest.fixture(scope="module")
def job(target_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    assert torch.get_num_threads() == 1, "children compute in one thread; sums differ with two"
    prompts = write_prompts(tmp_path_factory.mktemp("job") / "p.jsonl", PROMPTS)
    return Job(target_folder, draft_folder, prompts)


@pytest.fixture(scope="module")
def whole(job: Job, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train = job.run(target, out).report.train
    assert train.best_step > train.steps // 3, "what is trained has to matter to what is exported"
    return out


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, Any]:
    return artefacts(whole)


@pytest.fixture(scope="module")
def other(job: Job, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with other settings, from which much has to be removed."""
    out = tmp_path_factory.mktemp("other") / "run"
    replace(job, settings={**SETTINGS, **OTHER}).run(target, out)
    return out
