"""`redraft bench plan`: what `redraft plan` says of runs that are there, next to what they measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import typer

from redraft.check.devices import this_machine
from redraft.check.plan import Sizes, plan, target_of_shapes
from redraft.checkpoints.load import read_draft
from redraft.config import TrainConfig
from redraft.core.folders import read_json
from redraft.core.report_record import AdaptReport
from redraft.generation.answer_file import read_answers


@dataclass(frozen=True)
class PlanCell:
    """Predicted and measured: peak MB (of the process, by `plan` and as training began), operations of the target and the
    draft, and seconds of training and of answers on this machine, at the load that it has now."""

    run: str
    target: str
    kind: str
    method: str
    train_tokens: int
    peak_planned: float
    peak_at_start: float
    peak: float
    target_flops_planned: float
    target_flops: float
    draft_flops_planned: float
    draft_flops: float
    train_seconds_planned: float
    train_seconds: float
    answer_seconds_planned: float
    answer_seconds: float


def bench_plan(runs: Sequence[Path]) -> list[PlanCell]:
    """A cell for each run of `redraft adapt`."""
    return [_cell(run) for run in runs]


def _cell(run: Path) -> PlanCell:
    report = AdaptReport.from_json(read_json(run / "report.json"))
    answers = read_answers(run / "answers" / "adapt.jsonl")
    source = report.target.partition("+")[0]
    target = target_of_shapes(source)
    known = {each.name for each in fields(TrainConfig)}
    config = TrainConfig(**{k: v for k, v in report.config["train"].items() if k in known})
    draft = read_draft(report.shared)
    built = draft.build()
    vocabulary = None if built.draft_vocab is None else len(built.draft_vocab)
    sizes = Sizes(
        prompts=len(answers),
        prompt_tokens=round(sum(len(a.prompt) for a in answers) / len(answers)),
        answer_tokens=round(sum(a.length for a in answers) / len(answers)),
        kind=draft.kind,
        draft_vocab=vocabulary,
    )
    found = plan(target, sizes, config, this_machine(target.hidden_size, target.dtype))
    train, share = report.train, report.train.steps / report.train.planned_steps
    return PlanCell(
        run=run.name,
        target=Path(source).name,
        kind=draft.kind,
        method=config.method,
        train_tokens=round(found.train_tokens * share),
        peak_planned=found.train_bytes / 1e6,
        peak_at_start=train.predicted_peak_mb,
        peak=train.peak_mb,
        target_flops_planned=found.target_flops * share,
        target_flops=train.target_flops,
        draft_flops_planned=found.draft_flops * share,
        draft_flops=train.draft_flops,
        train_seconds_planned=found.train_seconds * share,
        train_seconds=train.seconds,
        answer_seconds_planned=found.answer_seconds,
        answer_seconds=report.cost["seconds"].get("regenerate adapt", 0.0),
    )


def print_cells(cells: Sequence[PlanCell]) -> None:
    """A line for each run: planned, measured."""
    for c in cells:
        typer.echo(
            f"{c.target} {c.kind} {c.method}: peak {c.peak_planned:,.0f} MB planned, {c.peak:,.0f} measured; target "
            f"{c.target_flops_planned:.3g} operations, {c.target_flops:.3g}; draft {c.draft_flops_planned:.3g}, {c.draft_flops:.3g}; "
            f"training {c.train_seconds_planned:,.0f} s, {c.train_seconds:,.0f}; answers {c.answer_seconds_planned:,.0f} s, "
            f"{c.answer_seconds:,.0f}"
        )
