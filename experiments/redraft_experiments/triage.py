"""`redraft bench triage`: what `redraft check` measures of each fine-tune of a suite, and the outcome.

One JSON cell per member, a `CalibrationRun`: the predictors from a few requests, and tau as kept, in closed form,
adapted and from scratch, all on the same prompts, which nothing else saw. `--record` writes all of them to one file, which
`redraft check` predicts from (`check/calibration.json`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from redraft.check.calibration_runs import (
    ACTIONS,
    ADAPT,
    CLOSED_FORM,
    KEEP,
    SCRATCH,
    CalibrationRun,
    as_text,
    renamed,
)
from redraft.check.cost_estimate import PLANS, TRAINING
from redraft.check.evidence import CLOSED_FORM_METHOD, gather
from redraft.checkpoints.load import StoredDraft, read_draft
from redraft.config import RegenerateConfig
from redraft.core.console import say
from redraft.core.errors import UserError, nearest
from redraft.core.files import write_text
from redraft.core.folders import read_json
from redraft.core.records import Answer, Prompt, StepTrace
from redraft.generation.regenerate import regenerate
from redraft.metrics import intervals
from redraft.metrics.acceptance import pooled_tau, prompt_counts
from redraft.metrics.cost import measure_cost
from redraft.metrics.replay import replay
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.stages import merge_draft, train_adapter
from redraft.training.train import train

from .suite import load_member, suite_prompts

K = 4
CHECKED = 64
"""Prompts that a check asks at most."""
EVALUATED = 128
HELDOUT = 32
LONGEST = 128
"""Tokens of an answer; most of a family's are shorter."""
QUANTILES = np.linspace(0.025, 0.975, 20)
"""Of what a check's prompts leave open, kept with a run."""
DIGITS = 4
"""Decimals of a recorded run."""


def bench_triage(
    suites: Sequence[Path],
    out: Path,
    members: Sequence[str] | None = None,
    record: Path | None = None,
    temperature: float = 0.0,
) -> list[CalibrationRun]:
    """The cells of all members (or those named) of some suites, run where they are missing.

    Everything is answered at `temperature`, what is trained on too; one folder holds cells of several.
    `record` is a JSON file that the runs are written to. Raises UserError for unknown members.
    """
    for suite in suites:
        manifest = read_json(suite / "suite.json")
        for name in members or manifest["members"]:
            if name not in manifest["members"]:
                raise UserError(
                    f"{suite} has no member '{name}'; {nearest(name, manifest['members'])}"
                )
            _cell(suite, manifest, name, out, temperature)
    return gathered(out, record)


def gathered(out: Path, record: Path | None) -> list[CalibrationRun]:
    """All cells of a folder, written to the JSON file `record` too."""
    runs = read_cells(out)
    if record:
        write_text(record, as_text(runs))
    return runs


def read_cells(out: Path) -> list[CalibrationRun]:
    """All cells of a folder."""
    files = sorted((out / "cells").glob("*/*.json"))
    return [CalibrationRun(**renamed(read_json(file))) for file in files]


@dataclass(frozen=True)
class Subject:
    """A fine-tune to be measured: its models, the file that a check reads, and what gives up to so
    many prompts of a split: "heldout", "eval" or "adapt"."""

    name: str
    family: str
    kind: str
    target: Target
    base: Target
    stored: StoredDraft
    asked: str
    prompts: Callable[[str, int], Sequence[Prompt]]


def _cell(suite: Path, manifest: dict[str, Any], name: str, out: Path, temperature: float) -> None:
    def member() -> Subject:
        about = manifest["members"][name]
        domain = about["domain"]
        target = load_member(suite, name)
        return Subject(
            name=name,
            family=manifest["size"],
            kind=about["kind"],
            target=target,
            base=load_target(str(suite / "base")),
            stored=read_draft(str(suite / "draft")),
            asked=str(suite / "prompts" / f"{domain}-heldout.jsonl"),
            prompts=lambda split, count: suite_prompts(suite, target, (domain,), split, count),
        )

    answering = RegenerateConfig(temperature=temperature, max_new_tokens=LONGEST)
    run_cell(out, manifest["size"], name, member, answering)


