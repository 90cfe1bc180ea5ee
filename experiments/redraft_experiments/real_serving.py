"""`redraft bench real-serving`: the drafts of the race in a real vLLM: how fast, at how many requests at a time.

    RACE/MEMBER/served/ROW.sSEED.kK.json   one trial; `plain`, of K = 0, is vLLM without a draft

All trials of a fine-tune answer the same prompts greedily. Only what is missing is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from redraft.checkpoints.load import read_draft
from redraft.core.errors import UserError
from redraft.core.files import write_text
from redraft.core.records import Throughput, to_json
from redraft.models.target import Target
from redraft.prompts.prompts import read_prompts
from redraft.serving.engine import Serving, Speculation
from redraft.serving.engines import engine_named
from redraft.serving.trial import Trial, try_server
from redraft.serving.verify import method_of

from .real_members import MEMBERS
from .real_suite import CONTEXT, folders_of, load_real, merged, prompts_of

PLAIN, VLLM = "plain", "vllm"
PROMPTS, LONGEST, REPEATS = 16, 96, 2
CONCURRENCIES = (1, 4, 16)


@dataclass(frozen=True)
class ServedCell:
    """A draft in an engine. `speed` is by requests at a time; `tau` by the engine's counters, and `equal` the answers
    that equal those without a draft token for token, both at one request at a time."""

    member: str
    row: str
    seed: int
    k: int
    speed: dict[str, Throughput]
    tau: float | None = None
    equal: int | None = None
    engine: str = VLLM

    @staticmethod
    def from_json(row: dict[str, Any]) -> ServedCell:
        speed = {level: Throughput(**found) for level, found in row["speed"].items()}
        return ServedCell(**{**row, "speed": speed})


def bench_real_serving(
    suite: Path,
    race: Path,
    *,
    member: str,
    rows: Sequence[str],
    ks: Sequence[int],
    seed: int,
    python: str | None = None,
) -> list[ServedCell]:
    """Run the trials that are missing, and return all that were asked for, the plain one first.

    Raises UserError for a row whose draft the race has not made.
    """
    drafts = drafts_of(suite, race, member, rows, seed)
    bench = _Bench(suite, race / member, member, seed, python)
    cells = [bench.cell(PLAIN, None, 0)]
    return cells + [bench.cell(row, drafts[row], k) for row in rows for k in ks]


def drafts_of(
    suite: Path, race: Path, member: str, rows: Sequence[str], seed: int
) -> dict[str, Path]:
    """The folders of the race's drafts. Raises UserError for a row that the race has not made."""
    found = {}
    for row in rows:
        folder = race / member / "drafts" / f"{row}.s{seed}"
        found[row] = suite / "draft" if row == "unadapted" else folder
        if not found[row].is_dir():
            raise UserError(
                f"{folder} is not there; make it with redraft bench real-methods --members {member} --rows '{row}'"
            )
    return found


class _Bench:
    def __init__(self, suite: Path, out: Path, member: str, seed: int, python: str | None):
        self.suite, self.out, self.member = suite, out, member
        self.seed, self.python = seed, python
        self.target: Target | None = None

    def cell(self, row: str, draft: Path | None, k: int) -> ServedCell:
        path = self.out / "served" / f"{row}.s{self.seed}.k{k}.json"
        answers = path.with_suffix(".answers.json")
        if not path.is_file():
            trial = self._try(row, draft, k)
            path.parent.mkdir(parents=True, exist_ok=True)
            speed = {str(level): found for level, found in trial.speed.items()}
            cell = ServedCell(self.member, row, self.seed, k, speed)
            if draft is not None:
                plain = json.loads(
                    (path.parent / f"{PLAIN}.s{self.seed}.k0.answers.json").read_text()
                )
                pairs = zip(plain, trial.answers[1], strict=True)
                cell = ServedCell(
                    self.member,
                    row,
                    self.seed,
                    k,
                    speed,
                    trial.counted.acceptance().tau,
                    sum(list(one) == list(other) for one, other in pairs),
                )
            write_text(answers, json.dumps(trial.answers[1]) + "\n")
            write_text(path, json.dumps(to_json(cell)) + "\n")
        return ServedCell.from_json(json.loads(path.read_text(encoding="utf-8")))

    def _try(self, row: str, draft: Path | None, k: int) -> Trial:
        if self.target is None:
            self.target = load_real(self.suite, self.member)
        target, engine = self.target, engine_named(VLLM)
        file = prompts_of(self.suite, MEMBERS[self.member].domain, "eval")
        prompts = read_prompts(str(file), target, PROMPTS, "last").prompts
        speculation = None
        if draft is not None:
            speculation = Speculation(method_of(read_draft(str(draft))), str(draft), k)
        log = self.out / "served" / f"{row}.k{k}.log"
        with (
            merged(folders_of(self.suite, self.member)) as folder,
            engine.serve(
                engine.find(self.python),
                Serving(folder, "bfloat16", CONTEXT, None, speculation),
                log,
            ) as running,
        ):
            return try_server(
                running,
                prompts,
                stop_ids=target.stop_ids,
                max_new_tokens=LONGEST,
                concurrencies=CONCURRENCIES,
                repeats=REPEATS,
                label=f"{self.member} {row}, K = {k}",
            )


def read_served(folder: Path) -> list[ServedCell]:
    """All trials below the folder of a race."""
    files = (f for f in sorted(folder.glob("*/served/*.json")) if "answers" not in f.name)
    return [ServedCell.from_json(json.loads(f.read_text(encoding="utf-8"))) for f in files]


def ratio(cell: ServedCell, plain: ServedCell, level: str) -> float:
    """Speed-up against vLLM without a draft at as many requests at a time."""
    return cell.speed[level].tokens_per_second / plain.speed[level].tokens_per_second


def print_served(cells: Sequence[ServedCell], out: Console | None = None) -> None:
    """One line per draft and K."""
    out = out or Console(highlight=False)
    for engine in dict.fromkeys(cell.engine for cell in cells):
        _print_engine([cell for cell in cells if cell.engine == engine], out)


def _print_engine(cells: Sequence[ServedCell], out: Console) -> None:
    plain = next(cell for cell in cells if cell.row == PLAIN)
    title = f"{plain.member}: tokens/s in {plain.engine} [least, most], speed-up"
    table = Table(title=title)
    for heading in ("draft", "K", "tau", "equal answers", *(f"{n} at a time" for n in plain.speed)):
        table.add_column(heading, justify="left" if heading == "draft" else "right")
    for cell in cells:
        speeds = [
            f"{s.tokens_per_second:.0f} [{s.low:.0f}, {s.high:.0f}]"
            + (f" {ratio(cell, plain, level):.2f}x" if cell is not plain else "")
            for level, s in cell.speed.items()
        ]
        table.add_row(
            cell.row,
            str(cell.k or ""),
            f"{cell.tau:.2f}" if cell.tau else "",
            f"{cell.equal} of {PROMPTS}" if cell.equal is not None else "",
            *speeds,
        )
    out.print(table)
