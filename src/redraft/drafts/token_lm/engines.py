"""What each engine does with a causal LM as a draft, read from their loaders; run in llama.cpp."""

from __future__ import annotations

from ..kind import Config, Rule, Tensors
from ..stored.engine_rules import TARGET_ROWS, Findings

PAD = "pad the draft's embedding and head with rows of zeros, where it is the narrower one"


def _equal_rows(what: str, most_apart: int, remedy: str) -> Rule:
    def rule(raw: Config, tensors: Tensors) -> Findings:
        own, theirs = raw.get("vocab_size") or 0, raw.get(TARGET_ROWS)
        allowed = f"within {most_apart} of" if most_apart else "equal to"
        if theirs is None:
            yield "note", f"{what} needs a vocab_size {allowed} the target's (here {own})"
        elif abs(theirs - own) > most_apart:
            yield (
                "refused",
                f"{what} needs a vocab_size {allowed} the target's {theirs}, here it is {own}; "
                f"{remedy}",
            )

    return rule


ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": (_equal_rows("method draft_model", 0, PAD),),
    "sglang": (_equal_rows("STANDALONE", 0, PAD),),
    "llama.cpp": (_equal_rows("a draft model", 128, PAD),),
    "transformers": (
        _equal_rows("assistant_model=", 0, "redraft.generate cuts or fills the difference"),
    ),
}
