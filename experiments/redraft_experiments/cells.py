"""The cells of the methods bench as records: read back, gathered over seeds, printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import recovery
from .rows import REFERENCES, REGENERATED


@dataclass(frozen=True)
class MethodCell:
    """One row on one target, answers and seed. Tau is at K = 4 by replay, with deterministic draft
    tokens; `off` is greedy, on other traffic of the same target. FLOPs are counted, seconds are
    those of answering and training. `steps` are (accepted, steps) of each greedy prompt."""

    size: str
    member: str
    row: str
    answers: str
    seed: int
    tau: float
    tau_sampled: float
    tau_off: float
    steps: tuple[tuple[int, int], ...]
    draft_parameters: int
    versions: dict[str, str]
    trained_parameters: int = 0
    stored_mb: float = 0.0
    rate: float = 0.0
    unique_tokens: int = 0
    generation_flops: float = 0.0
    scoring_flops: float = 0.0
    target_flops: float = 0.0
    draft_flops: float = 0.0
    generation_seconds: float = 0.0
    training_seconds: float = 0.0
    trained_together: int = 0
    trained_together_peak_mb: float = 0.0
    optimizer_steps: int = 0
    best_step: int = 0
    heldout_tau: tuple[float, ...] = ()

    @property
    def flops(self) -> float:
        return self.generation_flops + self.scoring_flops + self.target_flops + self.draft_flops

    @staticmethod
    def from_json(row: dict[str, Any]) -> MethodCell:
        steps = tuple((int(a), int(n)) for a, n in row["steps"])
        return MethodCell(**{**row, "steps": steps, "heldout_tau": tuple(row["heldout_tau"])})


def read_cells(folder: Path) -> list[MethodCell]:
    """All cells below a folder, in the order of their names."""
    return [
        MethodCell.from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.rglob("*.json"))
        if path.parents[2].name == "cells"
    ]


def steps_of(cells: Sequence[MethodCell]) -> list[tuple[tuple[int, int], ...]]:
    """The (accepted, steps) of cells that differ in their seed alone."""
    return [cell.steps for cell in sorted(cells, key=lambda cell: cell.seed)]


def references(row: str) -> tuple[str, str]:
    """The rows that are 0 and 1 of a row's recovery."""
    return REFERENCES["eagle" if row.startswith("eagle") else "eagle3"]


def print_cells(cells: Sequence[MethodCell], out: Console | None = None) -> None:
    """One line per target, row and answers: figures over the seeds that are there."""
    out = out or Console(highlight=False)
    table = Table(title="tau at K = 4, greedy [95 %], over seeds and prompts")
    for heading in ("target", "row", "answers", "tau", "recovery", "off", "trained", "tokens", "s"):
        table.add_column(heading, justify="left" if heading in ("target", "row") else "right")
    groups: dict[tuple[str, str, str], list[MethodCell]] = {}
    for cell in cells:
        groups.setdefault((cell.member, cell.row, cell.answers), []).append(cell)
    for (member, row, answers), some in groups.items():
        zero, one = references(row)
        found = recovery.tau(steps_of(some))
        ends = [groups.get((member, name, REGENERATED)) for name in (zero, one)]
        share = (
            ends[0]
            and ends[1]
            and recovery.recovery(steps_of(some), steps_of(ends[0]), steps_of(ends[1]))
        )
        last = some[-1]
        table.add_row(
            member,
            row,
            answers,
            f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]",
            f"{share.value:.2f} [{share.low:.2f}, {share.high:.2f}]" if share else "",
            f"{sum(c.tau_off for c in some) / len(some):.2f}",
            f"{last.trained_parameters:,}",
            f"{last.unique_tokens:,}",
            f"{last.generation_seconds + last.training_seconds:.0f}",
        )
    out.print(table)
