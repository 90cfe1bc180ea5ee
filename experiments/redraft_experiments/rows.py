"""The rows of the methods bench: adapters on matched data, and the ideas tried beyond them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ORIGINAL, REGENERATED, SAMPLED = "original", "regenerated", "sampled"
ANSWERS = (ORIGINAL, REGENERATED)
"""What a draft is trained on: the answers of the fine-tuning data, or the target's own greedy ones.
`sampled` are the target's own at temperature 0.7."""
KINDS_OF_ANSWERS = (*ANSWERS, SAMPLED)


@dataclass(frozen=True)
class Row:
    """A way to get a draft for a fine-tuned target.

    `settings` are training settings; `width` a share of the shared FFN; `matched` asks for the LoRA
    rank whose parameters come closest to an expert of that share. `tuned` rows have
    their learning rate chosen. `draft` names the draft it starts from (`eagle3`, `eagle`, or `paper`,
    the stage 1 of the paper's recipe). `pool` is `adapt` or `whole`, of which a `share` is trained on.
    """

    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    width: float | None = None
    matched: float | None = None
    draft: str = "eagle3"
    answers: tuple[str, ...] = ANSWERS
    pool: str = "adapt"
    share: float = 1.0
    tuned: bool = True


def _part(method: str, says: str, **more: Any) -> Row:
    width, matched = more.pop("width", None), more.pop("matched", None)
    return Row(says, {"method": method, **more}, width, matched)


