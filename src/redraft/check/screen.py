"""A check on one screen: what was measured, its causes, what adapting would cost, and the recommendation."""

from __future__ import annotations

import math
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..core.visible import visible
from ..decoding.sampling import Sampling
from .base_check import Changes
from .calibration_runs import ADAPT, CLOSED_FORM, KEEP, SCRATCH
from .check import Check
from .cost_estimate import PLANS, SETTINGS, TRAINING
from .evidence import CLOSED_FORM_METHOD, NARROW, Evidence
from .recommendation import Option, Recommendation
from .served import ServedCheck
from .trial import MORE, Trial

NOTED = 0.05
"""A drop of tau by this share of tau on the base is named as a cause."""
NOISY = 0.2
"""A share of other tokens in a server's counters that is worth a word; a step counts its last tokens in
full, which alone makes some."""
LOOPING = 0.05
"""A share of answers that loop from which tau says little."""
SETTINGS_NOTE = (
    "settings of what is measured and predicted:{0}; {1.prompts:,} answers and {1.epochs:g} passes, from scratch "
    "{2.prompts:,}"
)
PREDICTED_FROM = "adapting and training from scratch are predicted from {} calibration runs (docs/results/triage.md)"
FROM_TRIAL = (
    "adapt is by {} and 240 answers: the trial's rise and {:g} to {:g} more, as `body` brought greedily on fine-tunes of "
    "SmolLM2-135M; from scratch is not predicted, for the calibration runs have smaller targets (docs/check.md)"
)
PREDICTOR_NAMES = {
    "unadapted": "tau",
    "closed_form": "tau after the closed form",
    "entropy": "the target's entropy",
    "temperature": "the temperature",
}
ADVICE = {
    KEEP: "keep the draft unchanged",
    CLOSED_FORM: f"fit it in closed form (`redraft adapt --method {CLOSED_FORM_METHOD} --base BASE --set train.epochs=0`, with the settings below)",
    ADAPT: "adapt it (`redraft adapt`)",
    SCRATCH: "train a draft from scratch (`redraft adapt --method scratch`, with the settings below)",
}


def print_check(check: Check, out: Console | None = None) -> None:
    """The whole check in some twenty lines."""
    out = out or Console(highlight=False)
    e, cost = check.evidence, check.step_cost
    lines = [("tau", f"{_acceptance(e)}, K={check.k}, {_way(check.sampling)}")]
    lines.append(("retention", _retention(check)))
    lines += [("cause" if at == 0 else "", text) for at, text in enumerate(causes(e))]
    speeds = ", ".join(f"{speed:.2f}x {_at(name)}" for name, speed in check.speeds.items())
    lines.append(
        (
            "speed here",
            f"{speeds} (batch {cost.rows}: a draft step costs c = {cost.c:.2f} of a "
            f"plain one, reading {check.k + 1} tokens v = {cost.v(check.k):.2f})",
        )
    )
    if e.closed_form:
        lines.append(("closed form", _tried(e.closed_form)))
    lines.append(("trial", _tried(check.trial)))
    for name, text in lines:
        out.print(visible(f"{name:<12} {text}"), markup=False, soft_wrap=True)
    print_recommendation(check.recommendation, out)
    for note in notes(check):
        out.print(f"  {note}", markup=False, soft_wrap=True)


def print_recommendation(v: Recommendation, out: Console) -> None:
    """The options as a table, and the recommendation."""
    out.print(_table(v))
    out.print("right: share of draws; tokens: written by the target; pays after: tokens served")
    plain = (
        "plain decoding is faster than any option here: serve without a draft. Of the options "
        if v.faster_plain
        else ""
    )
    out.print(
        f"recommended  {plain}{v.action.upper()}: {ADVICE[v.action]}; error probability {v.error:.2f}",
        markup=False,
        soft_wrap=True,
    )


