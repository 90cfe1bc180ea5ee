"""The fine-tunes of the suite of real models, one row each, and how they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .datasets import chats
from .pretrained import tune

BASE = "base"


@dataclass(frozen=True)
class RealMember:
    """A fine-tune on a domain's answers: LoRA of a `rank`, or of all weights (rank None)."""

    domain: str
    rank: int | None
    steps: int
    lr: float


MEMBERS = {
    "math-lora": RealMember("math", 16, 100, 5e-4),
    "math-sft": RealMember("math", None, 120, 1e-4),
    "medical-lora": RealMember("medical", 16, 100, 5e-4),
    "medical-sft": RealMember("medical", None, 100, 1e-4),
    "code-lora": RealMember("code", 16, 100, 5e-4),
    "code-sft": RealMember("code", None, 100, 1e-4),
}


def make_member(out: Path, data: Path, name: str) -> None:
    """Fine-tune the base of the suite in `out` into members/NAME."""
    row = MEMBERS[name]
    tune(
        out / BASE,
        chats(data, row.domain, split="tune"),
        out / "members" / name,
        steps=row.steps,
        rank=row.rank,
        lr=row.lr,
        label=name,
    )