PAPER: dict[str, Any] = {"loss": "paper", "rollout": 1, "feature_noise": 0.2}
"""How the paper trains both stages: states and distributions, one step deep, noisy features."""
NARROW, WIDE = 1 / 3, 1.0
ROWS: dict[str, Row] = {
    "unadapted": Row("the base's draft, unchanged", answers=(REGENERATED,), tuned=False),
    "weight-sync": Row(
        "copies of the base's tensors renewed",
        {"method": "weight-sync"},
        answers=(REGENERATED,),
        tuned=False,
    ),
    "feature-map": Row(
        "linear map of features in closed form", {"method": "feature-map"}, tuned=False
    ),
    "feature-map expert": Row(
        "and an expert's down projection in closed form",
        {"method": "feature-map+expert", "epochs": 0},
        1.0,
        answers=(REGENERATED,),
        tuned=False,
    ),
    "fc": _part("fc", "the feature interface"),
    "lora-16": _part("lora", "LoRA of rank 16 on every linear layer", rank=16),
    "lora-matched": _part("lora", "LoRA as large as the wide expert", matched=WIDE),
    "expert-narrow": _part("expert", "private expert, a third of the shared width", width=NARROW),
    "expert-wide": _part("expert", "private expert of the shared width", width=WIDE),
    "expert+fc": _part("expert+fc+norms", "wide expert, fc and norms", width=WIDE),
    "full": _part("full", "every tensor, warm start"),
    "scratch": _part("scratch", "every tensor, from nothing, on the same data"),
    "from-scratch": Row(
        "from nothing, on the whole pool",
        {"method": "scratch"},
        answers=(REGENERATED,),
        pool="whole",
    ),
    "eagle unadapted": Row(
        "EAGLE-1/2 draft, unchanged", draft="eagle", answers=(REGENERATED,), tuned=False
    ),
    "eagle expert+fc": Row(
        "wide expert, fc and norms", {"method": "expert+fc+norms"}, WIDE, draft="eagle"
    ),
    "eagle paper": Row(
        "the paper's recipe: random expert and fc, no rollout",
        {"method": "expert+fc", "init": "random", **PAPER},
        WIDE,
        draft="paper",
    ),
    "eagle from-scratch": Row(
        "EAGLE-1/2 from nothing, on the whole pool",
        {"method": "scratch"},
        draft="eagle",
        answers=(REGENERATED,),
        pool="whole",
    ),
}
IDEAS: dict[str, Row] = {
    "random start": _part("expert+fc+norms", "the paper's start", width=WIDE, init="random"),
    "faster expert": _part(
        "expert+fc+norms", "expert at 3 x the rate", width=WIDE, lr_parts="expert=3"
    ),
    "slower fc": _part(
        "expert+fc+norms", "fc and norms at 0.3 x", width=WIDE, lr_parts="fc=0.3,norms=0.3"
    ),
    "average": _part("expert+fc+norms", "running average of weights", width=WIDE, average=0.98),
    "tv loss": _part("expert+fc+norms", "total variation", width=WIDE, loss="tv"),
    "lk loss": _part("expert+fc+norms", "LK blend", width=WIDE, loss="lk"),
    "hard labels": _part("expert+fc+norms", "cross-entropy with the answer", width=WIDE, loss="ce"),
    "rollout 7": _part("expert+fc+norms", "seven steps of rollout", width=WIDE, rollout=7),
    "rollout 2": _part("expert+fc+norms", "two steps of rollout", width=WIDE, rollout=2),
    "feature-map start": _part("feature-map+expert+fc+norms", "after the closed form", width=WIDE),
    "with attention": _part("expert+fc+norms+attention", "attention too", width=WIDE),
    "with low-rank head": _part(
        "expert+fc+norms+head-lora", "a rank-16 update of the head", width=WIDE, rank=16
    ),
    "small with low-rank head": _part(
        "lora+head-lora+norms", "rank 8 everywhere, the head too", rank=8, lr_parts="norms=0.3"
    ),
    "small with head and hard labels": _part(
        "lora+head-lora+norms", "both of those", rank=8, lr_parts="norms=0.3", loss="ce"
    ),
    "a tenth of everything": Row(
        "the same on four fifths of the answers",
        {"method": "lora+head-lora+norms", "rank": 8, "lr_parts": "norms=0.3", "loss": "ce"},
        share=0.8,
    ),
    "feature-map and hard labels": _part(
        "feature-map+expert+fc+norms", "closed-form start, hard labels", width=WIDE, loss="ce"
    ),
    "all of these": _part(
        "feature-map+expert+fc+norms+head-lora", "hard labels too", width=WIDE, rank=16, loss="ce"
    ),
    "all of these for longer": _part(
        "feature-map+expert+fc+norms+head-lora",
        "12 passes",
        width=WIDE,
        rank=16,
        loss="ce",
        epochs=12.0,
    ),
    "full with hard labels": _part("full", "every tensor, warm start", loss="ce"),
    "with head": _part("expert+fc+norms+head", "the output head too", width=WIDE),
    "lora+fc": _part("lora+fc+norms", "LoRA 16, fc and norms", rank=16),
    "lora-8": _part("lora", "LoRA of rank 8", rank=8),
    "lora-32": _part("lora", "LoRA of rank 32", rank=32),
    "attention": _part("attention+norms", "attention and norms alone"),
    "three times longer": _part("expert+fc+norms", "12 passes", width=WIDE, epochs=12.0),
    "all but head for longer": _part("fc+norms+attention+ffn", "12 passes", epochs=12.0),
    "all but head": _part("fc+norms+attention+ffn", "everything but the head"),
}
for _name, _row in list(IDEAS.items()):
    IDEAS[_name] = dataclasses.replace(_row, answers=(REGENERATED,))
IDEAS["answers at 0.7"] = Row(
    "expert+fc+norms on answers sampled at 0.7",
    {"method": "expert+fc+norms"},
    WIDE,
    answers=(SAMPLED,),
)
REFERENCES = {
    "eagle3": ("unadapted", "from-scratch"),
    "eagle": ("eagle unadapted", "eagle from-scratch"),
}
"""What 0 and 1 of recovery are, by kind of draft."""
ALL = {**ROWS, **IDEAS}
TUNED_LIKE = {
    "all but head for longer": "all but head",
    "small with low-rank head": "lora-8",
    "small with head and hard labels": "lora-8",
    "a tenth of everything": "lora-8",
    "full with hard labels": "full",
    "from-scratch": "scratch",
    "eagle from-scratch": "scratch",
    "eagle expert+fc": "expert+fc",
}
"""Rows that take another row's tuned learning rate; ideas with an expert take that of `expert+fc`."""
