"""`redraft bench triage`: what `redraft check` sees of each fine-tune of a family, and what then came out.

One JSON cell per member, a `Case`: the signs from a few requests, and tau as kept, refreshed, adapted and
trained anew, all on the same prompts, which nothing else saw. Gathered they are the table that the
outlook rests on (`triage/calibration.json`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..config import RegenerateConfig, TrainConfig
from ..console import say
from ..data.regenerate import regenerate
from ..errors import UserError, nearest
from ..files import write_text
from ..formats.folders import read_json
from ..formats.load import StoredDraft, read_draft
from ..measuring.acceptance import bootstrap_tau, pooled_tau
from ..measuring.cost import measure_cost
from ..measuring.replay import replay
from ..records import Answer, StepTrace
from ..steps import fuse_draft, train_private
from ..target import load_target
from ..training.train import train
from ..triage.evidence import REFRESHING, gather
from ..triage.outlook import ACTIONS, ADAPT, KEEP, REFRESH, RETRAIN, Case, as_json
from ..triage.pilot import PLANS
from .family import family_prompts, load_member

K = 4
EVALUATED = 128
HELDOUT = 32
LONGEST = 128
"""Tokens of an answer; a family's are shorter."""
QUANTILES = np.linspace(0.0125, 0.9875, 40)
"""Of what a check's prompts leave open, kept with a case."""
TRAINING = TrainConfig(loss="ce", batch_tokens=512)


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
        manifest = read_json(family / "family.json")
        for name in members or manifest["members"]:
            if name not in manifest["members"]:
                raise UserError(
                    f"{family} has no member '{name}'; {nearest(name, manifest['members'])}"
                )
            _cell(family, manifest, name, out, temperature)
    cases = read_cells(out)
    if record:
        write_text(record, json.dumps(as_json(cases), indent=1) + "\n")
    return cases


def read_cells(out: Path) -> list[Case]:
    """All cells of a folder."""
    return [Case(**read_json(path)) for path in sorted((out / "cells").glob("*/*.json"))]


def _cell(family: Path, manifest: dict[str, Any], name: str, out: Path, temperature: float) -> None:
    group = manifest["size"] + (f"-{temperature:g}" if temperature else "")
    file = out / "cells" / group / f"{name}.json"
    if file.is_file():
        return
    say(f"{group}: {name}")
    work = out / "answers" / group / name
    answering = RegenerateConfig(temperature=temperature, max_new_tokens=LONGEST)
    case = _Bench(family, manifest, name, work, answering).case()
    write_text(file, json.dumps(dataclasses.asdict(case), indent=1) + "\n")


class _Bench:
    """One member: its models, its prompts, and what is measured of it."""

    def __init__(
        self,
        family: Path,
        manifest: dict[str, Any],
        name: str,
        work: Path,
        answering: RegenerateConfig,
    ):
        self.answering = answering
        self.family, self.name, self.work, self.manifest = family, name, work, manifest
        about = manifest["members"][name]
        self.domain, self.kind = about["domain"], about["kind"]
        self.target, self.base = load_member(family, name), load_target(str(family / "base"))
        self.stored = read_draft(str(family / "draft"))
        self.fitted = self.stored.fitted(self.target)

    def case(self) -> Case:
        """What a check sees. Its prompts are not those that outcomes are measured on."""
        seen = gather(
            self.target,
            self.stored,
            str(self.family / "prompts" / f"{self.domain}-heldout.jsonl"),
            self.work / "check",
            base=self.base,
            k=K,
            answering=self.answering,
            train=TRAINING,
        )
        came = self.outcome(seen.answers, REFRESH in seen.draws)
        prompt = max((answer.prompt for answer in seen.answers), key=len)
        cost = measure_cost(self.target, self.stored.build(self.target), prompt, most=K)
        return Case(
            name=self.name,
            family=self.manifest["size"],
            kind=self.kind,
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
        evaluated = self._answers("eval", EVALUATED)
        stopped_by = self._answers("heldout", HELDOUT)
        pool = self._answers("adapt", PLANS[RETRAIN].prompts)
        steps: dict[str, list[StepTrace]] = {
            KEEP: replay(self.target, self.stored.build(self.target), evaluated, K),
            **({REFRESH: self._refreshed(few, evaluated)} if refreshes else {}),
            **{
                action: self._trained(action, method, pool, stopped_by, evaluated)
                for action, method in ((ADAPT, TRAINING.method), (RETRAIN, "scratch"))
            },
        }
        used = {action: [t for t in traces if t.accepted] for action, traces in steps.items()}
        found = {
            "taus": {action: pooled_tau(traces) for action, traces in used.items()},
            "intervals": {action: bootstrap_tau(traces) for action, traces in used.items()},
        }
        write_text(file, json.dumps(found, indent=1) + "\n")
        return found

    def _refreshed(self, answers: list[Answer], evaluated: list[Answer]) -> list[StepTrace]:
        config = dataclasses.replace(TRAINING, method=REFRESHING, epochs=0.0)
        part = train_private(
            self.target, self.fitted, answers, answers[-4:], config, K, base=self.base
        )
        fused: StoredDraft = fuse_draft(self.fitted, part, self.target)
        return replay(self.target, fused.build(self.target), evaluated, K)

    def _trained(
        self,
        action: str,
        method: str,
        pool: list[Answer],
        stopped_by: list[Answer],
        evaluated: list[Answer],
    ) -> list[StepTrace]:
        plan = PLANS[action]
        config = dataclasses.replace(TRAINING, method=method, epochs=plan.epochs)
        draft = self.stored.build(self.target, torch.float32)
        train(self.target, draft, pool[: plan.prompts], stopped_by, config, k=K)
        return replay(self.target, draft, evaluated, K)

    def _answers(self, split: str, count: int) -> list[Answer]:
        """The target's answers to a split of its domain, kept in the work folder."""
        prompts = family_prompts(self.family, self.target, (self.domain,), split, count)
        file = self.work / f"{split}.jsonl"
        found = regenerate(self.target, prompts, file, self.answering, overrun=K)
        return [answer for answer in found if answer.length >= 2]


def print_cases(cases: Sequence[Case], out: Console | None = None) -> None:
    """A line per case: what was seen, and tau by action."""
    out = out or Console(highlight=False)
    table = Table(title="what was seen from a few prompts, and what came out: tau")
    for heading in ("family", "member", "kind", "native", "words", "entropy", *ACTIONS):
        table.add_column(heading)
    for case in cases:
        signs = (_shown(case.signs.get(name)) for name in ("native", "words", "entropy"))
        taus = (_shown(case.taus.get(action)) for action in ACTIONS)
        table.add_row(case.family, case.name, case.kind, *signs, *taus)
    out.print(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
