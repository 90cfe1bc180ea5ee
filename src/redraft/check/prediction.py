"""What tau each action would bring, predicted from what was seen, with an error that was measured.

The prediction is a linear model (Bayesian ridge) of a few signs and the temperature, fitted on cases whose outcome is
known: a table that `redraft bench triage` writes. Its error is what it erred by on fine-tunes of a kind that it was
not fitted on; a prediction's draws are Student's t around it, as wide as those errors were on cases decoded alike (greedily or
sampled), with as many degrees of freedom as these have kinds, less one: cases of one kind err alike, and the largest error seen among a few is
not the largest there is.

Tau is handled as z, the logit of the acceptance a that would give it were it the same at every position:
tau = 1 + a + ... + a^K. So z has the whole line, and means the same at every K.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.linear_model import BayesianRidge

from ..core.errors import UserError

KEEP, REFRESH, ADAPT, RETRAIN = ACTIONS = ("keep", "refresh", "adapt", "retrain")
"""What can be done with a draft, the cheapest first."""
PREDICTED = (ADAPT, RETRAIN)
"""Refreshing takes no training, so it is tried instead of predicted."""
SIGNS = (
    ("reused", "entropy", "native", "refreshed"),
    ("reused", "entropy", "native"),
    ("reused", "entropy"),
    ("reused", "native"),
    ("reused",),
)
"""The signs that a prediction may rest on (see `Case`); the first set that is there whole is taken."""
FEWEST, FEWEST_KINDS = 8, 3
"""Cases, and kinds of them, that a prediction needs at least."""
SHIPPED = Path(__file__).with_name("calibration.json")
TEMPERATURE = "temperature"
EDGE = 0.01
"""Acceptance is kept this far from 0 and from 1, where z has no end."""


@dataclass(frozen=True)
class Case:
    """A fine-tune whose outcome is known. `kind` is how it was tuned, `family` the models it belongs to.

    `signs` are tau as reused, of the base's draft on its base (native), on the target's answers as the base
    reads them (words), refreshed in closed form, and the target's entropy along its answers in nats per
    token, from `asked` prompts.
    `seen` are quantiles of tau as kept and as refreshed, as those prompts leave it open.
    `taus` are measured by action, with 95 % `intervals`, over other prompts. `plain` is plain decoding in
    tokens/s, and `step` what a speculative step costs in plain ones, where it was measured. All answers
    were sampled at `temperature`.
    """

    name: str
    family: str
    kind: str
    k: int
    signs: dict[str, float]
    taus: dict[str, float]
    intervals: dict[str, list[float]]
    seen: dict[str, list[float]]
    asked: int
    plain: float
    step: float
    temperature: float = 0.0


@dataclass(frozen=True)
class Outlook:
    """Tau by action as draws, all [N], of one joint distribution. `cases` is how many it rests on,
    `outside` are the signs that are smaller or larger than in all of them, the temperature too."""

    draws: dict[str, Any]
    cases: int
    outside: tuple[str, ...] = ()

    def interval(self, action: str) -> tuple[float, float, float]:
        """Median, and the middle 95 % of the draws."""
        low, middle, high = np.percentile(self.draws[action], [2.5, 50, 97.5])
        return float(middle), float(low), float(high)


class Prediction(NamedTuple):
    """Predicted z by action, the errors [C, actions] made on cases whose kinds were left out (on those decoded alike,
    greedily or sampled, where they are enough), how many kinds these have, the signs that lie outside of what the
    cases had, and how many cases there are in all."""

    middle: dict[str, float]
    errors: Any
    kinds: int
    outside: tuple[str, ...]
    cases: int


def read_cases(path: Path = SHIPPED) -> list[Case]:
    """Known cases from a JSON file. Raises UserError for a file that holds none."""
    try:
        return [Case(**row) for row in json.loads(path.read_text(encoding="utf-8"))["cases"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"{path}: no table of known cases ({problem}); `redraft bench case --record` writes one"
        ) from None


def as_json(cases: Sequence[Case]) -> dict[str, Any]:
    """The table that `read_cases` reads."""
    return {"cases": [asdict(case) for case in cases]}


def check_enough(cases: Sequence[Case]) -> None:
    """Raises UserError when there are too few cases, or too few kinds of them, to predict from."""
    if not _enough(cases):
        raise UserError(
            f"a prediction needs {FEWEST} known cases of three kinds at least, the table has {len(cases)} of "
            f"{len({case.kind for case in cases})}; add some with `redraft bench case`, or ours with --cases ours"
        )


def _enough(cases: Sequence[Case]) -> bool:
    return len(cases) >= FEWEST and len({case.kind for case in cases}) >= FEWEST_KINDS


def _usable(
    signs: Mapping[str, float], cases: Sequence[Case]
) -> tuple[Sequence[str], Sequence[Case]]:
    """The first set of signs that is there whole, and in enough cases, and those cases."""
    check_enough(cases)
    for names in SIGNS:
        some = [case for case in cases if all(name in case.signs for name in names)]
        if all(name in signs for name in names) and _enough(some):
            return names, some
    raise UserError("neither the draft nor enough known cases have a tau as reused")


def predict(
    signs: Mapping[str, float], k: int, cases: Sequence[Case], temperature: float = 0.0
) -> Prediction:
    """What the table says of a draft with these signs, sampled at `temperature` (0: greedily).

    Raises UserError when the table has too few cases or kinds.
    """
    names, cases = _usable(signs, cases)
    kinds = {case.kind for case in cases}
    x, y = _matrix(cases, names), _outcomes(cases)
    errors = np.empty_like(y)
    for kind in kinds:
        out = np.array([case.kind == kind for case in cases])
        errors[out] = y[out] - _fit(x[~out], y[~out], x[out])
    new = np.array([_signs(names, signs, k, temperature)])
    middle = dict(zip(PREDICTED, _fit(x, y, new)[0].tolist(), strict=True))
    beyond = (new[0] < x.min(0)) | (new[0] > x.max(0))
    outside = tuple(name for name, far in zip((*names, TEMPERATURE), beyond, strict=True) if far)
    coolest = min((case.temperature for case in cases if case.temperature), default=math.inf)
    alike = np.array([bool(case.temperature) == bool(temperature) for case in cases])
    near = [case for case, same in zip(cases, alike, strict=True) if same]
    # Greedy cases differ more than sampled ones; between them all say how much.
    if _enough(near) and (not temperature or temperature >= coolest):
        errors, kinds = errors[alike], {case.kind for case in near}
    return Prediction(middle, errors, len(kinds), outside, len(cases))


def outlook(
    signs: Mapping[str, float],
    k: int,
    measured: Mapping[str, Any],
    cases: Sequence[Case],
    temperature: float = 0.0,
    draws: int = 2000,
    seed: int = 0,
) -> Outlook:
    """Draws of tau by action: `measured` ones (keep, and refresh where it was tried) resampled from
    their own draws, the others predicted."""
    middle, errors, kinds, outside, count = predict(signs, k, cases, temperature)
    rng = np.random.default_rng(seed)
    freedom = kinds - 1
    stretch = np.sqrt(freedom / rng.chisquare(freedom, draws))
    width = errors.T @ errors / len(errors)
    drawn = rng.multivariate_normal(np.zeros(len(PREDICTED)), width, draws) * stretch[:, None]
    # One draw for all that was measured: they are of the same prompts.
    place = rng.random(draws)
    found = {
        name: np.asarray(values)[(place * len(values)).astype(int)]
        for name, values in measured.items()
    }
    for at, action in enumerate(PREDICTED):
        found[action] = tau_of(middle[action] + drawn[:, at], k)
    # An adapter starts as the draft is, and training stops where held-out acceptance falls.
    found[ADAPT] = np.maximum(found[ADAPT], found[KEEP])
    ordered = {name: found[name] for name in ACTIONS if name in found}
    return Outlook(ordered, count, outside)


def z_of(tau: float, k: int) -> float:
    """A tau's place on the whole line."""
    low, high = EDGE, 1 - EDGE
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _equal(middle, k) < tau else (low, middle)
    return math.log(low / (1 - low))


