"""The methods bench: cells from data that is there, only what is missing, figures by an oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft.adapters.adapter import prepare
from redraft.adapters.kind import Setup
from redraft.adapters.table import read_method
from redraft.checkpoints.load import load_draft
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.generation.answer_file import read_answers
from redraft.metrics.measure import measure_answers
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft_experiments import methods as bench
from redraft_experiments import recovery
from redraft_experiments.cells import MethodCell, read_cells, steps_of
from redraft_experiments.methods import bench_methods, matched_rank
from redraft_experiments.rows import ALL, IDEAS, REFERENCES, ROWS, TUNED_LIKE
from tests.conftest import FAMILIES, fresh_draft, make_tokenizer, save_target, write_prompts

pytestmark = pytest.mark.bench

RUN = ["unadapted", "expert-narrow", "lora-matched", "feature-map expert", "from-scratch"]


@pytest.fixture(scope="module")
def suite(
    target_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A toy suite of random models, in the shape of a built one."""
    folder = tmp_path_factory.mktemp("suite")
    shutil.copytree(target_folder, folder / "base")
    save_target(folder / "members" / "sft", FAMILIES["llama"](len(make_tokenizer())), seed=1)
    shutil.copytree(draft_folder, folder / "draft")
    (folder / "prompts").mkdir()
    for i, name in enumerate(("math-eval", "math-heldout", "dialogue-eval")):
        write_prompts(folder / "prompts" / f"{name}.jsonl", 16, 100 * (i + 1))
    about = {"size": "tiny", "seed": 0, "members": {"sft": {}}, "general_domains": ["dialogue"]}
    (folder / "suite.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def run(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run cells; returns them and how many adapters were trained for that."""
    trained: list[int] = []
    trained_together = bench.train_adapters

    def counted(*given: Any, **more: Any) -> Any:
        found = trained_together(*given, **more)
        trained.append(len(found))
        return found

    monkeypatch.setattr(bench, "train_adapters", counted)
    pool = tmp_path / "prompts" / "tiny" / "math.jsonl"
    pool.parent.mkdir(parents=True)
    write_prompts(pool, 40)

    def go(rows: list[str] = RUN, **more: Any) -> tuple[list[MethodCell], int]:
        trained.clear()
        asked = {"members": ["sft"], "answers": ["regenerated"], "seeds": [1], **more}
        cells = bench_methods(suite, tmp_path, rows=rows, **asked)
        return cells, sum(trained)

    return go


def test_cells_are_run_once_and_say_what_they_are(
    run: Callable[..., Any], suite: Path, tmp_path: Path
) -> None:
    cells, trained = run()
    assert [cell.row for cell in cells] == RUN
    tuned = len(bench.RATES) * 3  # expert-narrow, lora-matched, and scratch for from-scratch
    assert trained == tuned + 4
    again, trained = run()
    assert (again, trained) == (cells, 0)
    assert sorted(read_cells(tmp_path), key=lambda c: RUN.index(c.row)) == cells
    (tmp_path / "cells/tiny/sft/lora-matched.regenerated.s1.json").unlink()
    again, trained = run()
    assert trained == 1
    assert again[2].steps == cells[2].steps

    reuse, expert, lora, feature_map, from_scratch = cells
    target = load_target(str(suite / "members" / "sft"))
    answers = read_answers(tmp_path / "answers/tiny/sft/eval.jsonl")
    draft = load_draft(str(suite / "draft"), target)
    measured = measure_answers(target, draft, answers, k=bench.K).acceptance
    assert reuse.tau == pytest.approx(measured.tau)
    assert sum(a for a, _ in reuse.steps) == measured.accepted
    assert (reuse.trained_parameters, reuse.unique_tokens, reuse.flops) == (0, 0, 0.0)
    assert feature_map.optimizer_steps == 0 < expert.optimizer_steps
    assert from_scratch.trained_parameters == draft.parameter_count()
    # The adapt part is paid for alone, the from-scratch draft pays for the whole pool.
    assert expert.unique_tokens == lora.unique_tokens < from_scratch.unique_tokens
    assert 0 < expert.flops < from_scratch.flops
    assert expert.stored_mb == pytest.approx(expert.trained_parameters * 4 / 1e6)


def test_original_answers_cost_no_generation_but_the_held_out(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    pool = tmp_path / "prompts" / "tiny" / "math.jsonl"
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "seven and one"})
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    regenerated, original = (
        run(["expert-narrow"], answers=[kind])[0][0] for kind in ("regenerated", "original")
    )
    held = sum(a.length for a in read_answers(tmp_path / "answers/tiny/sft/heldout.jsonl"))
    assert original.unique_tokens == held < regenerated.unique_tokens


