"""The adapters redraft can train, one row each, and how they are combined: `expert+fc+norms`.

A part owns tensors: new ones next to the shared (an expert's neurons, low-rank pairs), or shared
ones trained in place, by name pattern (stored in the adapter, replaced on export). Everything
that no named part owns is shared and stays frozen. `feature-map` and `weight-sync` are starts, fitted in closed
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
class AdapterKind:
    """`in_place` are patterns of shared tensors it trains; `adds` marks the tensors it brings.

    A `whole` part already trains everything, a `fresh` one forgets the unadapted draft first; a
    `closed_form` one is fitted without gradient steps.
    """

    help: str
    in_place: tuple[str, ...] = ()
    adds: str | None = None
    whole: bool = False
    fresh: bool = False
    closed_form: bool = False


ADAPTERS: dict[str, AdapterKind] = {
    "feature-map": AdapterKind(
        "closed form: a linear map of features folded into fc, an expert's down projection",
        closed_form=True,
    ),
    "weight-sync": AdapterKind(
        "closed form: copies of the base's embedding, norm and head renewed", closed_form=True
    ),
    "expert": AdapterKind("added FFN neurons next to the shared ones", adds=EXPERT),
    "lora": AdapterKind("low-rank updates of every linear layer but the head (PEFT)", adds=LORA),
    "head-lora": AdapterKind("a low-rank update of the draft's own output head (PEFT)", adds=LORA),
    "fc": AdapterKind("the feature interface", ("fc.*", "input_norm.*", "fc_norm.*")),
    "norms": AdapterKind("the norms", ("*norm.weight",)),
    "attention": AdapterKind("the attention", ("*self_attn.*",)),
    "ffn": AdapterKind("the shared FFN itself", ("*mlp.*_proj.*",)),
    "head": AdapterKind("the draft's own output head", ("lm_head.*",)),
    "full": AdapterKind("every trainable tensor, from the unadapted draft", ("*",), whole=True),
    "scratch": AdapterKind("every trainable tensor, from nothing", ("*",), whole=True, fresh=True),
}

OLD_NAMES = {"relay": "feature-map", "refresh": "weight-sync"}
"""Names of before, which are still read."""


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
        return any(ADAPTERS[part].adds == LORA for part in self.parts)

    @property
    def fresh(self) -> bool:
        """Whether it starts from new weights instead of the unadapted draft."""
        return any(ADAPTERS[part].fresh for part in self.parts)

    @property
    def closed_form(self) -> tuple[str, ...]:
        """What is fitted in closed form before any training."""
        return tuple(part for part in self.parts if ADAPTERS[part].closed_form)

    def trains_in_place(self, name: str) -> bool:
        """Whether a shared tensor of this name is trained in place."""
        patterns = [pattern for part in self.parts for pattern in ADAPTERS[part].in_place]
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
    words = [word.strip() for word in text.split("+")]
    parts = [OLD_NAMES.get(word, word) for word in words]
    for part in parts:
        if part not in ADAPTERS:
            raise ValueError(
                f"names the adapter '{part}'; {nearest(part, ADAPTERS)}; parts are joined by +"
            )
    if len(set(parts)) < len(parts):
        raise ValueError(f"names a part twice: '{text}'")
    wholes = [part for part in parts if ADAPTERS[part].whole]
    others = [part for part in parts if not ADAPTERS[part].closed_form and part not in wholes]
    if wholes and (len(wholes) > 1 or set(others) - {"expert"}):
        raise ValueError(
            f"'{text}' contradicts itself: {wholes[0]} trains every tensor already; next to it only "
            "expert (more neurons), feature-map and weight-sync make sense"
        )
    if "scratch" in wholes and any(ADAPTERS[part].closed_form for part in parts):
        raise ValueError(f"'{text}' contradicts itself: scratch forgets what it starts from")
    if {"expert", "ffn"} <= set(parts):
        raise ValueError(
            f"'{text}' contradicts itself: an expert leaves the shared FFN frozen, ffn trains it"
        )
    if {"head", "head-lora"} <= set(parts):
        raise ValueError(
            f"'{text}' contradicts itself: head trains the output head whole, head-lora an update of it"
        )
    ordered = tuple(part for part in ADAPTERS if part in parts)
    return Method("+".join(ordered), ordered)
