"""`redraft bench case`: one of your own fine-tunes as a calibration run, from one file of prompts.

The prompts are split in the order of the file: the first are what a check asks, then come those that stop training,
those that tau is measured on, and those that are trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redraft.check.calibration_runs import ADAPT, SCRATCH, CalibrationRun
from redraft.check.cost_estimate import PLANS, TRAINING
from redraft.checkpoints.load import StoredDraft
from redraft.config import RegenerateConfig
from redraft.core.console import say
from redraft.core.errors import UserError
from redraft.core.files import write_text
from redraft.core.folders import read_json
from redraft.core.records import Prompt
from redraft.generation.answer_file import answer_inputs
from redraft.models.target import Target
from redraft.prompts.prompts import read_prompts
from redraft.training.preconditions import check_fits

from .triage import (
    CHECKED,
    EVALUATED,
    HELDOUT,
    Subject,
    gathered,
    group_of,
    run_cell,
)


def bench_case(
    target: Target,
    stored: StoredDraft,
    base: Target,
    source: str,
    out: Path,
    *,
    name: str,
    family: str,
    kind: str,
    answering: RegenerateConfig,
    record: Path | None = None,
) -> list[CalibrationRun]:
    """All calibration runs of the folder `out`, with this one, made where it is missing.

    `family` says which models it belongs to, `kind` how it was tuned: a prediction's error is what it errs by on other
    kinds. Raises UserError for models that do not belong together, for too few prompts, and where `out` holds
    another run of that name.
    """
    for flag, given in (("--name", name), ("--family", family)):
        if given != Path(given).name or given == "..":
            raise UserError(f"{flag} '{given}' has to do as the name of a file: no slashes")
    check_fits(stored.build(target), TRAINING, target, base)  # before anything is generated
    starts = {"heldout": CHECKED, "eval": CHECKED + HELDOUT, "adapt": CHECKED + HELDOUT + EVALUATED}
    found = _prompts(source, target, starts["adapt"])
    inputs = answer_inputs(target, found, answering, 0)
    inputs |= {"draft": stored.hash(), "base": base.fingerprint(), "kind": kind}
    _claim(out, f"{group_of(family, answering)}/{name}", inputs)

    def subject() -> Subject:
        def prompts(split: str, count: int) -> Sequence[Prompt]:
            return found[starts[split] : starts[split] + count]

        return Subject(name, family, kind, target, base, stored, source, prompts)

    run_cell(out, family, name, subject, answering)
    return gathered(out, record)


def _prompts(source: str, target: Target, aside: int) -> list[Prompt]:
    """The prompts of the file that are used. Raises UserError where too few are left to train on."""
    least, most = PLANS[ADAPT].prompts, PLANS[SCRATCH].prompts
    found = list(read_prompts(source, target, aside + most, "last").prompts)
    left = len(found) - aside
    if left < least:
        raise UserError(
            f"{source} has {len(found)} prompts of use, a calibration run needs {aside + least} at least: {aside} to check and to measure "
            f"with, {least} to train on ({most} are best)"
        )
    if left < most:
        say(
            f"training from scratch has {left} of {most} answers: its tau may be lower than with all"
        )
    return found


def _claim(out: Path, run: str, inputs: dict[str, Any]) -> None:
    """Refuse to take another fine-tune's run, or one made otherwise, for this one."""
    about = out / "answers" / run / "about.json"
    found = None
    if about.is_file():
        known = read_json(about)
        changed = sorted(key for key in inputs if known.get(key) != inputs[key])
        found = f"with other {', '.join(changed)}" if changed else None
    elif (out / "cells" / f"{run}.json").is_file():
        found = "that does not say what it is of"
    if found:
        raise UserError(
            f"{out} has a run {run} {found}; give this one another --name, or another --out"
        )
    write_text(about, json.dumps(inputs, indent=2) + "\n")
