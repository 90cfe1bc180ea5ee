"""Calibration runs: fine-tunes whose outcome was measured, as a JSON file with one run a line.

`redraft bench triage` and `redraft bench case` record them; `prediction.py` predicts from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError

KEEP, CLOSED_FORM, ADAPT, SCRATCH = ACTIONS = ("keep", "closed-form", "adapt", "from-scratch")
"""What can be done with a draft, the cheapest first. Closed form takes no training."""
SHIPPED = Path(__file__).with_name("calibration.json")
MOST_K = 64
READING = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
)
"""What reading a damaged or a foreign file may raise."""
OLD_NAMES = {
    "cases": "runs",
    "signs": "predictors",
    "seen": "quantiles",
    "reused": "unadapted",
    "native": "on_base",
    "words": "base_states",
    "refreshed": "closed_form",
    "refresh": CLOSED_FORM,
    "retrain": SCRATCH,
}
"""Keys of files of before, which are still read. Their `plain` is dropped."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check knows of a draft: `predictors` by name, measured at `k` and `temperature` (0: greedy).

    Predictors are taus (`unadapted`; `closed_form`; `on_base`, of the draft on its base; `base_states`, on the
    target's answers as the base reads them) and `entropy`, the target's along its answers in nats per token.
    `parameters` are those of the target (0: not known).
    """

    predictors: dict[str, float]
    k: int
    temperature: float = 0.0
    parameters: int = 0


@dataclass(frozen=True, kw_only=True)
class CalibrationRun(Checked):
    """A fine-tune with its outcome. `kind` is how it was tuned, `family` the models it belongs to.

    Predictors come from `asked` prompts, which leave tau open by these `quantiles` (keep, closed form).
    `taus` by action are measured on other prompts, with 95 % `intervals`. `step` is the cost of a speculative
    step in plain ones.
    """

    name: str
    family: str
    kind: str
    taus: dict[str, float]
    intervals: dict[str, list[float]]
    quantiles: dict[str, list[float]]
    asked: int
    step: float


def read_runs(path: Path = SHIPPED) -> list[CalibrationRun]:
    """The runs of a file. Raises UserError for a file that holds none."""
    try:
        rows = renamed(json.loads(path.read_text(encoding="utf-8")))["runs"]
        return [_checked(CalibrationRun(**row)) for row in rows]
    except READING as problem:
        raise UserError(
            f"{path} holds no calibration runs ({type(problem).__name__}: {problem}); "
            "`redraft bench case --record` writes such a file"
        ) from None


def as_text(runs: Sequence[CalibrationRun]) -> str:
    """The file that `read_runs` reads: one JSON document, one run a line."""
    lines = (json.dumps({"name": run.name, **asdict(run)}) for run in runs)
    return '{"runs": [\n' + ",\n".join(lines) + "\n]}\n"


def renamed(value: Any) -> Any:
    """The same JSON value with the keys of today."""
    if isinstance(value, dict):
        named = {OLD_NAMES.get(key, key): renamed(each) for key, each in value.items()}
        return {key: each for key, each in named.items() if key != "plain"}
    return [renamed(each) for each in value] if isinstance(value, list) else value


def _checked(run: CalibrationRun) -> CalibrationRun:
    """The same run. Raises ValueError, KeyError or TypeError for values that cannot be predicted from."""
    taus = [run.taus[action] for action in (KEEP, ADAPT, SCRATCH)]
    numbers = [*run.taus.values(), *run.predictors.values(), run.step, run.temperature]
    if not all(isinstance(text, str) for text in (run.name, run.family, run.kind)):
        raise TypeError("name, family and kind are texts")
    if type(run.k) is not int or not 1 <= run.k <= MOST_K:
        raise ValueError(f"K of run '{run.name}' is not 1 to {MOST_K}")
    if run.predictors["unadapted"] < 1 or min(taus) < 1:
        raise ValueError(f"run '{run.name}' has a tau below 1")
    if run.temperature < 0 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"run '{run.name}' has a value that is no finite number")
    return run
