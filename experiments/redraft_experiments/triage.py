"""`redraft bench triage`: what `redraft check` sees of each fine-tune of a family, and what then came out.

One JSON cell per member, a `Case`: the signs from a few requests, and tau as kept, refreshed, adapted and
trained anew, all on the same prompts, which nothing else saw. Gathered they are the table that the
outlook rests on (`check/calibration.json`).
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

from redraft.check.cost_estimate import PLANS, TRAINING
from redraft.check.evidence import REFRESHING, gather
from redraft.check.prediction import ACTIONS, ADAPT, KEEP, REFRESH, RETRAIN, Case, as_json
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
QUANTILES = np.linspace(0.0125, 0.9875, 40)
"""Of what a check's prompts leave open, kept with a case."""


def bench_triage(
    families: Sequence[Path],
    out: Path,
    members: Sequence[str] | None = None,
    record: Path | None = None,
    temperature: float = 0.0,
) -> list[Case]:
    """The cells of all members (or those named) of some families, run where they are missing.

    Everything is answered at `temperature`, what is trained on too; one folder holds cells of several.
    `record` is a JSON file that the cases are written to. Raises UserError for unknown members.
    """
    for family in families:
        manifest = read_json(family / "suite.json")
        for name in members or manifest["members"]:
            if name not in manifest["members"]:
                raise UserError(
                    f"{family} has no member '{name}'; {nearest(name, manifest['members'])}"
                )
            _cell(family, manifest, name, out, temperature)
    return gathered(out, record)


def gathered(out: Path, record: Path | None) -> list[Case]:
    """All cells of a folder, written to the JSON file `record` too."""
    cases = read_cells(out)
    if record:
        write_text(record, json.dumps(as_json(cases), indent=1) + "\n")
    return cases


def read_cells(out: Path) -> list[Case]:
    """All cells of a folder."""
    return [Case(**read_json(path)) for path in sorted((out / "cells").glob("*/*.json"))]


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


def _cell(family: Path, manifest: dict[str, Any], name: str, out: Path, temperature: float) -> None:
    def member() -> Subject:
        about = manifest["members"][name]
        domain = about["domain"]
        target = load_member(family, name)
        return Subject(
            name=name,
            family=manifest["size"],
            kind=about["kind"],
            target=target,
            base=load_target(str(family / "base")),
            stored=read_draft(str(family / "draft")),
            asked=str(family / "prompts" / f"{domain}-heldout.jsonl"),
            prompts=lambda split, count: suite_prompts(family, target, (domain,), split, count),
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
    case = _Bench(subject(), out / "answers" / group / name, answering).case()
    write_text(file, json.dumps(dataclasses.asdict(case), indent=1) + "\n")


def group_of(family: str, answering: RegenerateConfig) -> str:
    """The folder of a family's cells at a temperature."""
    return family + (f"-{answering.temperature:g}" if answering.temperature else "")


@dataclass(frozen=True)
class _Bench:
    """One fine-tune, and what is measured of it in the folder `work`."""

    subject: Subject
    work: Path
    answering: RegenerateConfig

    def case(self) -> Case:
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
        came = self.outcome(seen.answers, REFRESH in seen.draws)
        prompt = max((answer.prompt for answer in seen.answers), key=len)
        cost = measure_cost(s.target, s.stored.build(s.target), prompt, most=K)
        return Case(
            name=s.name,
            family=s.family,
            kind=s.kind,
            k=K,
            temperature=self.answering.temperature,
            signs=seen.evidence.signs(),
            seen={name: np.quantile(d, QUANTILES).tolist() for name, d in seen.draws.items()},
            asked=seen.evidence.prompts,
            plain=1 / cost.target,
            step=K * cost.c + cost.v(K),
            **came,
        )

    def outcome(self, few: list[Answer], refreshes: bool) -> dict[str, Any]:
        """Tau by action on prompts that nothing else saw; the dear part, kept in a file of its own."""
        file = self.work / "outcome.json"
        if file.is_file():
            return read_json(file)
        target, stored = self.subject.target, self.subject.stored
        evaluated = self._answers("eval", EVALUATED)
        stopped_by = self._answers("heldout", HELDOUT)
        pool = self._answers("adapt", PLANS[RETRAIN].prompts)
        steps: dict[str, list[StepTrace]] = {
            KEEP: replay(target, stored.build(target), evaluated, K),
            **({REFRESH: self._refreshed(few, evaluated)} if refreshes else {}),
            **{
                action: self._trained(action, method, pool, stopped_by, evaluated)
                for action, method in ((ADAPT, TRAINING.method), (RETRAIN, "scratch"))
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

    def _refreshed(self, answers: list[Answer], evaluated: list[Answer]) -> list[StepTrace]:
        target, base = self.subject.target, self.subject.base
        fitted = self.subject.stored.fitted(target)
        config = dataclasses.replace(TRAINING, method=REFRESHING, epochs=0.0)
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


def print_cases(cases: Sequence[Case], out: Console | None = None) -> None:
    """A line per case: what was seen, and tau by action."""
    out = out or Console(highlight=False)
    out.print("what was seen from a few prompts, and what came out: tau")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("case", "kind", "T", "native", "words", "entropy", *ACTIONS):
        table.add_column(heading, overflow="fold", no_wrap=heading != "case")
    for case in cases:
        signs = (_shown(case.signs.get(name)) for name in ("native", "words", "entropy"))
        taus = (_shown(case.taus.get(action)) for action in ACTIONS)
        name, temperature = f"{case.family}/{case.name}", f"{case.temperature:g}"
        table.add_row(name, case.kind, temperature, *signs, *taus)
    out.print(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
