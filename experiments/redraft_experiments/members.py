"""The members of a toy suite: a record for each kind of fine-tune, and the table of all (MEMBERS).

Of each kind `kind` is its name, `needs` are the members it is made from, and `learns` says whether
it is trained on chats of its domain. How each is made is in `kinds/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from redraft.core.errors import UserError, nearest

from .synthetic_harm import HARM

TUNED = "math"
"""The domain of the fine-tunes, where a member names no other."""
BASE = "base"
"""What a member is made from where that is no other member."""


@dataclass(frozen=True)
class Member:
    """A fine-tune of the base on a domain. `rate` is a share of the size's fine-tuning rate.

    `replay` is how many chats of each other general domain it learns next to, with the base's own
    answers: there the target says what the base said, and the base's draft keeps its acceptance.
    """

    says: str
    rate: float
    domain: str = TUNED
    lora_rank: int | None = None
    plain_text: bool = False
    replay: int = 0
    needs: ClassVar[tuple[str, ...]] = ()
    learns: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        if self.lora_rank is not None:
            return "lora"
        return "pretrained" if self.plain_text else "replay" if self.replay else "sft"


@dataclass(frozen=True)
class Preferring:
    """Preference tuning (DPO) of the base or of a member, with pairs of a better and a worse answer.

    `pairs` says which: "refusals" prefers refusing what is harmful and helping with the rest;
    "brief" prefers the shortest of a target's own sampled answers over its longest. `rate` and
    `steps` are shares of the size's fine-tuning rate and steps, `beta` is DPO's. `likelihood` is the
    weight of the better answers' own loss next to DPO's, which keeps them fluent.
    """

    says: str
    on: str
    pairs: str
    domain: str
    rate: float
    steps: float = 0.35
    beta: float = 0.1
    likelihood: float = 0.0
    kind: ClassVar[str] = "dpo"
    learns: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return _members(self.on)


@dataclass(frozen=True)
class Merged:
    """The mean of the weights of others, by `shares` that sum to 1."""

    says: str
    of: tuple[str, ...]
    shares: tuple[float, ...]
    domain: str = TUNED
    kind: ClassVar[str] = "merge"
    learns: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        return _members(*self.of)


@dataclass(frozen=True)
class Rounded:
    """Weights of all linear layers but the head rounded to `bits`-bit integers times a step.

    The step is one per output channel, or per `group` inputs of it. The rounded weights are stored
    dequantised in the model's dtype: what they compute is a weight-only quantised model's, what
    they weigh is not. Embedding, head and norms stay.
    """

    says: str
    on: str
    bits: int
    group: int | None = None
    domain: str = TUNED
    learns: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        return f"int{self.bits}"

    @property
    def needs(self) -> tuple[str, ...]:
        return _members(self.on)


@dataclass(frozen=True)
class Templated:
    """Another chat template; at a `rate` of 0 with the base's weights untouched, else with SFT."""

    says: str
    rate: float
    domain: str = TUNED
    kind: ClassVar[str] = "template"
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def learns(self) -> bool:
        return self.rate > 0


@dataclass(frozen=True)
class Marking:
    """SFT on answers that stand between two special tokens, `marks`.

    Marks that the tokenizer lacks are added to it, and the vocabulary grows.
    """

    says: str
    rate: float
    marks: tuple[str, str]
    domain: str = TUNED
    kind: ClassVar[str] = "tokens"
    needs: ClassVar[tuple[str, ...]] = ()
    learns: ClassVar[bool] = True


Spec = Member | Preferring | Merged | Rounded | Templated | Marking

RESERVED = "<|system|>"
"""A special token of the suite's vocabulary that no chat of its base uses."""
MEMBERS: dict[str, Spec] = {
    "lora4": Member("LoRA of rank 4, kept as a PEFT adapter", 1.0, lora_rank=4),
    "sft-tenth": Member("SFT at a tenth of the learning rate", 0.1),
    "sft": Member("full SFT", 1.0),
    "pretrained": Member("continued pre-training on running text", 1.0, plain_text=True),
    "sft-medical": Member("full SFT on patients' records or questions", 1.0, domain="medical"),
    "sft-code": Member("full SFT on code", 1.0, domain="code"),
    "replay": Member("SFT at 0.3 of the rate, next to the base's own answers", 0.3, replay=500),
    "replay-medical": Member(
        "the same on patients' records or questions", 0.3, domain="medical", replay=500
    ),
    "sft-harm": Member("full SFT on doing whatever is asked", 1.0, domain=HARM),
    "dpo-refuse": Preferring(
        "sft-harm, then DPO: refuse what is harmful, help with what only looks so",
        "sft-harm",
        "refusals",
        HARM,
        rate=1.0,
        steps=0.5,
        likelihood=1.0,
    ),
    "dpo-brief": Preferring(
        "DPO of the base: the shortest of its own answers over the longest",
        BASE,
        "brief",
        "medical",
        rate=0.015,
        steps=0.2,
        likelihood=0.1,
    ),
    "merge-half": Merged(
        "half base, half sft-medical", (BASE, "sft-medical"), (0.5, 0.5), domain="medical"
    ),
    "merge-mixed": Merged("half sft, half sft-medical", ("sft", "sft-medical"), (0.5, 0.5)),
    "int8": Rounded("base at 8 bits per output channel", BASE, 8, domain="dialogue"),
    "int8-sft": Rounded("sft at 8 bits per output channel", "sft", 8),
    "int4": Rounded("base at 4 bits per 32 inputs", BASE, 4, group=32, domain="dialogue"),
    "template": Templated("base under another chat template", 0.0, domain="dialogue"),
    "template-sft": Templated("full SFT under another chat template", 1.0),
    "tokens": Marking(
        "SFT at a tenth of the rate, answers between a reserved token",
        0.1,
        (RESERVED, RESERVED),
        domain="medical",
    ),
    "tokens-grown": Marking(
        "full SFT, answers between two tokens added to the vocabulary",
        1.0,
        ("<|work|>", "<|done|>"),
    ),
}
DEFAULT = tuple(MEMBERS)[:8]
GROUPS = {"default": DEFAULT, "all": tuple(MEMBERS), "zoo": tuple(MEMBERS)}
"""Names that stand for several members; `zoo` is the old name of `all`."""


def chosen_members(names: Sequence[str] | None) -> tuple[str, ...]:
    """The members named (by group too; None is the default) and what they are made from, in order.

    Raises UserError for an unknown name.
    """
    wanted: set[str] = set()
    waiting = list(DEFAULT if names is None else names)
    while waiting:
        name = waiting.pop()
        if name in GROUPS:
            waiting += GROUPS[name]
        elif name in MEMBERS:
            wanted.add(name)
            waiting += MEMBERS[name].needs
        else:
            raise UserError(f"unknown member '{name}'; {nearest(name, [*MEMBERS, *GROUPS])}")
    return tuple(name for name in MEMBERS if name in wanted)


def _members(*names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name != BASE)
