"""The nano suite with its adapted and from-scratch drafts, built once, and the engines to try them in.

Training comes first and the engine afterwards: they would fight for the same cores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from redraft.config import read_yaml, recipe_path, resolve
from redraft.pipeline import adapt as pipeline
from redraft.prompts.prompts import read_prompts
from redraft.serving.engine import Engine
from redraft.serving.environment import Environment
from redraft.serving.vllm import VLLM
from redraft_experiments.demo import LIMITS, AdaptedDraft, adapt_and_compare
from tests.engines_real.cells import Table

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "engines"
RECORD = os.environ.get("REDRAFT_RECORD") == "1"
PROMPTS = 40 if RECORD else 20
"""A record deserves more prompts than a check that the counts are still equal."""


@pytest.fixture(scope="session", autouse=True)
def all_threads() -> Iterator[None]:
    """These tests have the machine to themselves. Not on import: collecting is not running them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repaired() -> AdaptedDraft:
    """Suite, fine-tune, and the three drafts; cached in `build/engines`."""
    return adapt_and_compare(BUILD, "nano", members=("sft", "lora4"), kinds=("eagle",))


@pytest.fixture(scope="session")
def drafts(repaired: AdaptedDraft) -> dict[str, str]:
    """The folders of the three EAGLE-3 drafts of the SFT target."""
    return {
        "unadapted": repaired.result.report.shared,
        "adapted": repaired.result.report.draft,
        "from-scratch": str(repaired.from_scratch),
    }


@pytest.fixture(scope="session")
def eagle(repaired: AdaptedDraft) -> Callable[[str], str]:
    """Folders of the EAGLE-1/2 drafts of the SFT target: unadapted, adapted, from-scratch; each cached."""
    shared = str(BUILD / "suite" / "draft-eagle")
    prompts = repaired.evaluation.replace("-eval.jsonl", "-adapt.jsonl")

    def folder(name: str) -> str:
        if name == "unadapted":
            return shared
        scratch = {"train.method": "scratch"} if name == "from-scratch" else {}
        recipe = read_yaml(recipe_path("demo"))
        pipeline.adapt(
            repaired.target,
            shared,
            prompts,
            out=BUILD / f"run-eagle-{name}",
            limit=LIMITS["nano"],
            config=resolve([("recipe demo", recipe), (name, scratch)]),
            eval_prompts=repaired.evaluation,
        )
        return str(BUILD / f"run-eagle-{name}" / "draft")

    return folder


def environment_of(engine: Engine) -> Environment:
    """The engine's environment: the one that its variable names, else the one that `make engine` makes."""
    made_here = ROOT / f".venv-{engine.name.replace('.', '')}" / "bin" / "python"
    return engine.find(os.environ.get(engine.package.variable) or str(made_here))


@pytest.fixture(scope="session")
def table(repaired: AdaptedDraft) -> Iterator[Table]:
    """vLLM: every load of the session goes through it; its cells are written at the end."""
    prompts = read_prompts(repaired.evaluation, repaired.target, PROMPTS).prompts
    found = Table(VLLM, environment_of(VLLM), BUILD / "logs", prompts)
    yield found
    keep(found)


def keep(found: Table) -> None:
    """Add the cells of a table to the record."""
    path = ROOT / "docs" / "results" / "engines.json" if RECORD else BUILD / "engines.json"
    rows = (
        {
            (row["engine"].split()[0], row["name"]): row
            for row in json.loads(path.read_text())["cells"]
        }
        if path.is_file()
        else {}
    )
    rows |= {(cell.engine.split()[0], cell.name): asdict(cell) for cell in found.cells.values()}
    path.write_text(json.dumps({"cells": list(rows.values())}, indent=2) + "\n", encoding="utf-8")
