"""A base with its draft, its fine-tunes, and known cases made up for the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from redraft.check.prediction import Case, tau_of, z_of
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import write_prompts

KINDS = ("sft", "lora", "merge", "int8", "dpo")


def made_up_cases(count: int = 25, noise: float = 0.1, seed: int = 0) -> list[Case]:
    """Outcomes that follow from the signs by a line, and noise, part of it common to a kind."""
    rng = np.random.default_rng(seed)
    common = {kind: rng.normal(0, noise / 2, 2) for kind in KINDS}
    cases = []
    for at in range(count):
        kind = KINDS[at % len(KINDS)]
        signs = {
            "reused": float(rng.uniform(1.1, 3)),
            "native": float(rng.uniform(2, 3.5)),
            "words": float(rng.uniform(1.1, 3)),
            "refreshed": float(rng.uniform(1.1, 3)),
            "entropy": float(rng.uniform(0.2, 2)),
        }
        z = 0.5 * z_of(signs["reused"], 4) + 0.3 * z_of(signs["refreshed"], 4) + 0.4
        ends = z + np.array([0.0, 0.5]) + common[kind] + rng.normal(0, noise, 2)
        adapt, retrain = (float(t) for t in tau_of(ends, 4))
        taus = {"keep": signs["reused"], "refresh": signs["reused"], "adapt": adapt}
        taus["retrain"] = retrain
        cases.append(Case(f"m{at}", "made up", kind, 4, signs, taus, {}, {}, 16, 100.0, 1.5))
    return cases


@pytest.fixture
def cases() -> list[Case]:
    return made_up_cases()


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
