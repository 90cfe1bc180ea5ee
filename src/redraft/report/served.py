"""The speed-up that `redraft verify` measured, where the run folder holds its record."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError
from ..core.folders import read_json
from ..core.records import Acceptance, Verification
from ..core.report_record import AdaptReport

RECORD = "verify/verification.json"


@dataclass(frozen=True)
class Speed:
    """What the engine measured with the adapted draft, and what that lets expect of the unadapted one.

    `expected_before` takes a step to cost the same with either draft: speed-up / tau is then one
    number. It is None where the run was measured at another K or temperature than the engine.
    """

    found: Verification
    expected_before: float | None


def read_speed(run: Path, report: AdaptReport) -> Speed | None:
    """The speed-up of the draft that the report describes. None without a record of that draft."""
    path = run / RECORD
    if not path.exists():
        return None
    try:
        found = Verification.from_json(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(
            f"{path} is no record of redraft verify ({problem!r}); remove it, or measure again with "
            f"{verify_command(report)}"
        ) from None
    if found.recorded is None or _counts(found.recorded) != _counts(report.after):
        return None  # of a draft that was in this folder before
    alike = found.k == report.after.k and report.after.temperature == 0
    first = found.speed[0].ratio
    return Speed(found, first * report.before.tau / report.after.tau if alike else None)


def verify_command(report: AdaptReport) -> str:
    """The command that measures the speed-up of a run."""
    return f"redraft verify --run {shlex.quote(report.draft.removesuffix('/draft'))}"


def _counts(measured: Acceptance) -> tuple[float, ...]:
    return measured.accepted, measured.steps, measured.k, measured.temperature
