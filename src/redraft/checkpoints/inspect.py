"""`redraft inspect`: what a draft folder is, what it computes, and what each engine does with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.errors import UserError
from ..core.folders import find_folder, read_json, read_tensors
from ..drafts.kind import DraftKind, Shape
from ..drafts.kinds import kind_named
from ..models.target import Target
from .engine_rules import Finding, judge
from .load import StoredDraft, interpret, recognise

REFUSED, UNCHANGED = "does not load it", "serves it unchanged"
NOT_KNOWN = "is not known to redraft's rules"


@dataclass(frozen=True)
class Inspection:
    """What is known of a draft folder. `unreadable` is redraft's own reason to refuse it."""

    folder: str
    kind: str
    layout: str
    unreadable: str | None
    function: str
    variants: list[str]
    shape: dict[str, Any]
    aux_layers: str
    vocabulary: str
    tensors: dict[str, list[Any]]
    engines: list[Finding]
    provenance: dict[str, Any] = field(default_factory=dict)

    def serves(self, engine: str) -> str:
        """In a word: what the engine does with this folder."""
        levels = {finding.level for finding in self.engines if finding.engine == engine}
        if "refused" in levels:
            return REFUSED
        if "wrong" in levels:
            return "serves another function"
        # What redraft cannot read it does not vouch for, even where no rule is broken.
        return NOT_KNOWN if "unknown" in levels or self.unreadable else UNCHANGED


def inspect_draft(
    source: str, target: Target | None = None, *, unpickle: bool = False
) -> Inspection:
    """Look at a draft folder or Hub id, also at one that redraft itself refuses to run.

    With a `target` its fit is checked too. Raises UserError when the files cannot be read at all,
    or hold no draft.
    """
    folder = find_folder(source, unpickle=unpickle)
    raw = read_json(folder / "config.json")
    tensors = read_tensors(folder, unpickle=unpickle)
    kind, layout = recognise(raw, tensors, folder)
    stored: StoredDraft | None = None
    unreadable = None
    try:
        stored = interpret(folder, raw, tensors)
        stored.build(target)
    except UserError as refusal:
        unreadable = str(refusal)
    return Inspection(
        folder=str(folder),
        kind=kind.name,
        layout=layout.name if layout.describe is None else layout.describe(raw, tensors, folder),
        unreadable=unreadable,
        function=kind.function,
        variants=_variants(kind, stored.config) if stored else [],
        shape=_shape(stored.config) if stored else {},
        aux_layers=kind.reads(
            stored.config if stored else None, target.num_layers if target else None
        ),
        vocabulary=_vocabulary(stored, target),
        tensors={n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in tensors.items()},
        engines=judge(
            kind,
            raw,
            tensors,
            target.num_layers if target else None,
            target.vocab_size if target else None,
            target.model.config.model_type if target else None,
        ),
        provenance=stored.provenance if stored else {},
    )


def engines(kind: str) -> list[str]:
    """The engines that are judged for a kind."""
    return list(kind_named(kind).engines)


def _variants(kind: DraftKind, config: Shape) -> list[str]:
    return [f"{says} ({name})" for name, says in kind.variants.items() if getattr(config, name)]


def _shape(config: Shape) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rope_parameters",
    )
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _vocabulary(stored: StoredDraft | None, target: Target | None) -> str:
    if stored is None:
        return "not readable"
    rows, text = stored.config.vocab_size, stored.row.vocabulary(stored.config, stored.tensors)
    if stored.row.with_rows_of is None or target is None or target.vocab_size == rows:
        return text
    return f"{text}; this target has {target.vocab_size:,} rows"