def test_unknown_rows_and_members_are_named(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="unknown row 'expert-wid'; did you mean 'expert-wide'"):
        run(["expert-wid"])
    with pytest.raises(UserError, match="has no fine-tune 'sft-code'"):
        run(["unadapted"], members=["sft-code"])


def test_every_row_is_a_method_that_can_be_configured() -> None:
    for name, row in ALL.items():
        settings = {k: v for k, v in row.settings.items() if k != "method"}
        TrainConfig(**settings)
        if row.settings:
            read_method(row.settings["method"])
        assert name in ROWS or name in IDEAS
    assert {*TUNED_LIKE, *TUNED_LIKE.values()} <= set(ALL)
    assert {name for pair in REFERENCES.values() for name in pair} <= set(ROWS)


def test_the_matched_rank_comes_closest(target: Target) -> None:
    sizes = {}
    for rank in range(1, 9):
        draft = fresh_draft(target)
        owned = prepare(
            draft, read_method("lora"), Setup(width=1, rank=rank, init="active", seed=0)
        )
        sizes[rank] = sum(p.numel() for _, p in owned)
    wanted = 3 * 12 * 32
    closest = min(sizes, key=lambda rank: abs(sizes[rank] - wanted))
    assert matched_rank(fresh_draft(target), 12) == closest


# -- recovery over seeds and prompts ---------------------------------------------------------------


def drawn(seed: int, seeds: int, prompts: int, level: float) -> list[list[tuple[int, int]]]:
    rng = np.random.default_rng(seed)
    steps = rng.integers(5, 20, prompts)
    hard = rng.normal(0, 0.15, prompts)  # what makes a prompt hard does so for every draft
    shares = np.clip(level + hard + rng.normal(0, 0.02, (seeds, 1)), 0, 1)
    return [[(int(4 * n * s), int(n)) for n, s in zip(steps, row, strict=True)] for row in shares]


def pooled(steps: list[list[tuple[int, int]]]) -> float:
    taus = [1 + sum(a for a, _ in s) / sum(n for _, n in s) for s in steps]
    return sum(taus) / len(taus)


def test_recovery_and_its_interval_by_loops() -> None:
    """The value exactly; the interval against resampling written out, draw by draw, of many seeds."""
    a, r, d = drawn(1, 12, 40, 0.5), drawn(1, 12, 40, 0.2), drawn(1, 12, 40, 0.7)
    found = recovery.recovery(a, r, d)
    assert found is not None
    assert found.value == pytest.approx((pooled(a) - pooled(r)) / (pooled(d) - pooled(r)))
    rng = np.random.default_rng(7)

    def resampled(paired: bool) -> tuple[float, float]:
        ratios = []
        for _ in range(1500):
            chosen = rng.integers(0, 40, 40)
            taus = []
            for some in (a, r, d):
                if not paired:
                    chosen = rng.integers(0, 40, 40)
                picked = [some[i] for i in rng.integers(0, 12, 12)]
                taus.append(pooled([[s[i] for i in chosen] for s in picked]))
            ratios.append((taus[0] - taus[1]) / (taus[2] - taus[1]))
        return float(np.percentile(ratios, 2.5)), float(np.percentile(ratios, 97.5))

    low, high = resampled(paired=True)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.15 * width)
    assert found.high == pytest.approx(high, abs=0.15 * width)
    wrong = resampled(paired=False)
    assert wrong[1] - wrong[0] > 1.3 * width, "pairing would not be seen"


def test_recovery_is_not_given_where_there_is_no_gap() -> None:
    r, d = drawn(1, 3, 40, 0.5), drawn(1, 3, 40, 0.52)
    assert recovery.recovery(r, r, d) is None
    assert recovery.difference(d, r).value == pytest.approx(pooled(d) - pooled(r))


def test_steps_come_in_the_order_of_seeds() -> None:
    cells = [
        MethodCell("tiny", "sft", "x", "regenerated", seed, 1, 1, 1, ((seed, 1),), 1, {})
        for seed in (3, 1, 2)
    ]
    assert steps_of(cells) == [((1, 1),), ((2, 1),), ((3, 1),)]
