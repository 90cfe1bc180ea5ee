"""Does the regression behind `redraft check` earn its place? The same rule, fed by simpler estimates.

Every calibration run is judged by runs of other kinds alone. Each estimate gives tau after adapting and after
training from scratch, its errors on kinds left out give the draws, and `check/recommendation.py` decides.

The rule for keeping the regression was fixed before the figures were read. It is clearly better than an
alternative if, over all runs, the paired difference in speed lost has a 95 % interval below 0, or an exact
McNemar test on right recommendations favours it with p < 0.05. It stays if it is clearly better than both the
constant recovery and the closed form with an offset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from redraft.check.prediction import (
    ACTIONS,
    ADAPT,
    KEEP,
    PREDICTED,
    RETRAIN,
    Case,
    _fit,
    _matrix,
    _outcomes,
    _signs,
    _usable,
    tau_of,
    z_of,
)

Estimate = Callable[[Sequence[Case], Case], Sequence[float]]
"""z after adapting and after training from scratch of a run, from the runs of other kinds."""
LEAST_GAP = 0.15
FEWEST_KINDS = 3


def alike(cases: Sequence[Case], temperature: float) -> list[Case]:
    """The runs at this temperature, or, where these are of too few kinds, all greedy or all sampled ones."""
    for same in (
        [c for c in cases if c.temperature == temperature],
        [c for c in cases if bool(c.temperature) == bool(temperature)],
    ):
        if len({c.kind for c in same}) >= FEWEST_KINDS:
            return same
    return list(cases)


def recovery_of(case: Case) -> float:
    gap = case.taus[RETRAIN] - case.taus[KEEP]
    return (case.taus[ADAPT] - case.taus[KEEP]) / gap if gap > LEAST_GAP else math.nan


def regression(known: Sequence[Case], new: Case) -> Sequence[float]:
    names, some = _usable(new.signs, known)
    row = np.array([_signs(names, new.signs, new.k, new.temperature)])
    found: list[float] = _fit(_matrix(some, names), _outcomes(some), row)[0].tolist()
    return found


def constant_recovery(known: Sequence[Case], new: Case) -> Sequence[float]:
    same = alike(known, new.temperature)
    mean = float(np.nanmean([recovery_of(c) for c in same]))
    retrain = float(tau_of(_outcomes(same)[:, 1].mean(), new.k))
    keep = new.signs["reused"]
    return z_of(keep + mean * max(retrain - keep, 0.0), new.k), z_of(retrain, new.k)


def closed_form_offset(known: Sequence[Case], new: Case) -> Sequence[float]:
    return _offset(known, new, "refreshed" if "refreshed" in new.signs else "reused")


def tau_offset(known: Sequence[Case], new: Case) -> Sequence[float]:
    return _offset(known, new, "reused")


def closed_form(known: Sequence[Case], new: Case) -> Sequence[float]:
    """The closed form's tau as that after adapting."""
    same = alike(known, new.temperature)
    return z_of(new.signs.get("refreshed", new.signs["reused"]), new.k), _outcomes(same)[
        :, 1
    ].mean()


def constant_tau(known: Sequence[Case], new: Case) -> Sequence[float]:
    found: list[float] = _outcomes(alike(known, new.temperature)).mean(0).tolist()
    return found


def _offset(known: Sequence[Case], new: Case, name: str) -> Sequence[float]:
    same = [c for c in alike(known, new.temperature) if name in c.signs]
    start = np.array([[z_of(c.signs[name], c.k)] for c in same])
    found: list[float] = (z_of(new.signs[name], new.k) + (_outcomes(same) - start).mean(0)).tolist()
    return found


def draws_of(
    estimate: Estimate, known: Sequence[Case], new: Case, draws: int = 2000
) -> dict[str, Any]:
    errors: list[tuple[Case, Any]] = []
    for kind in {c.kind for c in known}:
        others = [c for c in known if c.kind != kind]
        for c in known:
            if c.kind == kind:
                errors.append((c, _outcomes([c])[0] - estimate(others, c)))
    near = [(c, e) for c, e in errors if bool(c.temperature) == bool(new.temperature)]
    kinds = len({c.kind for c, _ in near})
    errors_CA = np.array([e for _, e in near])
    rng = np.random.default_rng(0)
    freedom = kinds - 1
    stretch = np.sqrt(freedom / rng.chisquare(freedom, draws))
    drawn = (
        rng.multivariate_normal(np.zeros(2), errors_CA.T @ errors_CA / len(errors_CA), draws)
        * stretch[:, None]
    )
    place = rng.random(draws)
    found = {n: np.asarray(v)[(place * len(v)).astype(int)] for n, v in new.seen.items()}
    middle = estimate(known, new)
    for at, action in enumerate(PREDICTED):
        found[action] = tau_of(middle[at] + drawn[:, at], new.k)
    found[ADAPT] = np.maximum(found[ADAPT], found[KEEP])
    return {n: found[n] for n in ACTIONS if n in found}