def tau_of(z: Any, k: int) -> Any:
    """The tau at a place on the whole line, the inverse of `z_of`; arrays of any shape."""
    return _equal(1 / (1 + np.exp(-np.asarray(z))), k)


def _equal(acceptance: Any, k: int) -> Any:
    """Tau of a chain of K at the same acceptance everywhere; arrays of any shape."""
    return sum(acceptance**j for j in range(k + 1))


def _signs(
    names: Sequence[str], signs: Mapping[str, float], k: int, temperature: float
) -> list[float]:
    """One row of the model's input: taus as z, the others as they are, the temperature last."""
    found = [signs[name] if name == "entropy" else z_of(signs[name], k) for name in names]
    return [*found, temperature]


def _matrix(cases: Sequence[Case], names: Sequence[str]) -> Any:
    return np.array([_signs(names, case.signs, case.k, case.temperature) for case in cases])


def _outcomes(cases: Sequence[Case]) -> Any:
    return np.array([[z_of(case.taus[action], case.k) for action in PREDICTED] for case in cases])


def _fit(x: Any, y: Any, new: Any) -> Any:
    """Predictions [N, actions] of a ridge on standardised signs, its strength chosen by evidence."""
    centre, scale = x.mean(0), x.std(0) + 1e-9
    models = [BayesianRidge().fit((x - centre) / scale, column) for column in y.T]
    return np.stack([model.predict((new - centre) / scale) for model in models], 1)
