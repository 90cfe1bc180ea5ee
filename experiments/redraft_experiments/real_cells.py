"""The cells of the race on real models as records: read back, gathered over seeds, printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import recovery
from .recovery import Interval

MEASURED = ("greedy", "sampled", "chat", "chat-sampled")
"""What is measured: the fine-tune's own traffic and chat, each greedily and at temperature 0.7."""
WHOLE = 1.0
EAGLE3 = "eagle3"
"""The kind of the draft that the suite comes with."""
Counts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RealCell:
    """One row on one fine-tune and seed, at K = 4 by replay with deterministic draft tokens.

    `counts` are (accepted, steps) of each prompt, by what is measured, for each share of the way from
    the unadapted draft's tensors to the trained ones ("1.0": the trained ones).
    """

    member: str
    row: str
    seed: int
    counts: Mapping[str, Mapping[str, Counts]]
    answer_tokens: int = 0
    general_tokens: int = 0
    answer_seconds: float = 0.0
    train: Mapping[str, Any] = field(default_factory=dict)
    """The record of the training (see `TrainRecord`)."""
    versions: Mapping[str, str] = field(default_factory=dict)
    draft: str = EAGLE3
    """The kind of draft."""

    @staticmethod
    def from_json(row: dict[str, Any]) -> RealCell:
        counts = {
            share: {name: tuple((int(a), int(n)) for a, n in some) for name, some in sets.items()}
            for share, sets in row["counts"].items()
        }
        return RealCell(**{**row, "counts": counts})


def named_for(folder: Path, kind: str) -> Path:
    """The folder that stands for `folder` where drafts are of another kind than the suite's."""
    return folder if kind == EAGLE3 else folder.with_name(f"{folder.name}-{kind}")


def cells_folder(member: Path, kind: str) -> Path:
    """The cells of a fine-tune, whose folder is `member`, with drafts of this kind."""
    return named_for(member / "cells", kind)


def read_real_cells(folder: Path, kind: str = EAGLE3) -> list[RealCell]:
    """All cells below a folder, in the order of their names."""
    paths = [
        path for member in folder.iterdir() for path in cells_folder(member, kind).glob("*.json")
    ]
    return [
        RealCell.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(paths)
    ]


def counts_of(cells: Sequence[RealCell], name: str, share: float = WHOLE) -> list[Counts]:
    """The (accepted, steps) of cells that differ in their seed alone."""
    ordered = sorted(cells, key=lambda cell: cell.seed)
    return [cell.counts[str(share)][name] for cell in ordered if str(share) in cell.counts]


def grouped(cells: Sequence[RealCell]) -> dict[tuple[str, str], list[RealCell]]:
    """The cells of each fine-tune and row."""
    groups: dict[tuple[str, str], list[RealCell]] = {}
    for cell in cells:
        groups.setdefault((cell.member, cell.row), []).append(cell)
    return groups


def change(
    cells: Sequence[RealCell], unadapted: Sequence[RealCell], name: str, share: float
) -> Interval:
    """tau less the unadapted draft's on the same prompts, an interval."""
    some = counts_of(cells, name, share)
    return recovery.difference(some, counts_of(unadapted, name)[:1] * len(some))  # no seed is in it


def print_real_cells(cells: Sequence[RealCell], out: Console | None = None) -> None:
    """One line per fine-tune, row and share: tau, and the change against the unadapted draft."""
    out = out or Console(highlight=False)
    groups = grouped(cells)
    table = Table(title="tau at K = 4 [95 %], change against the unadapted draft")
    for heading in ("fine-tune", "row", "seeds", "share", *MEASURED, "trained", "tokens", "s"):
        table.add_column(heading, justify="left" if heading in ("fine-tune", "row") else "right")
    for (member, row), some in groups.items():
        zero = groups.get((member, "unadapted"))
        for share in sorted({share for cell in some for share in cell.counts}, key=float)[::-1]:
            figures = []
            for name in MEASURED:
                found = recovery.tau(counts_of(some, name, float(share)))
                text = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
                if zero and row != "unadapted":
                    gain = change(some, zero, name, float(share))
                    text += f" {gain.value:+.3f} [{gain.low:+.2f}, {gain.high:+.2f}]"
                figures.append(text)
            last = some[-1]
            table.add_row(
                member,
                row,
                str(len(some)),
                share,
                *figures,
                f"{last.train.get('trained_parameters', 0):,}",
                f"{last.answer_tokens + last.general_tokens:,}",
                f"{last.train.get('seconds', 0):.0f}",
            )
    out.print(table)
