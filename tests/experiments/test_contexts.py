"""The bench of acceptance over the length of the context: against a live loop, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redraft.checkpoints.load import load_draft
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.records import to_json
from redraft.generation.answer_file import read_answers
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.live import live
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft_experiments import contexts, datasets
from redraft_experiments.contexts import ContextCell, bench_contexts, questions, read_cells

K, LONGEST = 3, 8


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "ANSWERS", RegenerateConfig(max_new_tokens=LONGEST))
    monkeypatch.setattr(contexts, "QUESTION", "And?")
    monkeypatch.setattr(contexts, "AROUND", 20)
    monkeypatch.setattr(contexts, "WINDOW", 120)


def bench(
    target: Path, draft: Path, out: Path, novels: str | None, *lengths: int
) -> list[ContextCell]:
    return bench_contexts(str(target), str(draft), "unadapted", out, novels, lengths, 3, K)


def test_each_length_is_measured_as_a_live_loop_counts(
    target_folder: Path, draft_folder: Path, novels: str, tmp_path: Path
) -> None:
    out = tmp_path / "contexts"
    first = bench(target_folder, draft_folder, out, novels, 60)
    written = (out / "answers-60.jsonl").stat().st_mtime_ns
    cells = bench(target_folder, draft_folder, out, novels, 60, 120)
    assert cells[0] == first[0]
    assert (out / "answers-60.jsonl").stat().st_mtime_ns == written
    assert read_cells(out) == cells
    assert [ContextCell.from_json(json.loads(json.dumps(to_json(c)))) for c in cells] == cells
    target = load_target(str(target_folder))
    draft = load_draft(str(draft_folder), target)
    for cell in cells:
        asked = questions(target, novels, cell.length, 3)
        traces, _ = live(target, draft, asked, K, LONGEST)
        tau, low, high = cell.tau
        assert tau == pytest.approx(pooled_tau(traces))
        assert low <= tau <= high
        assert (cell.prompts, cell.draft) == (3, "unadapted")
        assert cell.tokens == sum(len(p.tokens) for p in asked) / 3
        answers = read_answers(out / f"answers-{cell.length}.jsonl")
        assert cell.answer_tokens == sum(answer.length for answer in answers)
    contexts.print_cells(cells)


def test_texts_of_all_lengths_end_alike(target: Target, novels: str) -> None:
    short, long = (questions(target, novels, length, 3) for length in (60, 120))
    for one, other in zip(short, long, strict=True):
        assert len(one.tokens) < len(other.tokens) <= 130
        assert one.tokens[-30:] == other.tokens[-30:]
    assert len({prompt.tokens for prompt in short}) == 3


def test_mistakes_are_named(
    target_folder: Path,
    draft_folder: Path,
    novels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "contexts"
    with pytest.raises(UserError, match=r"--lengths 60,121: expected more than 20 .* at most 120"):
        bench(target_folder, draft_folder, out, novels, 60, 121)
    with pytest.raises(UserError, match=r"--lengths 20,60: expected more than 20 tokens"):
        bench(target_folder, draft_folder, out, novels, 20, 60)
    monkeypatch.setattr(contexts, "WINDOW", 300)
    with pytest.raises(UserError, match="at most 245 for"):
        bench(target_folder, draft_folder, out, novels, 60, 246)
    monkeypatch.setattr(datasets, "texts", lambda *_: ["only a few words"])
    with pytest.raises(UserError, match="too short for 3 times 300 tokens"):
        bench(target_folder, draft_folder, out, novels, 60)
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(UserError, match="name a folder of real data"):
        bench(target_folder, draft_folder, out, None, 60)
