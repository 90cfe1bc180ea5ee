"""`redraft bench case`: one of your own fine-tunes as a known case, from one file of prompts.

The prompts are split in the order of the file: the first are what a check asks, then come those that stop training,
those that tau is measured on, and those that are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import RegenerateConfig, TrainConfig
from ..data.prompts import read_prompts
from ..errors import UserError
from ..formats.load import StoredDraft
from ..records import Prompt
from ..target import Target
from ..training.fitness import check_fits
from ..triage.outlook import ADAPT, RETRAIN, Case
from ..triage.pilot import PLANS, TRAINING
from .triage import CHECKED, EVALUATED, HELDOUT, Subject, gathered, run_cell


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
    training: TrainConfig = TRAINING,
    record: Path | None = None,
) -> list[Case]:
    """All cases of the folder `out`, with this one, run where it is missing.

    `family` says which models it belongs to, `kind` how it was tuned: a prediction's error is what it errs by on other
    kinds. `training` is what adapting does; training anew does the same from nothing. Raises UserError for
    models that do not belong together, and for too few prompts.
    """
    check_fits(stored.build(target), training, target, base)  # before anything is paid for

    def subject() -> Subject:
        split = _split(source, target)
        return Subject(name, family, kind, target, base, stored, source, split)

    run_cell(out, family, name, subject, answering, training)
    return gathered(out, record)


def _split(source: str, target: Target) -> Callable[[str, int], Sequence[Prompt]]:
    """What gives the prompts of a split. Raises UserError where those left to train on are too few."""
    starts = {"heldout": CHECKED, "eval": CHECKED + HELDOUT, "adapt": CHECKED + HELDOUT + EVALUATED}
    aside, least, most = starts["adapt"], PLANS[ADAPT].prompts, PLANS[RETRAIN].prompts
    found = list(read_prompts(source, target, aside + most, "last").prompts)
    if len(found) < aside + least:
        raise UserError(
            f"{source} has {len(found)} prompts of use, a case needs {aside + least} at least: {aside} to check and to measure "
            f"with, {least} to train on ({most} are best)"
        )
    return lambda split, count: found[starts[split] : starts[split] + count]
