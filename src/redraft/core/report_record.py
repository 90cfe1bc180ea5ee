"""The record of one adaptation: what report.json holds, and the terminal and the page show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .records import Acceptance, Safety, TrainRecord, acceptance
from .renamed import with_today_keys


@dataclass(frozen=True)
class Change:
    """Tau after minus tau before on the same answers, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ShownAnswer:
    """A measured answer, with the steps that decoding takes with the draft before and after.

    `rule` names the rule that chose it. `tokens` are the texts of its first tokens, `length` counts
    all its tokens. `before` and `after` are the accepted draft tokens of each step (see `StepTrace`).
    """

    id: str
    rule: str
    length: int
    tokens: tuple[str, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @staticmethod
    def from_json(row: dict[str, Any]) -> ShownAnswer:
        lists = {name: tuple(row[name]) for name in ("tokens", "before", "after")}
        return ShownAnswer(**{**row, **lists})


@dataclass(frozen=True)
class Start:
    """Which of two drafts training began with: the named one, or that of the model's version before, `previous`.

    `draft_tau` and `previous_tau` are theirs on held-out answers to `prompts` prompts.
    """

    draft: str
    previous: str
    draft_tau: float
    previous_tau: float
    prompts: int

    @property
    def chosen(self) -> str:
        """The one that is accepted more often; the named one where both are accepted alike."""
        return self.previous if self.previous_tau > self.draft_tau else self.draft

    def in_words(self) -> str:
        return (
            f"training began with {self.chosen}: held-out tau {self.draft_tau:.2f} with {self.draft}, {self.previous_tau:.2f} with "
            f"{self.previous}, {self.prompts} prompts"
        )


@dataclass(frozen=True)
class AdaptReport:
    """One adaptation, as report.json holds it and the terminal and HTML report show it.

    `cost` counts what was paid: unique target-generated tokens (answers discarded by the selection
    included), training tokens, seconds per stage. `changes` are keyed like the files in measure/: eval,
    off-NAME. They and `shown` are empty in a run whose measuring kept no steps.
    """

    target: str
    shared: str
    adapter: str
    draft: str
    prompts: dict[str, Any]
    before: Acceptance
    after: Acceptance
    off_domain: dict[str, Acceptance]
    train: TrainRecord
    cost: dict[str, Any]
    config: dict[str, Any]
    origins: dict[str, str]
    versions: dict[str, str]
    safety: Safety | None = None  # where safety prompts were named
    changes: dict[str, Change] = field(default_factory=dict)
    shown: tuple[ShownAnswer, ...] = ()
    start: Start | None = None  # where a draft of the version before was named

    @staticmethod
    def from_json(row: dict[str, Any]) -> AdaptReport:
        row = with_today_keys(row)
        row["safety"] = Safety.from_json(row["safety"]) if row.get("safety") else None
        row["before"], row["after"] = acceptance(row["before"]), acceptance(row["after"])
        row["off_domain"] = {k: acceptance(v) for k, v in row["off_domain"].items()}
        row["train"] = TrainRecord(**with_today_keys(row["train"]))
        row["changes"] = {name: Change(**ends) for name, ends in row.get("changes", {}).items()}
        row["shown"] = tuple(ShownAnswer.from_json(each) for each in row.get("shown", ()))
        row["start"] = Start(**row["start"]) if row.get("start") else None
        return AdaptReport(**row)
