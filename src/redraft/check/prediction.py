"""What tau adapting and training from scratch would bring, predicted from calibration runs, with its error.

A Bayesian ridge of a few predictors and the temperature. Its errors are those on kinds of fine-tunes that it was
not fitted on. Draws are Student's t around the prediction, as wide as those errors on runs decoded alike (greedily
or sampled), with as many degrees of freedom as these have kinds, less one: runs of one kind err alike.

Tau is handled as z, the logit of the acceptance a that would give it were it the same at every position:
tau = 1 + a + ... + a^K. So z has the whole line, and means the same at every K.

Shapes: C runs, N drafts or draws, A predicted actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import multivariate_t
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..core.errors import UserError
from .calibration_runs import ACTIONS, ADAPT, KEEP, SCRATCH, CalibrationRun, Checked

PREDICTED = (ADAPT, SCRATCH)
"""The closed form takes no training, so it is tried instead of predicted."""
PREDICTORS = ("unadapted", "entropy", "closed_form")
"""Those that are not there are left out, the last first (docs/results/triage.md says why these)."""
FEWEST, FEWEST_KINDS = 8, 3
"""Runs, and kinds of them, that a prediction needs at least."""
LARGER = 10
"""How many times the parameters of a run's target may be those of a target that it is held to predict. The runs that come
with redraft (0.7 to 3.7 million) say tau 2.8 after adapting and 3.9 from scratch for a fine-tune of SmolLM2-135M, where 1.9
and 1.4 were measured on a quarter to all of those answers."""
TEMPERATURE = "temperature"
EDGE = 0.01
"""Acceptance is kept this far from 0 and from 1, where z has no end."""

Estimate = Callable[[Sequence[CalibrationRun], Sequence[Checked], Sequence[str]], Any]
"""z [N, A] of drafts after each predicted action, from runs, by the named predictors."""


@dataclass(frozen=True)
class Prediction:
    """Tau by action as draws, all [N], of one joint distribution. `runs` is how many it was fitted on (0: nothing was
    predicted), `outside` are the predictors, or the temperature, beyond all of these."""

    draws: dict[str, Any]
    runs: int
    outside: tuple[str, ...] = ()

    def interval(self, action: str) -> tuple[float, float, float]:
        """Median, and the middle 95 % of the draws."""
        low, middle, high = np.percentile(self.draws[action], [2.5, 50, 97.5])
        return float(middle), float(low), float(high)


def regression(
    runs: Sequence[CalibrationRun], drafts: Sequence[Checked], names: Sequence[str]
) -> Any:
    """The estimate of a check: a ridge on standardised predictors, its strength chosen by evidence."""
    model = make_pipeline(StandardScaler(), MultiOutputRegressor(BayesianRidge()))
    return model.fit(_inputs(runs, names), outcomes(runs)).predict(_inputs(drafts, names))


def predict(
    draft: Checked,
    measured: Mapping[str, Any],
    runs: Sequence[CalibrationRun],
    estimate: Estimate = regression,
    draws: int = 2000,
    seed: int = 0,
) -> Prediction:
    """Draws of tau by action: `measured` ones (keep, closed form, what a trial says of adapting) resampled from their
    own draws, the others predicted; none where the runs' targets are too small. Raises UserError where the runs, or their
    kinds, are too few."""
    check_enough(runs)
    rng = np.random.default_rng(seed)
    fit = [run for run in runs if not run.parameters or draft.parameters <= LARGER * run.parameters]
    if len(fit) < len(runs):  # then those of another way of decoding are no makeshift
        runs = [run for run in fit if bool(run.temperature) == bool(draft.temperature)]
    if not _enough(runs):
        return Prediction(_resampled(measured, rng.random(draws)), 0)
    names, runs = usable(draft, runs)
    errors_CA, kinds = errors_of(draft, runs, names, estimate)
    width_AA = errors_CA.T @ errors_CA / len(errors_CA)
    spread = multivariate_t(shape=width_AA, df=kinds - 1, allow_singular=True)
    z_NA = estimate(runs, [draft], names) + spread.rvs(draws, random_state=rng)
    found = _resampled(measured, rng.random(draws))
    found |= {action: tau_of(z_NA[:, at], draft.k) for at, action in enumerate(PREDICTED)}
    # Adapting starts from the draft as kept, and stops where held-out acceptance falls.
    found[ADAPT] = np.maximum(found[ADAPT], found[KEEP])
    ordered = {name: found[name] for name in ACTIONS if name in found}
    return Prediction(ordered, len(runs), _outside(draft, runs, names))


def _resampled(measured: Mapping[str, Any], place_N: Any) -> dict[str, Any]:
    """One draw for all that was measured: they are of the same prompts."""
    return {
        name: np.asarray(values)[(place_N * len(values)).astype(int)]
        for name, values in measured.items()
    }


def errors_of(
    draft: Checked, runs: Sequence[CalibrationRun], names: Sequence[str], estimate: Estimate
) -> tuple[Any, int]:
    """Errors [C, A] on runs whose kind was left out, of those decoded as the draft is, and how many kinds
    these have. All runs count where those decoded alike are too few."""
    kinds, errors_CA = [run.kind for run in runs], outcomes(runs)
    for rest, out in LeaveOneGroupOut().split(errors_CA, groups=kinds):
        errors_CA[out] -= estimate([runs[i] for i in rest], [runs[i] for i in out], names)
    coolest = min((run.temperature for run in runs if run.temperature), default=math.inf)
    alike = [bool(run.temperature) == bool(draft.temperature) for run in runs]
    near = [run for run, same in zip(runs, alike, strict=True) if same]
    # Greedy runs differ more than sampled ones; between them all say how much.
    if _enough(near) and (not draft.temperature or draft.temperature >= coolest):
        return errors_CA[alike], len({run.kind for run in near})
    return errors_CA, len(set(kinds))


def usable(
    draft: Checked, runs: Sequence[CalibrationRun]
) -> tuple[list[str], list[CalibrationRun]]:
    """The predictors that the draft and enough runs have, and these runs."""
    check_enough(runs)
    names = [name for name in PREDICTORS if name in draft.predictors]
    while names:
        some = [run for run in runs if all(name in run.predictors for name in names)]
        if _enough(some):
            return names, some
        names.pop()
    raise UserError(
        "neither the draft nor enough calibration runs have the tau of the unadapted draft"
    )


def check_enough(runs: Sequence[CalibrationRun]) -> None:
    """Raises UserError when there are too few runs, or too few kinds of them, to predict from."""
    if not _enough(runs):
        raise UserError(
            f"a prediction needs {FEWEST} calibration runs of three kinds at least, found {len(runs)} of "
            f"{len({run.kind for run in runs})}; add some with `redraft bench case`, or ours with --calibration ours"
        )


def _enough(runs: Sequence[CalibrationRun]) -> bool:
    return len(runs) >= FEWEST and len({run.kind for run in runs}) >= FEWEST_KINDS


@lru_cache(maxsize=4096)
def z_of(tau: float, k: int) -> float:
    """A tau's place on the whole line."""
    low, high = EDGE, 1 - EDGE
    inside = min(max(tau, _equal(low, k)), _equal(high, k))
    return float(logit(brentq(lambda a: _equal(a, k) - inside, low, high)))


