"""What a family is made of: its sizes, its fine-tunes, and where its text comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import TrainConfig
from .datasets import chats, texts
from .language_model import Shape
from .world import Sample, passages, samples

TUNED = "math"
"""The domain of the fine-tunes."""


@dataclass(frozen=True)
class Size:
    """How a family of one size is made. Steps, not seconds, so that it repeats."""

    shape: Shape
    window: int
    chats: int
    base_steps: int
    base_lr: float
    tune_steps: int
    tune_lr: float
    answers: int
    answer_tokens: int
    draft_width: int
    real: bool = False


BASE_BATCH, TUNE_BATCH = 4, 8
DRAFT = TrainConfig(method="scratch", epochs=2.0, batch_tokens=512, rollout=4, evaluations=4)
DRAFT_LR = 0.8
"""Learning rate of the base's draft, times the hidden size."""
SIZES = {
    # `tiny` is for the test suite: it shows mechanics, its figures mean nothing.
    "tiny": Size(
        shape=Shape(layers=7, hidden=64, width=128, vocab=512, context=384),
        window=128,
        chats=600,
        base_steps=400,
        base_lr=6e-3,
        tune_steps=100,
        tune_lr=4e-3,
        answers=96,
        answer_tokens=48,
        draft_width=64,
    ),
    "nano": Size(
        shape=Shape(layers=8, hidden=128, width=256, vocab=2048, context=512),
        window=128,
        chats=5000,
        base_steps=900,
        base_lr=3e-3,
        tune_steps=300,
        tune_lr=2e-3,
        answers=800,
        answer_tokens=128,
        draft_width=96,
    ),
    "micro": Size(
        shape=Shape(layers=8, hidden=192, width=448, vocab=4096, context=512),
        window=256,
        chats=20000,
        base_steps=3000,
        base_lr=2e-3,
        tune_steps=900,
        tune_lr=1e-3,
        answers=1500,
        answer_tokens=160,
        draft_width=384,
        real=True,
    ),
}


@dataclass(frozen=True)
class Member:
    """A fine-tune of the base on the tuned domain. `rate` is a share of the base's learning rate."""

    says: str
    rate: float
    lora_rank: int | None = None
    plain_text: bool = False


MEMBERS = {
    "lora4": Member("LoRA of rank 4, kept as a PEFT adapter", 1.0, lora_rank=4),
    "sft-tenth": Member("SFT at a tenth of the learning rate", 0.1),
    "sft": Member("full SFT", 1.0),
    "pretrained": Member("continued pre-training on running text", 1.0, plain_text=True),
}


@dataclass(frozen=True)
class Corpus:
    """Where a family's text comes from: the templated world, or real data where `real`."""

    size: Size
    folder: Path | None
    seed: int

    @property
    def general(self) -> tuple[str, ...]:
        """The domains that the base and its draft are made for."""
        return ("dialogue", "records" if self.folder is None else "medical", "code")

    def chats(self, domain: str, count: int, split: str) -> list[Sample]:
        if self.folder is None:
            return samples(domain, count, seed=self.seed, split=split)
        return chats(self.folder, domain, split=split)[:count]

    def base_chats(self) -> list[Sample]:
        """Chats the base learns from. It has met the tuned domain, but seldom."""
        size = self.size.chats
        found = [c for domain in self.general for c in self.chats(domain, size, "base")]
        if self.folder is not None:  # nothing is tuned on these, so the base may have that split
            found += [c for domain in self.general for c in self.chats(domain, size, "tune")]
        return found + self.chats(TUNED, size // 10, "base")

    def base_texts(self) -> list[str]:
        """Running text the base learns from."""
        if self.folder is not None:
            return texts(self.folder, "stories") + texts(self.folder, "novels")[:1500]
        return [
            text
            for domain in (*self.general, TUNED)
            for text in passages(domain, self.size.chats // 3, seed=self.seed, split="base")
        ]

    def tune_texts(self) -> list[str]:
        """Running text of the tuned domain, for continued pre-training."""
        if self.folder is None:
            return passages(TUNED, self.size.chats, seed=self.seed, split="tune")
        found = self.chats(TUNED, self.size.chats, "tune")
        return ["\n".join(m["content"] for m in c.messages) for c in found]
