"""The rows of the race on real models: what a draft is trained on, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GREEDY, SAMPLED, MIXED = "greedy", "sampled", "mixed"
"""The target's answers to the same prompts: greedy, at temperature 0.7, or every second prompt's of each."""
MADE_UP, PEOPLE = "made-up", "people"
"""General prompts that the target makes up, and such as people asked."""
DEFAULT = "expert+fc+norms"
BODY = "body"


@dataclass(frozen=True)
class RealRow:
    """A way to get a draft for a fine-tune. `settings` are training settings, None for no training at all.

    `general` prompts, a `share` of those adapted on, are trained on as well. A `rival` trains instead of redraft,
    with its own settings.
    """

    says: str
    settings: Mapping[str, Any] | None = field(default_factory=dict)
    answers: str = MIXED
    general: str = ""
    share: float = 0.0
    rival: str = ""


def _trained(method: str, says: str, **settings: Any) -> RealRow:
    return RealRow(says, {"method": method, **settings})


ROWS: dict[str, RealRow] = {
    "unadapted": RealRow("the base's draft, unchanged", None),
    "expert": _trained(DEFAULT, "expert as wide as the shared FFN, fc and norms"),
    "greedy answers": RealRow("the same on greedy answers", {"method": DEFAULT}, GREEDY),
    "sampled answers": RealRow(
        "the same on answers at temperature 0.7", {"method": DEFAULT}, SAMPLED
    ),
    "hard labels": _trained(DEFAULT, "cross-entropy with the answer", loss="ce"),
    "lk": _trained(DEFAULT, "LK blend", loss="lk"),
    "head": _trained(DEFAULT + "+head-lora", "a rank-16 update of the head too"),
    "lora": _trained("lora", "LoRA of rank 16 on every linear layer (as NeMo)", rank=16),
    "fc": _trained("fc", "the feature interface alone (as ReFit)"),
    "full": _trained("full", "every tensor, from the base's draft"),
    "scratch": _trained("scratch", "every tensor, from nothing, on the same answers"),
    "speculators": RealRow("every tensor but the head, by speculators 0.9", rival="speculators"),
    "random expert": _trained(
        "expert+fc",
        "the paper's start: a random expert, one step deep, noisy features",
        init="random",
        rollout=1,
        feature_noise=0.2,
    ),
    "narrow": _trained(DEFAULT, "expert of a quarter of the width", width="0.25"),
    "slow": _trained(DEFAULT, "a third of the learning rate", lr=9e-4),
    "full slow": _trained("full", "every tensor, at a third of the learning rate", lr=2.3e-4),
    "body": _trained(BODY, "every tensor but the head", lr=6.9e-4),
    "body longer": _trained(BODY, "in ten passes", lr=6.9e-4, epochs=10.0),
    "body greedy": RealRow("the same on greedy answers", {"method": BODY, "lr": 6.9e-4}, GREEDY),
    "body hard labels": _trained(BODY, "cross-entropy with the answer", lr=6.9e-4, loss="ce"),
    "body muon": _trained(BODY, "the same by Muon", lr=1e-3, optimizer="muon"),
    "full muon": _trained(
        "full", "every tensor, matrices but the head by Muon", lr=1e-3, optimizer="muon"
    ),
    "expert muon": _trained(DEFAULT, "the expert by Muon", lr=1e-3, optimizer="muon"),
    "made-up 0.25": RealRow(
        "a quarter of made-up prompts as well", {"method": DEFAULT}, MIXED, MADE_UP, 0.25
    ),
    "people 0.25": RealRow(
        "a quarter of people's prompts as well", {"method": DEFAULT}, MIXED, PEOPLE, 0.25
    ),
    "people 1": RealRow(
        "as many of people's prompts as well", {"method": DEFAULT}, MIXED, PEOPLE, 1.0
    ),
}