def run_cell(
    out: Path,
    family: str,
    name: str,
    subject: Callable[[], Subject],
    answering: RegenerateConfig,
) -> None:
    """The cell of one fine-tune in the folder `out`, run where it is missing."""
    group = group_of(family, answering)
    file = out / "cells" / group / f"{name}.json"
    if file.is_file():
        say(f"{group}: {name} is there already ({file})")
        return
    say(f"{group}: {name}")
    run = _Bench(subject(), out / "answers" / group / name, answering).run()
    write_text(file, json.dumps(rounded(dataclasses.asdict(run)), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same JSON value with all floats at DIGITS decimals."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def group_of(family: str, answering: RegenerateConfig) -> str:
    """The folder of a family's cells at a temperature."""
    return family + (f"-{answering.temperature:g}" if answering.temperature else "")


@dataclass(frozen=True)
class _Bench:
    """One fine-tune, and what is measured of it in the folder `work`."""

    subject: Subject
    work: Path
    answering: RegenerateConfig

    def run(self) -> CalibrationRun:
        """What a check sees. Its prompts are not those that outcomes are measured on."""
        s = self.subject
        seen = gather(
            s.target,
            s.stored,
            s.asked,
            self.work / "check",
            base=s.base,
            k=K,
            most=CHECKED,
            answering=self.answering,
        )
        outcome = self.outcome(seen.answers, CLOSED_FORM in seen.draws)
        prompt = max((answer.prompt for answer in seen.answers), key=len)
        cost = measure_cost(s.target, s.stored.build(s.target), prompt, most=K)
        return CalibrationRun(
            name=s.name,
            family=s.family,
            kind=s.kind,
            k=K,
            temperature=self.answering.temperature,
            parameters=s.target.parameter_count,
            predictors=seen.evidence.predictors(),
            quantiles={name: np.quantile(d, QUANTILES).tolist() for name, d in seen.draws.items()},
            asked=seen.evidence.prompts,
            step=K * cost.c + cost.v(K),
            **outcome,
        )

    def outcome(self, few: list[Answer], closed_form: bool) -> dict[str, Any]:
        """Tau by action on prompts that nothing else saw; the slow part, kept in a file of its own."""
        file = self.work / "outcome.json"
        if file.is_file():
            return dict(renamed(read_json(file)))
        target, stored = self.subject.target, self.subject.stored
        evaluated = self._answers("eval", EVALUATED)
        stopped_by = self._answers("heldout", HELDOUT)
        pool = self._answers("adapt", PLANS[SCRATCH].prompts)
        steps: dict[str, list[StepTrace]] = {
            KEEP: replay(target, stored.build(target), evaluated, K),
            **({CLOSED_FORM: self._closed_form(few, evaluated)} if closed_form else {}),
            **{
                action: self._trained(action, method, pool, stopped_by, evaluated)
                for action, method in ((ADAPT, TRAINING.method), (SCRATCH, "scratch"))
            },
        }
        used = {action: [t for t in traces if t.accepted] for action, traces in steps.items()}
        found = {
            "taus": {action: pooled_tau(traces) for action, traces in used.items()},
            "intervals": {
                a: intervals.tau(prompt_counts(traces), K).ends for a, traces in used.items()
            },
        }
        write_text(file, json.dumps(found, indent=1) + "\n")
        return found

    def _closed_form(self, answers: list[Answer], evaluated: list[Answer]) -> list[StepTrace]:
        target, base = self.subject.target, self.subject.base
        fitted = self.subject.stored.fitted(target)
        config = dataclasses.replace(TRAINING, method=CLOSED_FORM_METHOD, epochs=0.0)
        part = train_adapter(target, fitted, answers, answers[-4:], config, K, base=base)
        merged: StoredDraft = merge_draft(fitted, part, target)
        return replay(target, merged.build(target), evaluated, K)

    def _trained(
        self,
        action: str,
        method: str,
        pool: list[Answer],
        stopped_by: list[Answer],
        evaluated: list[Answer],
    ) -> list[StepTrace]:
        plan = PLANS[action]
        target = self.subject.target
        config = dataclasses.replace(TRAINING, method=method, epochs=plan.epochs)
        draft = self.subject.stored.build(target, torch.float32)
        train(target, draft, pool[: plan.prompts], stopped_by, config, k=K)
        return replay(target, draft, evaluated, K)

    def _answers(self, split: str, count: int) -> list[Answer]:
        """The target's answers to a split, kept in the work folder; in the prompts' order, as files have the
        short ones first."""
        prompts = self.subject.prompts(split, count)
        file = self.work / f"{split}.jsonl"
        found = regenerate(self.subject.target, prompts, file, self.answering, lookahead=K)
        order = {prompt.id: at for at, prompt in enumerate(prompts)}
        found.sort(key=lambda answer: order[answer.id])
        return [answer for answer in found if answer.length >= 2]


def print_runs(runs: Sequence[CalibrationRun], out: Console | None = None) -> None:
    """A line per run: predictors, and tau by action."""
    out = out or Console(highlight=False)
    out.print("predictors from a few prompts, and tau by action on others")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("run", "kind", "T", "on base", "base states", "entropy", *ACTIONS):
        table.add_column(heading, overflow="fold", no_wrap=heading != "run")
    for run in runs:
        shown = (run.predictors.get(name) for name in ("on_base", "base_states", "entropy"))
        taus = (run.taus.get(action) for action in ACTIONS)
        figures = ("-" if value is None else f"{value:.2f}" for value in (*shown, *taus))
        table.add_row(f"{run.family}/{run.name}", run.kind, f"{run.temperature:g}", *figures)
    out.print(table)
