"""`redraft check`: from a target, a draft and a few prompts to a verdict on whether a repair is worth it."""

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
from .cost_estimate import TRAINING, bills, training_rate, trial_of
from .evidence import ANSWERING, Evidence, gather
from .prediction import RETRAIN, Case, check_enough, outlook, read_cases
from .recommendation import WORTH, Pace, Verdict, decide

RECOVERIES = (0.5, 0.9)
"""Shares of the way to a draft trained anew at which the speed is told."""


@dataclass(frozen=True)
class Check:
    """All of a check, as `--json` prints it.

    `speeds` are speed-ups over plain decoding: now, and at recovery 0.5 and 0.9 of the predicted tau of a draft
    trained anew. `cost` is measured `rows` at a time. `published` is the tau that the user says the draft
    has on its base. `cases` and `outside` are the outlook's; `sampling` is how answers were drawn,
    `method` the adapters whose training was timed.
    """

    target: str
    draft: str
    base: str | None
    k: int
    evidence: Evidence
    cost: StepCost
    speeds: dict[str, float]
    verdict: Verdict
    cases: int
    outside: tuple[str, ...]
    sampling: Sampling
    method: str
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
    method: str = TRAINING.method,
    cases: Sequence[Case] | None = None,
) -> Check:
    """Measure, predict and decide; answers are kept in the folder `out`.

    `prompts` is a file of them, of which up to `most` are answered, as `answering` says. `rows` is the batch size that is served
    with, `serve` the tokens that will be. `method` changes the bill alone: outcomes are foretold of the known cases' own. Raises UserError for what does not fit, and for too few prompts.
    """
    stored.check_servable()
    known = list(cases) if cases is not None else read_cases()
    check_enough(known)  # before anything is paid for
    trial = trial_of(method)
    check_fits(stored.build(target), trial, target, base)
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
    say("timing the steps of decoding, and a few of training")
    longest = max((answer.prompt for answer in found.answers), key=len)
    cost = measure_cost(target, stored.build(target), longest, most=k, rows=rows)
    rate = training_rate(target, stored, found.answers, trial, k)
    signs = evidence.signs()
    if published is not None and "native" not in signs:
        signs["native"] = published
    seen = outlook(signs, k, found.draws, known, answering.temperature)
    refreshed = evidence.refreshed.seconds if evidence.refreshed else None
    bill = bills(found.answers, evidence.answer_rate, rate, refreshed)
    verdict = decide(seen, Pace.of(cost, k), bill, worth, serve)
    anew = seen.interval(RETRAIN)[0]
    taus = {"now": evidence.reused.tau}
    taus |= {
        f"{share:g}": evidence.reused.tau + share * (anew - evidence.reused.tau)
        for share in RECOVERIES
    }
    return Check(
        target=target.name,
        draft=str(stored.folder),
        base=base.name if base else None,
        k=k,
        evidence=evidence,
        cost=cost,
        speeds={name: tau / (k * cost.c + cost.v(k)) for name, tau in taus.items()},
        verdict=verdict,
        cases=seen.cases,
        outside=seen.outside,
        sampling=Sampling.of(answering),
        method=method,
        published=published,
    )
