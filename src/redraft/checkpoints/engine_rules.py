"""What each engine does with a draft folder: reads it, refuses it, or serves something else.

Verification hides every mistake here: the text stays right and only acceptance falls. The rules
are facts about the engines' loaders, engine by engine in the row of a kind (vLLM 0.32 run here; llama.cpp 11434
and 11549 run here, other parts of it read; SGLang 0.5.23 read, not run). They look at config.json and
tensors as stored, so a broken folder can be judged that redraft's own readers refuse.

Where no rule applies, nothing is claimed: a name, a value or a kind of attention that the rules do
not know is a finding of level "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.config_values import is_object, shown
from ..drafts.kind import Config, DraftKind, Tensors
from ..drafts.stored.engine_names import KEYS
from ..drafts.stored.engine_rules import TARGET_LAYERS, TARGET_ROWS, TARGET_TYPE


@dataclass(frozen=True)
class Finding:
    """One thing an engine does with a folder.

    `level`: a harmless "note"; "unknown" where the rules cannot tell; "wrong" where it loads and
    serves another function without a word; "refused" where it does not load.
    """

    engine: str
    level: str
    says: str


def judge(
    kind: DraftKind,
    raw: Config,
    stored: Tensors,
    num_layers: int | None = None,
    vocab_size: int | None = None,
    model_type: str | None = None,
) -> list[Finding]:
    """What every engine does with a folder of this kind, engine by engine.

    With the target's `num_layers`, aux layer ids that name the default layers are known to be harmless;
    with its `vocab_size`, whether a draft's rows are as many; with its `model_type`, whether an engine keeps
    its layers' states.
    """
    readable, unread = _readable(raw)
    of_target = {TARGET_LAYERS: num_layers, TARGET_ROWS: vocab_size, TARGET_TYPE: model_type}
    readable |= {key: value for key, value in of_target.items() if value is not None}
    named = {kind.canonical(name): tensor for name, tensor in stored.items()}
    config, unjudged = kind.judged(readable, named)
    unread += unjudged
    return [
        Finding(engine, level, says)
        for engine, rules in kind.engines.items()
        for level, says in (
            [("unknown", says) for says in unread]
            or [found for rule in rules for found in rule(config, named)]
        )
    ]


def _readable(raw: Config) -> tuple[dict[str, Any], list[str]]:
    """A config without the values that are none of their key's kind, and a sentence for each."""
    kept: dict[str, Any] = {}
    unread: list[str] = []
    for key, value in raw.items():
        if value is None or key not in KEYS:
            kept[key] = value
        elif not KEYS[key](value):
            unread.append(f"{key} in config.json is {shown(value)}, which no rule can judge")
        elif is_object(value):
            kept[key], more = _readable(value)
            unread += more
        else:
            kept[key] = value
    return kept, unread
