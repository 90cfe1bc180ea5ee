"""`redraft check`: from a target, a draft and a few prompts to a recommendation: is adapting worth it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints.load import StoredDraft
from ..config import RegenerateConfig
from ..core.console import say
from ..core.records import StepCost, versions
from ..decoding.sampling import Sampling
from ..metrics.cost import measure_cost
from ..models.target import Target
from ..training.preconditions import check_fits
from .calibration_runs import ADAPT, KEEP, SCRATCH, CalibrationRun, Checked, read_runs
from .cost_estimate import costs_of
from .evidence import ANSWERING, Evidence, answer_all_of, gather
from .prediction import check_enough, predict
from .recommendation import WORTH, Pace, Recommendation, recommend
from .trial import DEFAULTS, Trial, adapting, grown, tried

RECOVERIES = (0.5, 0.9)
"""Shares of the way to a from-scratch draft at which the speed is printed."""


@dataclass(frozen=True)
class Check:
    """All of a check, as `--json` prints it.

    `trial` is a short adaptation. `speeds` are speed-ups over plain decoding: now, and where training from scratch was
    predicted, at recovery 0.5 and 0.9 of its tau. `step_cost` is measured at the batch size of the check. `published` is
    the tau on its base that the user names. `runs` and `outside` are the prediction's (0: there was none, and adapting
    is the trial's rise and MORE); `sampling` is how answers were drawn.
    """

    target: str
    draft: str
    base: str | None
    k: int
    evidence: Evidence
    trial: Trial
    step_cost: StepCost
    speeds: dict[str, float]
    recommendation: Recommendation
    runs: int
    outside: tuple[str, ...]
    sampling: Sampling
    published: float | None = None
    versions: dict[str, str] = field(default_factory=versions)


def check(
    target: Target,
    stored: StoredDraft,
    prompts: str,
    out: Path,
    *,
    base: Target | None = None,
    k: int = 4,
    rows: int = 1,
    most: int = 64,
    answering: RegenerateConfig = ANSWERING,
    worth: float = WORTH,
    serve: int | None = None,
    published: float | None = None,
    method: str = DEFAULTS.method,
    runs: Sequence[CalibrationRun] | None = None,
) -> Check:
    """Measure, predict and recommend; answers are kept in the folder `out`.

    Up to `most` prompts of the file `prompts` are answered, as `answering` says. `rows` is the batch size of
    serving, `serve` the tokens to be served, `method` what the trial trains. Raises UserError for what does not fit, and
    for too few prompts.
    """
    stored.check_servable()
    known = list(runs) if runs is not None else read_runs()
    check_enough(known)  # before anything is generated
    config = adapting(method)
    check_fits(stored.build(target), config, target, base)
    found = gather(
        target,
        stored,
        prompts,
        out,
        base=base,
        k=k,
        most=most,
        answering=answering,
    )
    evidence = found.evidence
    say("timing the steps of decoding")
    longest = max((answer.prompt for answer in found.answers), key=len)
    step_cost = measure_cost(target, stored.build(target), longest, most=k, rows=rows)
    say(f"a trial of {config.method}: trained on one half of the answers, measured on the other")
    answers = answer_all_of(target, prompts, out, most, k, answering)
    trial, rise = tried(target, stored, answers, config, k, found.level, seed=2)
    draft = Checked(
        predictors=evidence.predictors(),
        k=k,
        temperature=answering.temperature,
        parameters=target.parameter_count,
    )
    measured = found.draws | {ADAPT: grown(found.draws[KEEP], rise, k)}
    prediction = predict(draft, measured, known)
    fitting = evidence.closed_form.seconds if evidence.closed_form else None
    costs = costs_of(found.answers, evidence.answer_rate, trial.rate, fitting)
    now = evidence.unadapted.tau
    taus = {"now": now}
    if SCRATCH in prediction.draws:
        way = prediction.interval(SCRATCH)[0] - now
        taus |= {f"{share:g}": now + share * way for share in RECOVERIES}
    return Check(
        target=target.name,
        draft=str(stored.folder),
        base=base.name if base else None,
        k=k,
        evidence=evidence,
        trial=trial,
        step_cost=step_cost,
        speeds={name: tau / (k * step_cost.c + step_cost.v(k)) for name, tau in taus.items()},
        recommendation=recommend(prediction, Pace.of(step_cost, k), costs, worth, serve),
        runs=prediction.runs,
        outside=prediction.outside,
        sampling=Sampling.of(answering),
        published=published,
    )
