"""The rows of the race on real models: what a draft is trained on, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MORE = 3.5
"""The most prompts adapted on, by those of other rows."""
GREEDY, SAMPLED, MIXED = "greedy", "sampled", "mixed"
"""The target's answers to the same prompts: greedy, at temperature 0.7, or every second prompt's of each."""
MADE_UP, PEOPLE = "made-up", "people"
"""General prompts that the target makes up, and such as people asked."""
EXPERT = "expert+fc+norms"
BODY = "body"
TOY_RATE, SLOW_RATE, WHOLE_RATE = 2.8e-3, 9e-4, 6.9e-4
"""Learning rates: 1.6 / hidden size, the automatic one of adapters until this race, chosen on the toy suite; a third of
it, today's; and 0.4 / hidden size, that of the body and of whole drafts."""


@dataclass(frozen=True)
class RealRow:
    """A way to get a draft for a fine-tune. `settings` are training settings, None for no training at all.

    `part` is the number of prompts adapted on, by that of other rows. `general` prompts, a `share` of those
    adapted on, are trained on as well. A `rival` trains instead of redraft,
    with its own settings. With `on_the_way` drafts between the unadapted and the trained one are measured too.
    """

    says: str
    settings: Mapping[str, Any] | None = field(default_factory=dict)
    answers: str = MIXED
    general: str = ""
    share: float = 0.0
    part: float = 1.0
    rival: str = ""
    on_the_way: bool = True


def _trained(method: str, says: str, part: float = 1.0, **settings: Any) -> RealRow:
    return RealRow(says, {"method": method, **settings}, part=part)


ROWS: dict[str, RealRow] = {
    "unadapted": RealRow("the base's draft, unchanged", None),
    "expert": _trained(EXPERT, "expert as wide as the shared FFN, fc and norms", lr=TOY_RATE),
    "greedy answers": RealRow(
        "the same on greedy answers", {"method": EXPERT, "lr": TOY_RATE}, GREEDY
    ),
    "sampled answers": RealRow(
        "the same on answers at temperature 0.7", {"method": EXPERT, "lr": TOY_RATE}, SAMPLED
    ),
    "hard labels": _trained(EXPERT, "cross-entropy with the answer", loss="ce", lr=TOY_RATE),
    "lk": _trained(EXPERT, "LK blend", loss="lk", lr=TOY_RATE),
    "head": _trained(EXPERT + "+head-lora", "a rank-16 update of the head too", lr=TOY_RATE),
    "lora": _trained(
        "lora", "LoRA of rank 16 on every linear layer (as NeMo)", rank=16, lr=TOY_RATE
    ),
    "fc": _trained("fc", "the feature interface alone (as ReFit)", lr=TOY_RATE),
    "full": _trained("full", "every tensor, from the base's draft", lr=WHOLE_RATE),
    "scratch": _trained(
        "scratch", "every tensor, from nothing, on the same answers", lr=WHOLE_RATE
    ),
    "scratch more": _trained(
        "scratch", "from nothing, on 3.5 times the answers", MORE, lr=WHOLE_RATE
    ),
    "scratch longer": _trained(
        "scratch", "the same in sixteen passes", MORE, lr=WHOLE_RATE, epochs=16.0
    ),
    "speculators": RealRow("every tensor but the head, by speculators 0.9", rival="speculators"),
    "speculators short": RealRow("the same in one pass", {"epochs": 1.0}, rival="speculators"),
    "random expert": _trained(
        "expert+fc",
        "the paper's start: a random expert, one step deep, noisy features",
        init="random",
        rollout=1,
        feature_noise=0.2,
        lr=TOY_RATE,
    ),
    "narrow": _trained(EXPERT, "expert of a quarter of the width", width="0.25", lr=TOY_RATE),
    "slow": _trained(EXPERT, "a third of the learning rate", lr=SLOW_RATE),
    "full slow": _trained("full", "every tensor, at a third of the learning rate", lr=2.3e-4),
    "body": _trained(BODY, "every tensor but the head", lr=WHOLE_RATE),
    "body eighth": _trained(BODY, "on an eighth of the answers", 0.125, lr=WHOLE_RATE),
    "body quarter": _trained(BODY, "on a quarter of the answers", 0.25, lr=WHOLE_RATE),
    "body more": _trained(BODY, "on 3.5 times the answers", MORE, lr=WHOLE_RATE),
    "body longer": _trained(BODY, "in ten passes", lr=WHOLE_RATE, epochs=10.0),
    "body greedy": RealRow(
        "the same on greedy answers", {"method": BODY, "lr": WHOLE_RATE}, GREEDY
    ),
    "body hard labels": _trained(BODY, "cross-entropy with the answer", lr=WHOLE_RATE, loss="ce"),
    "body muon": _trained(BODY, "the same by Muon", lr=1e-3, optimizer="muon"),
    "full muon": _trained(
        "full", "every tensor, matrices but the head by Muon", lr=1e-3, optimizer="muon"
    ),
    "expert muon": _trained(EXPERT, "the expert by Muon", lr=1e-3, optimizer="muon"),
    "made-up 0.25": RealRow(
        "a quarter of made-up prompts as well",
        {"method": EXPERT, "lr": TOY_RATE},
        MIXED,
        MADE_UP,
        0.25,
    ),
    "people 0.25": RealRow(
        "a quarter of people's prompts as well",
        {"method": EXPERT, "lr": TOY_RATE},
        MIXED,
        PEOPLE,
        0.25,
    ),
    "people 1": RealRow(
        "as many of people's prompts as well",
        {"method": EXPERT, "lr": TOY_RATE},
        MIXED,
        PEOPLE,
        1.0,
    ),
}


def _two_passes(says: str, **settings: Any) -> RealRow:
    train = {"method": BODY, "lr": WHOLE_RATE, "epochs": 2.0, **settings}
    return RealRow(says, train, on_the_way=False)


LOSS_ROWS: dict[str, RealRow] = {
    "unadapted": ROWS["unadapted"],
    "kl": _two_passes("KL, four steps deep: the default"),
    "hard labels": _two_passes("cross-entropy with the answer, four steps deep", loss="ce"),
    "lk": _two_passes("LK blend, four steps deep", loss="lk"),
    "kl one step": _two_passes("KL, one step deep", rollout=1),
    "kl three steps": _two_passes("KL, three steps deep", rollout=3),
    "hard labels one step": _two_passes(
        "cross-entropy with the answer, one step deep (as SpecForge)", loss="ce", rollout=1
    ),
    "hard labels decay": _two_passes(
        "cross-entropy with the answer, three steps weighted 1, 0.6, 0.36 (as FastMTP)",
        loss="ce",
        rollout=3,
        step_decay=0.6,
    ),
}
"""The rows of MTP heads: which loss, and how deep."""