def print_served(check: ServedCheck, out: Console | None = None) -> None:
    """What a server shows, and the recommendation."""
    out = out or Console(highlight=False)
    tau, low, high = check.tau
    rates = " ".join(f"{rate:.2f}" for rate in check.per_position)
    lines = [
        f"{check.endpoint} serves {check.model} with {check.k} drafted tokens per step",
        f"tau          {tau:.2f} [{low:.2f}, {high:.2f}] on {check.prompts} prompts, {check.answer_tokens:,} answer tokens, {_way(check.sampling)}",
        f"accepted     {rates} at position 1..{check.k}, of the steps that got there",
        f"speed here   {check.rate:,.0f} tokens/s with {check.rows} requests at a time",
    ]
    if check.published:
        ends = (f"{end / check.published:.2f}" for end in check.tau)
        lines.append("retention    {} [{}, {}] of the published figure".format(*ends))
    if check.refused:
        lines.append(f"NOTE: {check.refused} more prompts were refused by the server")
    if check.others > NOISY:
        lines.append(f"NOTE: {check.others:.0%} of the counted tokens were of other requests")
    for line in lines:
        out.print(visible(line), markup=False, soft_wrap=True)
    if check.recommendation:
        print_recommendation(check.recommendation, out)
        for note in _predicted(check, check.recommendation):
            out.print(f"  {note}", markup=False, soft_wrap=True)
    out.print(
        f"  not known from a server: {'; '.join(check.unknown)}", markup=False, soft_wrap=True
    )


def causes(e: Evidence) -> list[str]:
    """What was found to lower acceptance, the largest loss first, then what else differs."""
    found = [(math.inf, f"config diagnosis: {text}") for text in e.diagnosis] + _losses(e)
    lines = [text for _, text in sorted(found, key=lambda each: -each[0])]
    if e.on_base and not e.causes:
        lines.append("causes were not compared: every answer uses tokens that the base lacks")
    elif e.on_base and not lines:
        lines.append("nothing was found that lowers acceptance by more than a twentieth")
    if e.causes and e.causes.left_out:
        lines.append(
            f"{e.causes.left_out} answers use tokens that the base lacks, and were not compared"
        )
    if e.changes:
        lines += _changes(e.changes)
    return lines or ["not looked for: name the target's base with --base"]


def _losses(e: Evidence) -> list[tuple[float, str]]:
    """Losses of tau that are large enough to be named."""
    c, on_base, tau = e.causes, e.on_base, e.unadapted.tau
    if c is None or on_base is None:
        return []
    cosine = f" (cosine {c.cosine:.2f})" if c.cosine is not None else ""
    found = [
        (
            on_base.tau - c.base_states,
            f"output shift: tau {on_base.tau:.2f} -> {c.base_states:.2f} on the target's answers as the base reads "
            f"them ({c.agreement:.0%} of their tokens are the base's most likely, KL {c.divergence:.2f} nats)",
        ),
        (
            c.base_states - tau,
            f"representation shift: tau {c.base_states:.2f} -> {tau:.2f} as the target reads them{cosine}",
        ),
        (
            (c.missed - c.missed_on_base) * on_base.tau,
            f"the draft's reduced vocabulary misses {c.missed:.1%} of the answers' tokens "
            f"({c.missed_on_base:.1%} of the base's)",
        ),
    ]
    if c.base_embedding is not None:
        found.append(
            (
                c.base_embedding - tau,
                f"embedding and head changed: tau {c.base_embedding:.2f} with the base's in their place",
            )
        )
    return [(loss, text) for loss, text in found if loss >= NOTED * on_base.tau]


def _changes(d: Changes) -> list[str]:
    """What the files show."""
    lines = []
    if d.template or d.renders:
        what = "the chat template differs" if d.template else "the tokenizer writes otherwise"
        lines.append(f"{what}: {d.renders:.0%} of the prompts come out as other tokens")
    if d.renamed:
        lines.append(f"{d.renamed} tokens have another name")
    if d.added_tokens:
        lines.append(f"the vocabulary grew by {d.added_tokens} tokens")
    head = "not known" if d.head is None else f"{d.head:.1%}"
    lines.append(
        f"weights: the embedding changed by {d.embedding:.1%} of its norm, the head by {head} (adapters on them aside)"
    )
    return lines


def notes(check: Check) -> list[str]:
    """What one should know before acting on the recommendation."""
    e, lines = check.evidence, []
    low, high = e.unadapted.ci
    if (high - low) / 2 > NARROW * e.unadapted.tau:
        lines.append(
            f"tau is known to +- {(high - low) / 2:.2f} only; more prompts (--most) would narrow it"
        )
    if e.cut * 10 > e.prompts:
        lines.append(
            f"{e.cut} of {e.prompts} answers were cut by --max-new-tokens: tau is that of their beginnings, and "
            "time and tokens are for answers as short"
        )
    if e.unadapted.loop_rate > LOOPING:
        alone = e.unadapted.tau_without_loops
        rest = (
            "nothing is left without them" if alone is None else f"without them tau is {alone:.2f}"
        )
        lines.append(
            f"{e.unadapted.loop_rate:.0%} of the answers loop at their end, which any draft guesses: {rest}"
            + ("" if check.sampling.temperature else "; check as you sample (--temperature)")
        )
    if e.on_base is None:
        lines.append("without --base neither causes nor the closed form are known")
    if check.runs:
        if check.trial.method != TRAINING.method:
            lines.append(f"time is that of {check.trial.method}, tau that of {TRAINING.method}")
        return lines + _predicted(check, check.recommendation)
    if e.closed_form:
        lines.append(f"settings of the closed form:{_sets(check)}")
    return [*lines, FROM_TRIAL.format(check.trial.method, *MORE)]


