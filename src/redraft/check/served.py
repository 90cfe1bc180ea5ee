"""A check of a draft in use, through the server that uses it: no weights, some requests and its counters.

vLLM counts drafts and accepted tokens; between two readings of its metrics lie our requests. What other
clients ask in the meantime is counted too, so the check wants a quiet moment, and says when it had none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from ..config import RegenerateConfig
from ..core.errors import UserError
from ..core.visible import visible
from ..decoding.sampling import Sampling
from ..metrics import intervals
from .calibration_runs import KEEP, CalibrationRun, Checked, read_runs
from .cost_estimate import PLANS
from .counting_server import GROUPS, Counted, CountingServer, ask_all, read_asked
from .evidence import ANSWERING
from .prediction import check_enough, predict
from .recommendation import WORTH, Cost, Pace, Recommendation, recommend

UNKNOWN = (
    "speed-up over plain decoding (serve without the draft and compare, or `redraft check --target`)",
    "the cause (needs the weights and --base)",
    "what the closed form brings (the same)",
    "seconds of training",
)
NOT_PREDICTED = "what adapting would bring (`redraft check --target` tries it; or predict from runs of your own, --calibration)"
SERVED = 10**9
"""Parameters that a served target is taken to have, which no metric says."""


@dataclass(frozen=True)
class ServedCheck:
    """What a server shows of the prompts that it answers; `refused` ones, too long for instance, are left out.

    `tau` has a 95 % interval over groups of prompts; `per_position` is conditional acceptance; `rate` is in
    tokens per second with `rows` requests at a time. `others` is the share of the counted tokens that were
    not ours. `runs` and `outside` are the prediction's (0 runs have a target as large as served ones: no recommendation); `sampling` is how answers were asked for; `unknown`
    lists what a server cannot show.
    """

    endpoint: str
    model: str
    k: int
    prompts: int
    answer_tokens: int
    sampling: Sampling
    tau: tuple[float, float, float]
    per_position: tuple[float, ...]
    rate: float
    rows: int
    others: float
    recommendation: Recommendation | None
    runs: int
    outside: tuple[str, ...]
    published: float | None
    refused: int
    unknown: tuple[str, ...] = UNKNOWN


def check_served(
    url: str,
    source: str,
    *,
    rows: int = 1,
    most: int = 64,
    answering: RegenerateConfig = ANSWERING,
    worth: float = WORTH,
    published: float | None = None,
    model: str | None = None,
    runs: Sequence[CalibrationRun] | None = None,
    template_args: Mapping[str, Any] | None = None,
    transport: httpx.BaseTransport | None = None,
) -> ServedCheck:
    """Ask `most` prompts of a file, `rows` at a time, of the server at `url` (its root).

    `template_args` are variables for the chat template that the server uses.

    Raises UserError for a server that cannot be reached, has no counters or does not speculate, and for
    too few prompts.
    """
    known = list(runs) if runs is not None else read_runs()
    check_enough(known)  # before anything is asked
    asked = read_asked(source, max(most, 2 * rows), rows)
    with CountingServer(url, template_args, transport) as server:
        name = server.model(model)
        found = ask_all(server, name, asked, answering, rows)
    _check_counted(server, name, found)
    accepted, groups = found.whole.acceptance(), found.counts()
    draft = Checked(
        predictors={"unadapted": accepted.tau},
        k=found.k,
        temperature=answering.temperature,
        parameters=SERVED,
    )
    prediction = predict(draft, {KEEP: intervals.tau_draws(groups, found.k)}, known)
    rate, mean = found.tokens / max(found.seconds, 1e-9), found.tokens / found.answered
    costs = {action: Cost(round(plan.prompts * mean), None) for action, plan in PLANS.items()}
    return ServedCheck(
        endpoint=server.url,
        model=name,
        k=found.k,
        prompts=found.answered,
        refused=len(asked) - found.answered,
        unknown=UNKNOWN if prediction.runs else (*UNKNOWN, NOT_PREDICTED),
        answer_tokens=found.tokens,
        sampling=Sampling.of(answering),
        tau=(accepted.tau, *intervals.tau(groups, found.k).ends),
        per_position=accepted.per_position,
        rate=rate,
        rows=rows,
        others=found.others,
        recommendation=recommend(
            prediction, Pace(rate / accepted.tau, None), {KEEP: Cost(0, 0.0), **costs}, worth
        )
        if prediction.runs
        else None,
        runs=prediction.runs,
        outside=prediction.outside,
        published=published,
    )


def _check_counted(server: CountingServer, name: str, found: Counted) -> None:
    """Raises UserError for too few answers, and for a server that drafts nothing."""
    if found.answered < GROUPS:
        raise UserError(
            f"{server.url} answered {found.answered} of {len(found.lengths)} prompts and refused the others (first: "
            f"{server.refusal}): too few for any recommendation"
        )
    if found.whole.drafts == 0:
        raise UserError(
            f"{server.url} answered {found.answered} prompts and drafted nothing: it serves {visible(name)} without "
            "speculation; start it with --speculative-config, or check the weights with --target and --draft"
        )
