"""Typed records: everything one part of redraft hands to another, or to the user as JSON.

No torch here. A record is a frozen dataclass; `to_json` and `from_json` are the only way in and
out, and a record read back equals the one written.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from .renamed import with_today_keys
from .tokens import Tokens, plain

CLOCKED = (
    *("seconds", "evaluation_seconds", "tokens_per_second"),
    *("peak_mb", "predicted_peak_mb", "memory_mb"),
)
"""The fields of a `TrainRecord`, a checkpoint and a training's log that differ when the same work is done again."""


def to_json(record: Any) -> dict[str, Any]:
    """A dataclass record as plain JSON types."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(record), default=plain))
    return found


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the target's chat template renders it.

    `tokens` are token ids, generation prompt included; they are kept as `Tokens`, whatever sequence
    is given. `reference` is the answer that came with the row, if one did; it is used only where
    original answers are asked for. A conversation of
    several turns goes on with `later`: `history` are the messages in `tokens`, and each of `later`
    is the reply that the row had (or None), then what is asked after it (see `prompts/turns.py`). `variables`
    are those that its row gives the chat template.
    """

    id: str
    tokens: Sequence[int]
    reference: Sequence[int] | None = None
    history: tuple[dict[str, Any], ...] = ()
    later: tuple[tuple[dict[str, Any] | None, ...], ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    variables: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", Tokens(self.tokens))
        if self.reference is not None:
            object.__setattr__(self, "reference", Tokens(self.reference))

    def to_row(self) -> list[Any]:
        """As plain JSON types."""
        reference = None if self.reference is None else list(self.reference)
        row = [self.id, list(self.tokens), reference, self.history, self.later, self.tools]
        return [*row, self.variables] if self.variables else row

    @staticmethod
    def from_row(row: list[Any]) -> Prompt:
        name, tokens, reference, history, later, tools, *variables = row
        return Prompt(
            name,
            tokens,
            reference,
            tuple(history),
            tuple(tuple(turns) for turns in later),
            None if tools is None else tuple(tools),
            *variables,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with an answer, in token ids, kept as `Tokens` whatever sequence is given.

    `length` counts the answer's tokens up to and including the stop token. Tokens after it are
    the target's own continuation, kept so that the last verification step of a replay is not cut
    short; they are never trained on. `temperature` to `min_p` are how it was sampled; `seed` keys the
    noise of a sampled one (see `decoding/noise.py`), and is None where that is not known.
    """

    id: str
    prompt: Sequence[int]
    tokens: Sequence[int]
    length: int
    finish: str  # "stop" or "length"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", Tokens(self.prompt))
        object.__setattr__(self, "tokens", Tokens(self.tokens))
        object.__setattr__(self, "finish", sys.intern(self.finish))

    @property
    def answer(self) -> Sequence[int]:
        return self.tokens[: self.length]

    @property
    def whole(self) -> Tokens:
        """The prompt and the answer, without the tokens past its end."""
        return Tokens(self.prompt) + self.answer

    def to_line(self) -> str:
        row = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return json.dumps(row, separators=(",", ":"), default=plain)

    @staticmethod
    def from_line(line: str) -> Answer:
        """Raises ValueError, KeyError, TypeError or OverflowError for what is no answer."""
        return Answer(**json.loads(line))


@dataclass(frozen=True)
class StepTrace:
    """The verification steps of one prompt: how many of the K draft tokens each step accepted."""

    id: str
    accepted: tuple[int, ...]
    answer_length: int

    @property
    def steps(self) -> float:
        return len(self.accepted)

    @property
    def gained(self) -> float:
        """Accepted tokens in all."""
        return sum(self.accepted)

    def counts(self, k: int) -> list[float]:
        """How many steps accepted exactly 0, 1, ..., K tokens."""
        return [float(self.accepted.count(n)) for n in range(k + 1)]


@dataclass(frozen=True)
class ExpectedSteps:
    """The steps of one prompt in expectation over the draft's random tokens.

    `by_accepted[n]` is the expected number of steps that accept exactly n tokens, n = 0..K.
    """

    id: str
    by_accepted: tuple[float, ...]
    answer_length: int

    @property
    def steps(self) -> float:
        return sum(self.by_accepted)

    @property
    def gained(self) -> float:
        """Accepted tokens in all."""
        return sum(n * count for n, count in enumerate(self.by_accepted))

    def counts(self, k: int) -> list[float]:
        return list(self.by_accepted)


@dataclass(frozen=True)
class Acceptance:
    """How well a draft does on a set of prompts.

    tau = 1 + accepted / steps, sum over sum (vLLM's "mean acceptance length"); the prefill's own
    token belongs to no step; prompts whose answer is that token alone are `excluded`.
    `per_position[j]` is conditional: of the steps that reached position j, the share that
    accepted it. `ci` is the 95 % interval of tau over prompts (`metrics/intervals.py`). `mode` is how it was
    measured (replay, expected, live), `acceptance` the acceptance mode; `steps` and `accepted` are
    whole numbers unless `mode` is expected.
    """

    tau: float
    ci: tuple[float, float]
    accepted: float
    steps: float
    prompts: int
    excluded: int
    k: int
    temperature: float
    per_position: tuple[float, ...]
    loop_rate: float
    mode: str
    seconds: float
    tau_without_loops: float | None = None
    draft_token: str = "deterministic"  # how the draft picks a token; matters at temperature > 0
    acceptance: str = "greedy"
    provenance: dict[str, Any] = field(default_factory=dict)


def best_tau(by_step: Sequence[tuple[int, float]], best_step: int) -> float:
    """The held-out tau of the best step, -inf where nothing was evaluated."""
    return max((tau for step, tau in by_step if step == best_step), default=float("-inf"))


@dataclass(frozen=True)
class TrainRecord:
    """What a training run did. Tokens are counted, not estimated.

    `way` are (share, held-out tau, tau on general prompts) of a guard (see `training/guard.py`), which kept `share` of
    the way from the unadapted draft to the best step. `general_tau` is of older runs, whose guard looked at every step.
    """

    method: str
    trained_parameters: int
    draft_parameters: int
    steps: int
    planned_steps: int
    supervised_tokens: int
    unique_answer_tokens: int
    final_loss: float
    heldout_tau: tuple[tuple[int, float], ...]  # (step, tau)
    best_step: int
    seconds: float
    tokens_per_second: float
    precision: str
    predicted_peak_mb: float
    peak_mb: float
    stopped_early: bool
    trained_together: int = 1  # adapters trained on the same stream; their peak is common
    miss_rate: tuple[float, float] | None = None  # answers outside the draft vocabulary, remapped
    target_flops: float = (
        0.0  # counted on short rows, times the tokens read; not in kernels of bitsandbytes
    )
    draft_flops: float = 0.0
    general_tau: tuple[tuple[int, float], ...] = ()
    share: float = 1.0
    way: tuple[tuple[float, float, float], ...] = ()

    def best_tau(self) -> float:
        """The held-out tau of what was kept."""
        for share, tau, _ in self.way:
            if share == self.share:
                return tau
        return best_tau(self.heldout_tau, self.best_step)

    def lasting(self) -> dict[str, Any]:
        """As plain JSON types without what clock and memory say: the same for the same work."""
        return {key: value for key, value in to_json(self).items() if key not in CLOCKED}


@dataclass(frozen=True)
class Throughput:
    """Tokens per second over whole answers: ratio of totals, with the range over repeats."""

    name: str
    tokens_per_second: float
    low: float
    high: float
    repeats: int
    prompts: int
    tokens: int


@dataclass(frozen=True)
class StepCost:
    """What the parts of a step cost here, in seconds (medians) and in target steps.

    `target` is a plain step of one token per row, `draft` one step of the draft, `verify[j]` the
    target's pass over j + 1 tokens. c = draft / target, v(K) = verify[K] / target.
    """

    target: float
    draft: float
    verify: tuple[float, ...]
    rows: int
    context: int
    repeats: int

    @property
    def c(self) -> float:
        return self.draft / self.target

    def v(self, k: int) -> float:
        return self.verify[k] / self.target


@dataclass(frozen=True)
class KChoice:
    """The number of drafted tokens with the largest predicted speed-up, tau / (K c + v).

    `speedups[j]` is predicted for K = j + 1 from `per_position` (see `Acceptance`), measured on
    `steps` steps.
    """

    k: int
    speedups: tuple[float, ...]
    per_position: tuple[float, ...]
    steps: int
    cost: StepCost

    def explain(self) -> str:
        rates = " ".join(f"{rate:.2f}" for rate in self.per_position)
        predicted = ", ".join(f"{k} {s:.2f}x" for k, s in enumerate(self.speedups, 1))
        slower = "" if max(self.speedups) > 1 else "; plain decoding is faster here"
        return (
            f"K = {self.k}: a draft step costs c = {self.cost.c:.2f} of a target step, reading "
            f"{self.k + 1} tokens v = {self.cost.v(self.k):.2f} (medians of {self.cost.repeats}, "
            f"{self.cost.rows} at a time); accepted at position 1..{len(self.per_position)}: {rates} "
            f"({self.steps} steps); predicted speed-up by K: {predicted}{slower}"
        )


CHANCE = 0.01
"""A correct decoder is taken for a wrong one, by its count of near-ties, at most so often."""


@dataclass(frozen=True)
class Lossless:
    """Prompts compared, how many gave identical tokens, and how many differ at near-ties only.

    Of the answers that differ: `ties` are the near-ties among the `tokens` decoded with the draft,
    `own_ties` those among plain decoding's `own_tokens` (see `metrics/lossless.py`).
    """

    prompts: int
    identical: int
    excused: int
    ties: int = 0
    tokens: int = 0
    own_ties: int = 0
    own_tokens: int = 0
    slack: float = 0.0  # of a near-tie, as a share of the larger of the two logits

    @property
    def different(self) -> int:
        return self.prompts - self.identical - self.excused

    @property
    def holds(self) -> bool:
        return self.different == 0 and not self.unexplained

    def problem(self, what: str = "outputs") -> str:
        """Why it does not hold, as part of a sentence; empty where it does."""
        if self.different:
            return f"{self.different} of {self.prompts} {what} differ"
        if self.unexplained:
            return (
                f"{self.excused} of {self.prompts} {what} differ at near-ties, which are "
                f"{self.ties} in {self.tokens:,} tokens where plain decoding has {self.own_ties} in "
                f"{self.own_tokens:,}: more than rounding explains"
            )
        return ""

    @property
    def unexplained(self) -> bool:
        """Whether there are more near-ties with the draft than plain decoding has, beyond chance
        (one-sided, 1 %), or answers were excused without an audit."""
        if not self.excused:
            return False
        if not self.tokens or not self.own_tokens:
            return True
        from scipy.stats import binomtest

        share = self.tokens / (self.tokens + self.own_tokens)
        total = self.ties + self.own_ties
        test = binomtest(self.ties, total, share, alternative="greater")
        return total > 0 and bool(test.pvalue < CHANCE)


@dataclass(frozen=True)
class EngineAcceptance:
    """What a serving engine's own counters say of a draft.

    tau = 1 + accepted / drafts. `drafted` counts proposed tokens. `per_position` is conditional,
    as in `Acceptance`.
    """

    tau: float
    drafts: int
    drafted: int
    accepted: int
    per_position: tuple[float, ...]


@dataclass(frozen=True)
class EngineSpeed:
    """An engine's throughput under `concurrency` requests at a time, without and with the draft.

    `ratio` is with over without. `outputs` compares the answers given at this concurrency.
    """

    concurrency: int
    plain: Throughput
    drafted: Throughput
    ratio: float
    outputs: Lossless


@dataclass(frozen=True)
class Verification:
    """A draft tried in a real engine, as `redraft verify --json` prints it.

    `outputs` compares the engine with the draft to the engine without it, one request at a time;
    `against_redraft` compares the engine without a draft to redraft's own decoding. `tau` is the
    engine's count, `own` that of redraft's live loop on the same token ids, and `expected` the same steps
    as the engine counts them (None: the steps of `own`). `tau` and `expected` may differ by
    `tolerance`, a share of the latter. `engine_args` are the user's own flags, without and with the
    draft. `outtype` is how the engine stores the target's weights, where it rounds them: then `own` are redraft's steps
    on the engine's answers, with the weights so rounded. `unread` is why redraft could not load those, and counted
    with the target's own. `recorded` is the run's measurement after adapting, where a run was named. `findings` are fatal findings in the draft's files, `causes` what explains a bad
    result, `notes` what is worth knowing about a good one.
    """

    engine: str
    engine_version: str
    target: str
    draft: str
    method: str
    dtype: str
    k: int
    max_new_tokens: int
    prompts: int
    outputs: Lossless
    against_redraft: Lossless
    tau: EngineAcceptance
    own: Acceptance
    tolerance: float
    speed: tuple[EngineSpeed, ...]
    expected: EngineAcceptance | None = None
    engine_args: tuple[str, ...] = ()
    outtype: str = ""
    unread: str = ""
    recorded: Acceptance | None = None
    findings: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    good: bool = False
    conclusion: str = "open"
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def own_count(self) -> EngineAcceptance:
        """What the engine should count: redraft's steps, whole where a record of before holds no others."""
        own, steps = self.own, int(self.own.steps)
        whole = EngineAcceptance(
            own.tau, steps, self.k * steps, int(own.accepted), own.per_position
        )
        return self.expected or whole

    @staticmethod
    def from_json(row: dict[str, Any]) -> Verification:
        row = with_today_keys(row)
        for name in ("outputs", "against_redraft"):
            row[name] = Lossless(**row[name])
        row["tau"] = _engine_acceptance(row["tau"])
        row["expected"] = row.get("expected") and _engine_acceptance(row["expected"])
        row["own"] = acceptance(row["own"])
        row["recorded"] = row["recorded"] and acceptance(row["recorded"])
        row["speed"] = tuple(_engine_speed(entry) for entry in row["speed"])
        for name in ("findings", "causes", "notes", "engine_args"):
            row[name] = tuple(row.get(name, ()))
        return Verification(**row)


@dataclass(frozen=True)
class RefusalRates:
    """How often one group of prompts is refused without and with the draft (see `metrics/refusals.py`).

    Rates are shares of `prompts` times `samples` answers on each side; `difference` is drafted minus
    plain. Intervals are 95 %. `detectable` is the difference found in 80 % of runs, None where none
    could be.
    """

    group: str  # all, harmful, harmless, unlabelled
    prompts: int
    samples: int
    plain: float
    plain_ci: tuple[float, float]
    drafted: float
    drafted_ci: tuple[float, float]
    difference: float
    difference_ci: tuple[float, float]
    p_value: float
    detectable: float | None
    conclusion: str


@dataclass(frozen=True)
class Safety:
    """What the exported draft changes in the target's answers to safety prompts.

    `greedy` and `seeded` compare answers token for token; `refusals` compares sampled ones, all
    prompts first, then those flagged harmful and harmless. `temperature` and `max_new_tokens` are
    those of seeded and sampled answers, `greedy_new_tokens` of greedy ones. `good` says that nothing
    differs.
    """

    source: str
    prompts: int
    k: int
    temperature: float
    max_new_tokens: int
    greedy_new_tokens: int
    greedy: Lossless
    seeded: Lossless
    refusals: tuple[RefusalRates, ...]
    good: bool
    conclusion: str
    notes: tuple[str, ...] = ()

    @staticmethod
    def from_json(row: dict[str, Any]) -> Safety:
        row = with_today_keys(row)
        row["greedy"], row["seeded"] = Lossless(**row["greedy"]), Lossless(**row["seeded"])
        row["refusals"] = tuple(_refusal_rates(rates) for rates in row["refusals"])
        row["notes"] = tuple(row["notes"])
        return Safety(**row)


def acceptance(row: dict[str, Any]) -> Acceptance:
    """An `Acceptance` from its JSON form."""
    low, high = row["ci"]
    return Acceptance(**{**row, "ci": (low, high), "per_position": tuple(row["per_position"])})


def _refusal_rates(row: dict[str, Any]) -> RefusalRates:
    row = with_today_keys(row)
    intervals = {name: tuple(ends) for name, ends in row.items() if name.endswith("_ci")}
    return RefusalRates(**{**row, **intervals})


def _engine_acceptance(row: dict[str, Any]) -> EngineAcceptance:
    return EngineAcceptance(**{**row, "per_position": tuple(row["per_position"])})


def _engine_speed(row: dict[str, Any]) -> EngineSpeed:
    return EngineSpeed(
        row["concurrency"],
        Throughput(**row["plain"]),
        Throughput(**row["drafted"]),
        row["ratio"],
        Lossless(**row["outputs"]),
    )


def versions() -> dict[str, str]:
    """The versions that decide a result's numerics, for provenance."""
    found = {"python": platform.python_version()}
    for package in ("redraft", "torch", "transformers", "peft", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
