"""The nano family with its adapted and dedicated drafts, built once, and a vLLM to try them in.

Training comes first and the engine afterwards: they would fight for the same cores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from redraft import flow
from redraft.bench.demo import Repaired, repair
from redraft.config import read_yaml, recipe_path, resolve
from redraft.data.prompts import read_prompts
from redraft.engines.environment import VARIABLE, find_environment
from tests.engines_real.cells import Table

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "engines"
PROMPTS = 40


@pytest.fixture(scope="session")
def repaired() -> Repaired:
    """Family, fine-tune, and the three drafts; cached in `build/engines`."""
    return repair(BUILD, "nano", members=("sft", "lora4"), kinds=("eagle",))


@pytest.fixture(scope="session")
def drafts(repaired: Repaired) -> dict[str, str]:
    """The folders of the three EAGLE-3 drafts of the SFT target."""
    return {
        "reused": repaired.result.report.shared,
        "adapted": repaired.result.report.draft,
        "dedicated": str(repaired.dedicated),
    }


@pytest.fixture(scope="session")
def eagle_adapted(repaired: Repaired) -> str:
    """The base's EAGLE-1/2 draft adapted to the SFT target; cached in `build/engines`."""
    recipe = recipe_path("demo")
    adapt = Path(repaired.evaluation.replace("-eval.jsonl", "-adapt.jsonl"))
    flow.adapt(
        repaired.target,
        str(BUILD / "family" / "draft-eagle"),
        str(adapt),
        out=BUILD / "run-eagle",
        config=resolve([("recipe demo", read_yaml(recipe))]),
        eval_prompts=repaired.evaluation,
    )
    return str(BUILD / "run-eagle" / "draft")


@pytest.fixture(scope="session")
def table(repaired: Repaired) -> Iterator[Table]:
    """Every engine load of the session goes through it; its cells are written at the end."""
    python = os.environ.get(VARIABLE) or str(ROOT / ".venv-vllm" / "bin" / "python")
    prompts = read_prompts(repaired.evaluation, repaired.target, PROMPTS).prompts
    found = Table(find_environment(python), BUILD / "logs", prompts)
    yield found
    record = os.environ.get("REDRAFT_RECORD") == "1"
    path = ROOT / "docs" / "results" / "engines.json" if record else BUILD / "engines.json"
    rows = (
        {row["name"]: row for row in json.loads(path.read_text())["cells"]}
        if path.is_file()
        else {}
    )
    rows |= {cell.name: asdict(cell) for cell in found.cells.values()}
    path.write_text(json.dumps({"cells": list(rows.values())}, indent=2) + "\n", encoding="utf-8")
