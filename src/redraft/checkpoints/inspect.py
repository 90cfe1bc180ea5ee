"""`redraft inspect`: what a draft folder is, what it computes, and what each engine does with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.errors import UserError
from ..core.folders import find_folder, read_json, read_tensors
from ..drafts.eagle3 import Eagle3Config
from ..drafts.kinds import Shape
from ..models.target import Target
from .engine_rules import RULES, Finding, judge
from .load import StoredDraft, interpret, recognise

REFUSED, AS_IT_IS = "does not load it", "serves it as it is"
NOT_KNOWN = "is not known to redraft's rules"
EQUATIONS = {
    "eagle3": "g = fc([hs[a]; hs[b]; hs[c]]); layer on [norm(E[t+1]); norm(g or own state)]; "
    "logits = lm_head(norm(state))",
    "eagle": "x = fc([E[t+1]; hs[n] or own state]); one decoder layer; logits = target's "
    "lm_head(state)",
    "token_lm": "a causal LM of its own: logits = lm_head(body(tokens)); nothing of the target's is read",
}
VARIANTS = {
    "norm_before_residual": "the residual starts from the normed state",
    "norm_before_fc": "a norm before fc",
    "fc_norm": "a norm on each aux layer",
    "norm_output": "the normed state is fed back",
    "fc_bias": "fc has a bias",
    "routed": "the FFN is experts that routers choose token by token: runs here, no engine loads it",
    "qkv_bias": "q, k and v have biases",
    "o_bias": "o_proj has a bias",
    "head_norms": "q and k are normed per head",
    "sliding_window": "attention sees a sliding window",
}


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
        return NOT_KNOWN if "unknown" in levels or self.unreadable else AS_IT_IS


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
    kind, layout, _ = recognise(raw, tensors, folder)
    stored: StoredDraft | None = None
    unreadable = None
    try:
        stored = interpret(folder, raw, tensors)
        stored.build(target)
    except UserError as refusal:
        unreadable = str(refusal)
    return Inspection(
        folder=str(folder),
        kind=kind,
        layout=layout,
        unreadable=unreadable,
        function=EQUATIONS[kind],
        variants=_variants(stored.config) if stored else [],
        shape=_shape(stored.config) if stored else {},
        aux_layers=_aux_layers(kind, stored, target),
        vocabulary=_vocabulary(stored, target),
        tensors={n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in tensors.items()},
        engines=judge(
            kind,
            raw,
            tensors,
            target.num_layers if target else None,
            target.vocab_size if target else None,
        ),
        provenance=stored.provenance if stored else {},
    )


def engines(kind: str) -> list[str]:
    """The engines that are judged for a kind."""
    return list(RULES[kind])


def _variants(config: Shape) -> list[str]:
    return [f"{says} ({name})" for name, says in VARIANTS.items() if getattr(config, name, None)]


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


def _aux_layers(kind: str, stored: StoredDraft | None, target: Target | None) -> str:
    if kind == "eagle":
        return "hs[n], the state after the target's final norm"
    if kind == "token_lm":
        return "none: it reads tokens only"
    aux_layers = (
        stored.config.aux_layers if stored and isinstance(stored.config, Eagle3Config) else None
    )
    if aux_layers:
        return f"hs{list(aux_layers)} (vLLM's ids; SGLang's are {[t - 1 for t in aux_layers]})"
    n = target.num_layers if target else None
    default = f": hs[2], hs[{n // 2}], hs[{n - 3}] of this target" if n else ""
    return f"the engines' default, hs[2], hs[n//2], hs[n-3]{default}"


def _vocabulary(stored: StoredDraft | None, target: Target | None) -> str:
    if stored is None:
        return "not readable"
    c = stored.config
    if stored.kind == "token_lm":
        return f"its own {c.vocab_size:,} rows, cut or left impossible to fit the target"
    if isinstance(c, Eagle3Config) and "d2t" in stored.tensors:
        text = f"{c.draft_vocab_size:,} of {c.vocab_size:,} tokens, d2t as offsets"
    else:
        text = f"the target's whole vocabulary, {c.vocab_size:,} tokens"
    if target is None or target.vocab_size == c.vocab_size:
        return text
    return f"{text}; this target has {target.vocab_size:,} rows"