def tau_of(z: Any, k: int) -> Any:
    """The tau at a place on the whole line, the inverse of `z_of`; arrays of any shape."""
    return _equal(expit(z), k)


def _equal(acceptance: Any, k: int) -> Any:
    """Tau of a chain of K at the same acceptance everywhere; arrays of any shape."""
    return sum(acceptance**j for j in range(k + 1))


def outcomes(runs: Sequence[CalibrationRun]) -> Any:
    """z [C, A] that was measured."""
    return np.array([[z_of(run.taus[action], run.k) for action in PREDICTED] for run in runs])


def _inputs(drafts: Sequence[Checked], names: Sequence[str]) -> Any:
    """The model's input [N, names + 1]: taus as z, the entropy unchanged, the temperature last."""
    return np.array(
        [
            [
                *(
                    draft.predictors[name]
                    if name == "entropy"
                    else z_of(draft.predictors[name], draft.k)
                    for name in names
                ),
                draft.temperature,
            ]
            for draft in drafts
        ]
    )


def _outside(
    draft: Checked, runs: Sequence[CalibrationRun], names: Sequence[str]
) -> tuple[str, ...]:
    x, new = _inputs(runs, names), _inputs([draft], names)[0]
    beyond = (new < x.min(0)) | (new > x.max(0))
    return tuple(name for name, far in zip((*names, TEMPERATURE), beyond, strict=True) if far)
