"""The adapters redraft knows, one literal row each, and how they combine: `expert+fc+norms`.

An adapter trains tensors: new ones that it adds to the draft (an expert's neurons, low-rank pairs), or
shared ones in place, by name pattern. What no named adapter trains is shared and stays frozen.
`weight-sync` and `feature-map` are closed-form: alone they are the whole adaptation, before a
trained adapter they are where its training begins.

A method's adapters are attached and fitted in the order of the table, and merged in the reverse.

No torch here: settings are checked before anything is loaded. What an adapter does is in the class
that `code` names (see `kind.py` and docs/add-an-adapter.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import nearest


@dataclass(frozen=True)
class AdapterRow:
    """One adapter, as far as settings are checked by it.

    It contradicts the adapters in `excludes`, and all that are not in `only_with`; `because` is the
    sentence for it. A `fresh` adapter forgets the unadapted draft, a `closed_form` one takes no
    gradient steps. `settings` are those of `train.*` that it alone reads.
    """

    name: str
    help: str
    code: str = "kind:AdapterKind"
    in_place: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    only_with: tuple[str, ...] | None = None
    because: str = ""
    closed_form: bool = False
    fresh: bool = False
    settings: tuple[str, ...] = ()
    rate: float = 4 / 3
    """Times the automatic learning rate of a whole draft. Chosen on SmolLM2 (docs/results/real-methods.md): three
    times as much, which a toy had borne, costs acceptance on other traffic. Low-rank pairs bear it."""


TABLE = (
    AdapterRow(
        "weight-sync",
        "closed form: copies of the base's embedding, norm and head follow the target",
        "weight_sync:WeightSync",
        closed_form=True,
    ),
    AdapterRow(
        "feature-map",
        "closed form: a linear map of features folded into fc, an expert's down projection",
        "feature_map:FeatureMapping",
        closed_form=True,
    ),
    AdapterRow(
        "expert",
        "added FFN neurons next to the shared ones",
        "expert:Expert",
        settings=("width", "init"),
    ),
    AdapterRow(
        "lora",
        "low-rank updates of every linear layer but the head (PEFT)",
        "lora:LowRank",
        settings=("rank",),
        rate=4.0,
    ),
    AdapterRow(
        "head-lora",
        "a low-rank update of the draft's own output head (PEFT)",
        "lora:LowRankHead",
        excludes=("head",),
        because="head trains the output head whole, head-lora an update of it",
        settings=("rank",),
        rate=4.0,
    ),
    AdapterRow("fc", "the feature interface", in_place=("fc.*", "input_norm.*", "fc_norm.*")),
    AdapterRow("norms", "the norms", in_place=("*norm.weight",)),
    AdapterRow("attention", "the attention", in_place=("*self_attn.*",)),
    AdapterRow(
        "ffn",
        "the shared FFN itself",
        in_place=("*mlp.*_proj.*", "*mlp.shared_expert_gate.*"),
        excludes=("expert",),
        because="an expert leaves the shared FFN frozen, ffn trains it",
    ),
    AdapterRow("head", "the draft's own output head", in_place=("lm_head.*",)),
    AdapterRow(
        "body",
        "every tensor but the output head, the embedding and routed experts",
        in_place=(
            "fc.*",
            "input_norm.*",
            "fc_norm.*",
            "*norm.weight",
            "*self_attn.*",
            "*mlp.*_proj.*",
            "*mlp.shared_expert_gate.*",
        ),
        only_with=("head-lora", "weight-sync", "feature-map"),
        because="body trains fc, norms, attention and ffn already; with it only head-lora, weight-sync and feature-map "
        "make sense",
        rate=1.0,
    ),
    AdapterRow(
        "full",
        "every trainable tensor, from the unadapted draft",
        in_place=("*",),
        only_with=("expert", "weight-sync", "feature-map"),
        because="full trains every tensor already; with it only expert (more neurons), weight-sync and "
        "feature-map make sense",
        rate=1.0,
    ),
    AdapterRow(
        "scratch",
        "every trainable tensor, from nothing",
        in_place=("*",),
        only_with=("expert",),
        because="scratch trains every tensor already, from nothing; with it only expert (more neurons) "
        "makes sense",
        fresh=True,
        rate=1.0,
    ),
)

ADAPTERS: dict[str, AdapterRow] = {row.name: row for row in TABLE}

VOCABULARY = AdapterRow(
    "vocabulary", "new rows of a reduced head (--vocab remap)", "vocabulary_remap:Vocabulary"
)
"""Chosen by a setting of its own, next to any method; stored, merged and restored like the others."""

OLD_NAMES = {"relay": "feature-map", "refresh": "weight-sync"}
"""Names of before, which are still read."""


@dataclass(frozen=True)
class Method:
    """Adapters that are trained together, each at most once, in the order of the table."""

    adapters: tuple[str, ...]

    @property
    def name(self) -> str:
        return "+".join(self.adapters)

    @property
    def rows(self) -> tuple[AdapterRow, ...]:
        return tuple(ADAPTERS[name] for name in self.adapters)

    @property
    def fresh(self) -> bool:
        """Whether it starts from new weights instead of the unadapted draft."""
        return any(row.fresh for row in self.rows)

    @property
    def closed_form(self) -> tuple[str, ...]:
        """What is fitted in closed form before any training."""
        return tuple(row.name for row in self.rows if row.closed_form)

    @property
    def trained(self) -> tuple[str, ...]:
        """What takes gradient steps."""
        return tuple(row.name for row in self.rows if not row.closed_form)

    @property
    def rate(self) -> float:
        """Times the automatic learning rate of a whole draft."""
        return min(row.rate for row in self.rows)

    def reads(self, setting: str) -> bool:
        """Whether a setting of `train.*` that is one adapter's own is read."""
        return any(setting in row.settings for row in self.rows)


def read_method(text: str) -> Method:
    """The method of adapters joined by +. Raises ValueError for unknown and contradictory ones."""
    words = [word.strip() for word in text.split("+")]
    names = [OLD_NAMES.get(word, word) for word in words]
    for name in names:
        if name not in ADAPTERS:
            raise ValueError(
                f"names the adapter '{name}'; {nearest(name, ADAPTERS)}; adapters are joined by +"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"names an adapter twice: '{text}'")
    for row in (ADAPTERS[name] for name in names):
        others = set(names) - {row.name}
        if others & set(row.excludes) or (row.only_with is not None and others - {*row.only_with}):
            raise ValueError(f"'{text}' contradicts itself: {row.because}")
    return Method(tuple(name for name in ADAPTERS if name in names))
