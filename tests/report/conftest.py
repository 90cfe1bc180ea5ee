"""A report made of known steps, so that every figure on the page can be counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest

from redraft.config import resolve
from redraft.core.records import Acceptance, Answer, StepTrace, TrainRecord
from redraft.core.report_record import AdaptReport
from redraft.metrics.acceptance import summarise
from redraft.pipeline.summary import measured_changes
from redraft.report.answers import choose_answers
from tests.conftest import make_tokenizer

K = 3
TEXTS = ("a <b>bold</b> claim\n", "naïve & plain", "seven times eight", "0123456789abcdef") * 4


def steps_of(*patterns: Sequence[int]) -> list[list[int]]:
    """The accepted tokens of each step of each answer, by a repeated pattern."""
    found = []
    for text, pattern in zip(TEXTS, cycle(patterns), strict=False):
        steps: list[int] = []
        while 1 + sum(steps) + len(steps) < len(text.encode()):
            steps.append(pattern[len(steps) % len(pattern)])
        found.append(steps)
    return found


BEFORE = steps_of((0, 0, 1), (0,), (1, 0), (0,))
AFTER = steps_of((3, 0, 2, 1), (1, 0), (2,), (3,))


def answers() -> list[Answer]:
    """The texts as answers of one token per byte."""
    ids = [make_tokenizer().encode(text, add_special_tokens=False) for text in TEXTS]
    return [Answer(f"p{i}", (1,), (*row, *[2] * K), len(row), "stop") for i, row in enumerate(ids)]


def measured(steps: Sequence[Sequence[int]]) -> Acceptance:
    rows = zip(answers(), steps, strict=True)
    traces = [StepTrace(answer.id, tuple(row), answer.length) for answer, row in rows]
    return summarise(traces, answers(), k=K, mode="replay", seconds=1.0)


def changed(report: AdaptReport, **steps: tuple[list[list[int]], list[list[int]]]) -> AdaptReport:
    """With sets measured off domain, (before, after) each."""
    found: dict[str, Any] = {
        f"{name}-{when}": each
        for name, pair in steps.items()
        for when, each in zip(("before", "after"), pair, strict=True)
    }
    return replace(
        report,
        off_domain={name: measured(each) for name, each in found.items()},
        changes={
            **report.changes,
            **measured_changes({f"off-{n}": each for n, each in found.items()}, K),
        },
    )


@pytest.fixture
def report() -> AdaptReport:
    resolved = resolve([])
    steps = {"eval-before": BEFORE, "eval-after": AFTER}
    return AdaptReport(
        target="my-model",
        shared="draft0",
        adapter="run/adapter",
        draft="run/draft",
        prompts={"source": "p.jsonl", "kept": 9, "left_out": 0, "answered": 5, "trained_on": 4},
        before=measured(BEFORE),
        after=measured(AFTER),
        off_domain={},
        train=TrainRecord(
            *("expert", 1234, 98765, 20, 20, 4567, 321, 0.5, ((0, 1.1), (20, 1.9)), 20),
            *(12.0, 100.0, "fp32", 300.0, 250.0, False),
        ),
        cost={
            "unique_generated_tokens": 7654,
            "supervised_tokens": 4567,
            "seconds": {"regenerate adapt": 2.25, "regenerate eval": 1.5, "train": 12.0},
        },
        config={"measure": {"k": K}},
        origins={"measure.k": resolved.origins["measure.k"]},
        versions={"redraft": "0.1.0"},
        changes=measured_changes(steps, K),
        shown=choose_answers(answers(), BEFORE, AFTER, make_tokenizer().decode),
    )