def _tried(trial: Trial) -> str:
    low, high = trial.difference
    return (
        f"{trial.method}, on {trial.answers} answers in {trial.seconds:.0f} s: tau {trial.unadapted:.2f} -> "
        f"{trial.tau:.2f} on {trial.prompts} others (rise {low:+.2f} to {high:+.2f})"
    )


def _predicted(check: Check | ServedCheck, recommendation: Recommendation) -> list[str]:
    """What is predicted, and from what."""
    lines = [SETTINGS_NOTE.format(_sets(check), PLANS[ADAPT], PLANS[SCRATCH])]
    if recommendation.action == SCRATCH:
        lines.append(
            f"adapting on {PLANS[SCRATCH].prompts:,} answers was not predicted and may come near (0.86 of the way in "
            "`redraft demo`): try that first where the shared draft is to stay"
        )
    lines.append(PREDICTED_FROM.format(check.runs))
    cuts = [name for name in _drawn(check.sampling) if name != "temperature"]
    if cuts:
        lines.append(
            f"of sampling only the temperature is a predictor: cuts ({', '.join(cuts)}) shift tau towards greedy"
        )
    if check.outside:
        names = ", ".join(PREDICTOR_NAMES[name] for name in check.outside)
        lines.append(f"beyond what any of these had: {names}; the prediction is an extrapolation")
    return lines


def _acceptance(e: Evidence) -> str:
    low, high = e.unadapted.ci
    return f"{e.unadapted.tau:.2f} [{low:.2f}, {high:.2f}] on {e.prompts} prompts, {e.answer_tokens:,} answer tokens"


def _way(sampling: Sampling) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in _drawn(sampling).items()) or "greedy"


def _sets(check: Check | ServedCheck) -> str:
    """The settings that adapt needs to train, sample and measure like the prediction here."""
    found: dict[str, object] = dict(SETTINGS)
    if drawn := _drawn(check.sampling):
        found |= {f"regenerate.{name}": value for name, value in drawn.items()}
        found["measure.temperature"] = check.sampling.temperature
    return "".join(f" --set {key}={value}" for key, value in found.items())


def _drawn(sampling: Sampling) -> dict[str, float]:
    """The settings of sampling that are not the default; none where decoding is greedy."""
    plain = Sampling()
    drawn = {
        name: value for name, value in asdict(sampling).items() if value != getattr(plain, name)
    }
    return drawn if sampling.temperature else {}


def _retention(check: Check) -> str:
    e = check.evidence
    if e.on_base and e.retention:
        share, low, high = e.retention
        return f"{share:.2f} [{low:.2f}, {high:.2f}] of the draft's tau on its base ({e.on_base.tau:.2f})"
    if check.published:
        low, high = (end / check.published for end in e.unadapted.ci)
        share = e.unadapted.tau / check.published
        return (
            f"{share:.2f} [{low:.2f}, {high:.2f}] of the published figure ({check.published:.2f})"
        )
    return "not known: name the base with --base, or the draft's published tau with --published"


def _at(name: str) -> str:
    return "now" if name == "now" else f"at recovery {name}"


def _table(recommendation: Recommendation) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("option", "tau [95 %]", "speed-up", "right", "time", "tokens", "pays after"):
        table.add_column(heading, no_wrap=True)
    for option in recommendation.options:
        table.add_row(*_row(option))
    return table


def _row(o: Option) -> tuple[str, ...]:
    tau, low, high = o.tau
    unknown = "?" if o.cost.seconds is None else "-"
    pays = f"{o.payback_tokens:,}" if o.payback_tokens is not None else unknown
    return (
        o.action,
        f"{tau:.2f} [{low:.2f}, {high:.2f}]",
        f"{o.speedup[0]:.2f}x" if o.speedup else "?",
        f"{o.probability:.0%}",
        f"{o.cost.seconds:,.0f} s" if o.cost.seconds is not None else "?",
        f"{o.cost.tokens:,}",
        pays,
    )
