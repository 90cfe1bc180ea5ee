"""The positions bench: cells that resume, rows that differ in their answers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from redraft.checkpoints.load import load_draft
from redraft.core.errors import UserError
from redraft.core.records import Answer, to_json
from redraft.generation.answer_file import read_answers
from redraft.metrics.measure import measure_answers
from redraft.models.loading import load_target
from redraft_experiments import positions as bench
from redraft_experiments import recovery
from redraft_experiments.corpus import Corpus
from redraft_experiments.positions import (
    PositionCell,
    Rows,
    bench_positions,
    joined,
    print_positions,
)
from redraft_experiments.synthetic import Sample
from tests.conftest import FAMILIES, make_tokenizer, save_target

pytestmark = pytest.mark.bench

ROWS = ["cut", "whole", "longest", "half at 0.7"]
WARM = "from-scratch half at 0.7"


def chat(number: int) -> Sample:
    turns = [
        ("user", f"Say {number}."),
        ("assistant", f"You want me to say {number}, so I say {number}."),
    ]
    return Sample(f"m/{number}", "math", tuple({"role": r, "content": c} for r, c in turns))


@pytest.fixture(scope="module")
def suite(
    target_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    save_target(folder / "members" / "sft", FAMILIES["llama"](len(make_tokenizer())), seed=1)
    shutil.copytree(draft_folder, folder / "draft")
    about = {"size": "tiny", "seed": 0, "members": {"sft": {}}, "tuned_domain": "math"}
    (folder / "suite.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def run(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    first = {"tune": 0, "adapt": 1000, "heldout": 2000, "eval": 3000}

    def chats(self: Corpus, domain: str, count: int, split: str) -> list[Sample]:
        return [chat(first[split] + i) for i in range(count)]

    monkeypatch.setattr(Corpus, "chats", chats)

    def go(**more: Any) -> list[PositionCell]:
        settings: dict[str, Any] = {"problems": 2, "rows": [*ROWS, WARM], "seeds": [1], **more}
        return bench_positions(suite, tmp_path, **settings)

    return go


def test_cells_are_run_once_and_say_what_they_are(
    run: Callable[..., Any], suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = run()
    assert [c.row for c in cells] == ["unadapted", "from-scratch", *ROWS, WARM]
    by_row = {c.row: c for c in cells}
    here = tmp_path / "tiny" / "sft-2"
    whole = by_row["whole"]
    for row in ROWS:
        cell = by_row[row]
        assert cell.optimizer_steps == bench.SCALES["tiny"].steps
        # The last answer may pass the budget, by less than its own length.
        assert whole.kept_tokens <= cell.kept_tokens < whole.kept_tokens + 48
    warm, from_scratch = by_row[WARM], by_row["from-scratch"]
    assert warm.kept_tokens >= from_scratch.kept_tokens > whole.kept_tokens
    assert warm.trained_parameters == from_scratch.trained_parameters > whole.trained_parameters
    assert warm.optimizer_steps == from_scratch.optimizer_steps
    assert by_row["cut"].samples > whole.samples >= by_row["longest"].samples
    assert by_row["cut"].generated_tokens == by_row["cut"].kept_tokens
    assert by_row["longest"].generated_tokens > by_row["longest"].kept_tokens
    target = load_target(str(here / "target"))
    draft = load_draft(str(suite / "draft"), target)
    for temperature in ("0", "0.7", "1"):
        answers = read_answers(here / f"answers/eval-{temperature}-0.jsonl")
        assert {a.temperature for a in answers} == {float(temperature)}
        measured = measure_answers(target, draft, answers, k=bench.K).acceptance
        steps = by_row["unadapted"].steps(temperature, 0, 1000)
        assert (sum(a for a, _ in steps), sum(n for _, n in steps)) == (
            measured.accepted,
            measured.steps,
        )
    for name in ("train_adapter", "regenerate", "fit"):
        monkeypatch.setattr(bench, name, None)  # nothing is made again
    assert run() == cells
    assert sorted(map(str, bench.read_position_cells(tmp_path))) == sorted(map(str, cells))
    monkeypatch.setattr(bench, "LEAST_STEPS", 1)
    out = Console(record=True, width=300)
    print_positions(cells, out)
    assert "half at 0.7" in out.export_text()


def test_one_problem_leaves_the_fine_tune_as_it_is(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "fit", None)
    cells = run(problems=1, rows=["whole"])
    assert len(cells) == 3
    assert not (tmp_path / "tiny" / "sft-1" / "target").exists()


def test_answers_of_a_row() -> None:
    answers = [Answer(f"a{n}", (1,), tuple(range(n + 2)), n, "stop") for n in (5, 3, 9)]
    cut = bench._ended(answers[2], 4)
    assert (cut.tokens, cut.length, cut.finish) == ((0, 1, 2, 3), 4, "length")
    assert bench._ended(answers[1], 4) is answers[1]
    assert bench._within(answers, 6) == answers[:2]
    assert bench._within(answers, 5) == answers[:1]
    two = joined([chat(1), chat(2), chat(3)], 2)
    assert [[m["content"] for m in row.messages] for row in two] == [
        ["Say 1.\nSay 2.", "\n".join(chat(i).messages[1]["content"] for i in (1, 2))]
    ]


def test_bins_end_where_steps_are_few() -> None:
    cells = [
        PositionCell("tiny", "m", 1, row, 1, 4, {"0": (digits,) * 200}, {}, {}, {})
        for row, digits in (
            ("unadapted", "0" * 60),
            ("from-scratch", "4" * 12),
            ("whole", "1" * 30),
        )
    ]
    rows = Rows.of(cells)
    assert rows.bins("0") == [(0, 32), (32, 64)]
    assert rows.taken("whole", "0", (0, 32)) == 200 * 16
    found = recovery.recovery(*rows.ends("whole", "0", (0, 32)))
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    again = PositionCell.from_json(json.loads(json.dumps(to_json(cells[0]))))
    assert again == cells[0]


def test_mistakes_name_what_is_there(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="unknown row 'hole'; did you mean 'whole'"):
        run(rows=["hole"])
    with pytest.raises(UserError, match="has no fine-tune 'other'"):
        run(member="other")


def test_a_change_of_recovery_pairs_its_prompts() -> None:
    import numpy as np

    rng = np.random.default_rng(3)
    hard = rng.normal(0, 0.15, 60)

    def drawn(level: float) -> list[list[tuple[int, int]]]:
        shares = np.clip(level + hard + rng.normal(0, 0.02, 60), 0, 1)
        return [[(int(400 * s), 100) for s in shares]]

    r, d, a, b = drawn(0.2), drawn(0.8), drawn(0.4), drawn(0.5)
    one, other = recovery.recovery(a, r, d), recovery.recovery(b, r, d)
    change = recovery.recovery_change((a, r, d), (b, r, d))
    assert one
    assert other
    assert change
    assert change.value == pytest.approx(other.value - one.value)
    same = recovery.recovery_change((a, r, d), (a, r, d))
    assert same
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # The interval by loops: one draw of prompts for all; with a draw for each it would be wider.
    widths = []
    for paired in (True, False):
        found = []
        for _ in range(1500):
            chosen = rng.integers(0, 60, 60)
            taus = []
            for some in (a, r, d, b, r, d):
                if not paired:
                    chosen = rng.integers(0, 60, 60)
                taus.append(sum(some[0][i][0] for i in chosen))
            found.append(
                (taus[3] - taus[4]) / (taus[5] - taus[4])
                - (taus[0] - taus[1]) / (taus[2] - taus[1])
            )
        low, high = np.percentile(found, [2.5, 97.5])
        widths.append(float(high - low))
    assert change.high - change.low == pytest.approx(widths[0], rel=0.15)
    assert widths[1] > 1.3 * widths[0]
    assert recovery.recovery_change((a, r, r), (b, r, d)) is None
