"""The fine-tunes of the suite of real models, one row each, and how they are made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redraft.core.files import write_text

from .datasets import chats, real_harm_pairs
from .kinds.preferred import Dpo, prefer
from .pretrained import tune, with_lora
from .synthetic import Sample

BASE = "base"
SAFETY = "safety"
"""The domain of preference tuning: requests that are to be refused, and harmless ones that look like them."""
LONGEST = 512
"""Tokens of a chat that is tuned on."""
LONGEST_PAIR = 256
"""Tokens of a question and one of its two answers, where preferences are tuned on."""
LONGEST_QUESTION = 1200
"""Characters: what is longer is left out."""


@dataclass(frozen=True)
class RealMember:
    """A fine-tune on a domain's answers: LoRA of a `rank`, or of all weights (rank None).

    With a `beta` it is tuned by DPO on pairs of answers, with half a weight on the better ones' own likelihood.
    """

    domain: str
    rank: int | None
    steps: int
    lr: float
    beta: float | None = None

    def about(self) -> dict[str, Any]:
        """What it depends on; without DPO's setting where there is none."""
        return {k: v for k, v in asdict(self).items() if k != "beta" or v is not None}


MEMBERS = {
    "math-lora": RealMember("math", 16, 100, 5e-4),
    "math-sft": RealMember("math", None, 120, 1e-4),
    "medical-lora": RealMember("medical", 4, 100, 5e-4),  # small enough to ship, see kept_parts.py
    "medical-sft": RealMember("medical", None, 100, 1e-4),
    "code-lora": RealMember("code", 16, 100, 5e-4),
    "code-sft": RealMember("code", None, 100, 1e-4),
    "safety-dpo": RealMember(SAFETY, 16, 24, 2e-4, 0.1),
}


def make_member(out: Path, data: Path, name: str) -> None:
    """Fine-tune the base of the suite in `out` into members/NAME."""
    row, folder = MEMBERS[name], out / "members" / name
    if row.beta is not None:
        prefer_safe(out / BASE, data, folder, name, row)
        return
    tune(
        out / BASE,
        chats(data, row.domain, split="tune"),
        folder,
        steps=row.steps,
        longest=LONGEST,
        rank=row.rank,
        lr=row.lr,
        label=name,
    )


def prefer_safe(base: Path, data: Path, out: Path, name: str, row: RealMember) -> None:
    """Tune a model by DPO on what is safe to say, into the folder `out` (of LoRA the adapter)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .language_model import save_model

    pairs = [(p.asked, p.better, p.worse) for p in real_harm_pairs(data, split="tune")]
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
        if row.rank is not None:
            model = with_lora(model, row.rank)
        how = Dpo(row.beta or 0.0, row.lr, row.steps, LONGEST_PAIR, likelihood=0.5, bf16=True)
        prefer(model, tokenizer, pairs, how, name)
    save_model(out, model, tokenizer)


def questions(data: Path, domain: str, split: str) -> list[Sample]:
    """What is asked of a domain's fine-tunes: chats that begin with a question, not too long."""
    if domain == SAFETY:
        pairs = real_harm_pairs(data, split=split)
        found = [Sample(p.id, SAFETY, p.asked) for p in pairs if len(p.asked) == 1]
    else:
        found = chats(data, domain, split=split)
    return [s for s in found if len(s.messages[0]["content"]) <= LONGEST_QUESTION]


def write_questions(path: Path, samples: Sequence[Sample]) -> None:
    """The first question of each chat."""
    rows = [{"id": s.id, "messages": [dict(s.messages[0])]} for s in samples]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
