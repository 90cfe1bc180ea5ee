"""The private parts redraft can train, one row each, and how they are combined: `expert+fc+norms`.

A part owns tensors: new ones beside the shared (an expert's neurons, low-rank pairs), or shared
ones trained in place, by name pattern (stored in the private part, replaced on export). Everything
that no named part owns is shared and stays frozen. `relay` and `refresh` are starts, fitted in closed
form; alone they are the whole repair, before a trained part they are where its training begins.

No torch here: configurations are checked before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from ..core.errors import nearest

EXPERT = ".private."
"""In the name of every tensor of an expert."""
LORA = ".lora_"
"""In the name of every tensor of a low-rank pair, as PEFT names them."""


@dataclass(frozen=True)
class Part:
    """`in_place` are patterns of shared tensors it trains; `adds` marks the tensors it brings.

    A `whole` part already trains everything, a `fresh` one forgets the reused draft first; a
    `start` is fitted in closed form, not trained.
    """

    says: str
    in_place: tuple[str, ...] = ()
    adds: str | None = None
    whole: bool = False
    fresh: bool = False
    start: bool = False


PARTS: dict[str, Part] = {
    "relay": Part(
        "closed form: a linear map of features folded into fc, an expert's down projection",
        start=True,
    ),
    "refresh": Part(
        "closed form: copies of the base's embedding, norm and head renewed", start=True
    ),
    "expert": Part("private FFN neurons beside the shared ones", adds=EXPERT),
    "lora": Part("low-rank updates of every linear layer but the head (PEFT)", adds=LORA),
    "head-lora": Part("a low-rank update of the draft's own output head (PEFT)", adds=LORA),
    "fc": Part("the feature interface", ("fc.*", "input_norm.*", "fc_norm.*")),
    "norms": Part("the norms", ("*norm.weight",)),
    "attention": Part("the attention", ("*self_attn.*",)),
    "ffn": Part("the shared FFN itself", ("*mlp.*_proj.*",)),
    "head": Part("the draft's own output head", ("lm_head.*",)),
    "full": Part("every trainable tensor, from the reused draft", ("*",), whole=True),
    "scratch": Part("every trainable tensor, from nothing", ("*",), whole=True, fresh=True),
}


@dataclass(frozen=True)
class Method:
    """Parts that are trained together, each at most once, in the order of the table."""

    name: str
    parts: tuple[str, ...]

    @property
    def expert(self) -> bool:
        return "expert" in self.parts

    @property
    def lora(self) -> bool:
        """Whether it adds low-rank pairs, to the layers or to the head."""
        return any(PARTS[part].adds == LORA for part in self.parts)

    @property
    def fresh(self) -> bool:
        """Whether it starts from new weights instead of the reused draft."""
        return any(PARTS[part].fresh for part in self.parts)

    @property
    def starts(self) -> tuple[str, ...]:
        """What is fitted in closed form before any training."""
        return tuple(part for part in self.parts if PARTS[part].start)

    def trains_in_place(self, name: str) -> bool:
        """Whether a shared tensor of this name is trained in place."""
        patterns = [pattern for part in self.parts for pattern in PARTS[part].in_place]
        return any(fnmatch(name, pattern) for pattern in patterns)

    def owns(self, name: str) -> bool:
        """Whether a tensor of this name is trained under the method."""
        if EXPERT in name:
            return self.expert
        if LORA in name:
            return ("head-lora" if name.startswith("lm_head.") else "lora") in self.parts
        return self.trains_in_place(name)


def read_method(text: str) -> Method:
    """The method that parts joined by + name. Raises ValueError for unknown and contradictory ones."""
    parts = [word.strip() for word in text.split("+")]
    for part in parts:
        if part not in PARTS:
            raise ValueError(
                f"names the private part '{part}'; {nearest(part, PARTS)}; parts are joined by +"
            )
    if len(set(parts)) < len(parts):
        raise ValueError(f"names a part twice: '{text}'")
    wholes = [part for part in parts if PARTS[part].whole]
    others = [part for part in parts if not PARTS[part].start and part not in wholes]
    if wholes and (len(wholes) > 1 or set(others) - {"expert"}):
        raise ValueError(
            f"'{text}' contradicts itself: {wholes[0]} trains every tensor already; beside it only "
            "expert (more neurons), relay and refresh make sense"
        )
    if "scratch" in wholes and any(PARTS[part].start for part in parts):
        raise ValueError(f"'{text}' contradicts itself: scratch forgets what it starts from")
    if {"expert", "ffn"} <= set(parts):
        raise ValueError(
            f"'{text}' contradicts itself: an expert leaves the shared FFN frozen, ffn trains it"
        )
    if {"head", "head-lora"} <= set(parts):
        raise ValueError(
            f"'{text}' contradicts itself: head trains the output head whole, head-lora an update of it"
        )
    ordered = tuple(part for part in PARTS if part in parts)
    return Method("+".join(ordered), ordered)
