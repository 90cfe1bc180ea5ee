"""A check on one screen: what was measured, what it means, what it would cost, and the verdict."""

from __future__ import annotations

from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..core.visible import visible
from ..decoding.sampling import Sampling
from .check import Check
from .cost_estimate import PLANS, SETTINGS, TRAINING
from .evidence import NARROW, Evidence
from .prediction import ADAPT, KEEP, REFRESH, RETRAIN
from .recommendation import Option, Verdict
from .served import ServedCheck

NOTED = 0.05
"""A drop of tau by this share of native tau is named as a cause."""
NOISY = 0.2
"""A share of other tokens in a server's counters that is worth a word; a step counts its last tokens in
full, which alone makes some."""
LOOPING = 0.05
"""A share of answers that loop from which tau says little."""
FORETOLD = "settings of what is measured and foretold:{0}; {1.prompts:,} answers and {1.epochs:g} passes, anew {2.prompts:,}"
PREDICTED_FROM = (
    "predicted from {} known cases (ours are small models: docs/results/triage.md); train on a few hundred "
    "answers and measure before you spend more"
)
SIGN_NAMES = {
    "reused": "tau",
    "native": "tau on the base",
    "refreshed": "tau after the closed form",
    "entropy": "the target's entropy",
    "temperature": "the temperature",
}
SAYS = {
    KEEP: "keep the draft as it is",
    REFRESH: "refresh it in closed form (`redraft adapt --method relay+refresh+expert --base BASE --set train.epochs=0`, with the settings below)",
    ADAPT: "adapt it (`redraft adapt`, with the settings below)",
    RETRAIN: "train a draft of its own (`redraft adapt --method scratch`, with the settings below)",
}


def print_check(check: Check, out: Console | None = None) -> None:
    """The whole check in some twenty lines."""
    out = out or Console(highlight=False)
    e, cost = check.evidence, check.cost
    lines = [("tau", f"{_acceptance(e)}, K={check.k}, {_way(check.sampling)}")]
    lines.append(("retention", _retention(check)))
    lines += [("cause" if at == 0 else "", text) for at, text in enumerate(causes(e))]
    now, *others = (f"{speed:.2f}x {_at(name)}" for name, speed in check.speeds.items())
    lines.append(
        (
            "speed here",
            f"{now}, {', '.join(others)} (batch {cost.rows}: a draft step costs c = {cost.c:.2f} of a "
            f"plain one, reading {check.k + 1} tokens v = {cost.v(check.k):.2f})",
        )
    )
    if e.refreshed:
        r = e.refreshed
        low, high = r.difference
        lines.append(
            (
                "closed form",
                f"{r.method}, fitted in {r.seconds:.0f} s on half of the answers: tau {r.reused:.2f} -> "
                f"{r.tau:.2f} on the other {r.prompts} (rise {low:+.2f} to {high:+.2f})",
            )
        )
    for name, text in lines:
        out.print(visible(f"{name:<12} {text}"), markup=False, soft_wrap=True)
    print_verdict(check.verdict, out)
    for note in notes(check):
        out.print(f"  {note}", markup=False, soft_wrap=True)


def print_verdict(v: Verdict, out: Console) -> None:
    """The options as a table, and the verdict."""
    out.print(_table(v))
    out.print(
        "right: share of draws; tokens: to be written by the target; pays after: tokens served"
    )
    plain = (
        "plain decoding is faster than any option here: serve without a draft. Of the options "
        if v.faster_plain
        else ""
    )
    out.print(
        f"verdict      {plain}{v.action.upper()}: {SAYS[v.action]}; error probability {v.error:.2f}",
        markup=False,
        soft_wrap=True,
    )


def print_served(check: ServedCheck, out: Console | None = None) -> None:
    """What a server shows, and the verdict."""
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
        lines.append("retention    {} [{}, {}] of the figure you gave".format(*ends))
    if check.refused:
        lines.append(f"NOTE: {check.refused} more prompts were refused by the server")
    if check.others > NOISY:
        lines.append(f"NOTE: {check.others:.0%} of the counted tokens were of other requests")
    for line in lines:
        out.print(visible(line), markup=False, soft_wrap=True)
    print_verdict(check.verdict, out)
    out.print(
        f"  not known from a server: {'; '.join(check.unknown)}", markup=False, soft_wrap=True
    )
    for note in _predicted(check):
        out.print(f"  {note}", markup=False, soft_wrap=True)


def causes(e: Evidence) -> list[str]:
    """What was found to lower acceptance, the largest loss first, then what else differs."""
    found = [(1e9, f"the draft's files may be misread: {text}") for text in e.suspects]
    c, native = e.causes, e.native
    if c and native:
        words, states = native.tau - c.words, c.words - e.reused.tau
        found.append(
            (
                words,
                f"the answers moved: tau {native.tau:.2f} -> {c.words:.2f} on the target's answers as the base reads "
                f"them ({c.agreement:.0%} of their tokens are the base's most likely, KL {c.divergence:.2f} nats)",
            )
        )
        found.append(
            (
                states,
                f"the states moved: tau {c.words:.2f} -> {e.reused.tau:.2f} as the target reads them "
                + (f"(cosine {c.cosine:.2f})" if c.cosine is not None else ""),
            )
        )
        if c.embedding is not None:
            found.append(
                (
                    c.embedding - e.reused.tau,
                    f"embedding and head moved: tau {c.embedding:.2f} with the base's in their place",
                )
            )
        if c.missed > c.missed_native:
            found.append(
                (
                    (c.missed - c.missed_native) * native.tau,
                    f"the draft's reduced vocabulary misses {c.missed:.1%} of the answers' tokens "
                    f"({c.missed_native:.1%} of the base's)",
                )
            )
        noted = [(loss, text) for loss, text in found if loss >= NOTED * native.tau]
        found = sorted(noted, key=lambda each: -each[0])
    said = [text for _, text in found]
    if native and not c:
        said.append("causes were not compared: every answer uses tokens that the base lacks")
    elif native and not said:
        said.append("nothing was found that lowers acceptance by more than a twentieth")
    if c and c.left_out:
        said.append(f"{c.left_out} answers use tokens that the base lacks, and were not compared")
    if d := e.changes:
        if d.template or d.renders:
            what = (
                "the chat template is another" if d.template else "the tokenizer writes otherwise"
            )
            said.append(f"{what}: {d.renders:.0%} of the prompts come out as other tokens")
        if d.renamed:
            said.append(f"{d.renamed} tokens have another name")
        if d.added_tokens:
            said.append(f"the vocabulary grew by {d.added_tokens} tokens")
        head = "not known" if d.head is None else f"{d.head:.1%}"
        said.append(
            f"weights: the embedding moved by {d.embedding:.1%} of its norm, the head by {head} (adapters "
            "on them aside)"
        )
    return said or ["not looked for: name the target's base with --base"]


def notes(check: Check) -> list[str]:
    """What one should know before acting on the verdict."""
    e, said = check.evidence, []
    low, high = e.reused.ci
    if (high - low) / 2 > NARROW * e.reused.tau:
        said.append(
            f"tau is known to +- {(high - low) / 2:.2f} only; more prompts (--most) would narrow it"
        )
    if e.cut * 10 > e.prompts:
        said.append(
            f"{e.cut} of {e.prompts} answers were cut by --max-new-tokens: tau is that of their beginnings, and "
            "time and tokens are for answers as short"
        )
    if e.reused.loop_rate > LOOPING:
        alone = e.reused.tau_without_loops
        rest = (
            "nothing is left without them" if alone is None else f"without them tau is {alone:.2f}"
        )
        said.append(
            f"{e.reused.loop_rate:.0%} of the answers loop at their end, which any draft guesses: {rest}"
            + ("" if check.sampling.temperature else "; check as you sample (--temperature)")
        )
    if check.method != TRAINING.method:
        said.append(f"time is that of {check.method}, tau that of {TRAINING.method}")
    if e.native is None:
        said.append("without --base neither causes nor the closed form are known")
    return said + _predicted(check)


def _predicted(check: Check | ServedCheck) -> list[str]:
    """What is foretold, and what that rests on."""
    said = [FORETOLD.format(_sets(check), PLANS[ADAPT], PLANS[RETRAIN])]
    if check.verdict.action == RETRAIN:
        said.append(
            f"adapting on {PLANS[RETRAIN].prompts:,} answers was not foretold and may come near (0.95 of the way in "
            "`redraft demo`): try that first where the shared draft is to stay"
        )
    said.append(PREDICTED_FROM.format(check.cases))
    cuts = [name for name in _drawn(check.sampling) if name != "temperature"]
    if cuts:
        said.append(
            f"of sampling only the temperature is a sign: cuts ({', '.join(cuts)}) move tau towards greedy"
        )
    if check.outside:
        names = ", ".join(SIGN_NAMES[name] for name in check.outside)
        said.append(f"beyond what any of these had: {names}; the prediction is an extrapolation")
    return said


def _acceptance(e: Evidence) -> str:
    low, high = e.reused.ci
    return f"{e.reused.tau:.2f} [{low:.2f}, {high:.2f}] on {e.prompts} prompts, {e.answer_tokens:,} answer tokens"


def _way(sampling: Sampling) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in _drawn(sampling).items()) or "greedy"


def _sets(check: Check | ServedCheck) -> str:
    """The settings that adapt needs to train, sample and measure as it is foretold here."""
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
    if e.native and e.retention:
        share, low, high = e.retention
        return f"{share:.2f} [{low:.2f}, {high:.2f}] of the draft's tau on its base ({e.native.tau:.2f})"
    if check.published:
        low, high = (end / check.published for end in e.reused.ci)
        share = e.reused.tau / check.published
        return f"{share:.2f} [{low:.2f}, {high:.2f}] of the figure you gave ({check.published:.2f})"
    return "not known: name the base with --base, or the draft's published tau with --published"


def _at(name: str) -> str:
    return "now" if name == "now" else f"at recovery {name}"


def _table(verdict: Verdict) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("option", "tau [95 %]", "speed-up", "right", "time", "tokens", "pays after"):
        table.add_column(heading, no_wrap=True)
    for option in verdict.options:
        table.add_row(*_row(option))
    return table


def _row(o: Option) -> tuple[str, ...]:
    tau, low, high = o.tau
    unknown = "?" if o.bill.seconds is None else "-"
    pays = f"{o.payback_tokens:,}" if o.payback_tokens is not None else unknown
    return (
        o.action,
        f"{tau:.2f} [{low:.2f}, {high:.2f}]",
        f"{o.speedup[0]:.2f}x" if o.speedup else "?",
        f"{o.probability:.0%}",
        f"{o.bill.seconds:,.0f} s" if o.bill.seconds is not None else "?",
        f"{o.bill.tokens:,}",
        pays,
    )
