"""What a toy suite is made of: its sizes, and where its text comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from redraft.config import TrainConfig

from .datasets import chats, question, real_harm_pairs, texts
from .language_model import Shape
from .members import MEMBERS, TUNED
from .synthetic import Sample, passages, samples, split_of
from .synthetic_harm import HARM, Pair, harm_pairs

STAND_INS = {"medical": "records"}
"""Domains that the synthetic corpus has under another name."""
PARTS = {"base": 1, "member": 2}
"""How the `tune` split of a general domain is shared out where a member tunes on it."""


@dataclass(frozen=True)
class Size:
    """How a toy suite of one size is made. Steps, not seconds, so that it repeats."""

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
    base_batch: int = 4
    tune_batch: int = 8
    novels: int = 1500


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
    "pico": Size(
        shape=Shape(layers=8, hidden=96, width=192, vocab=1024, context=384),
        window=128,
        chats=3000,
        base_steps=900,
        base_lr=4e-3,
        tune_steps=300,
        tune_lr=3e-3,
        answers=600,
        answer_tokens=96,
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
    # 19 M parameters, 33 M tokens (5.6 epochs): wants an accelerator, a CPU takes many hours.
    "small": Size(
        shape=Shape(layers=10, hidden=384, width=1024, vocab=8192, context=512),
        window=256,
        chats=20000,
        base_steps=4000,
        base_lr=1.5e-3,
        tune_steps=450,
        tune_lr=8e-4,
        answers=1500,
        answer_tokens=160,
        draft_width=768,
        real=True,
        base_batch=32,
        tune_batch=16,
        novels=6000,
    ),
}


@dataclass(frozen=True)
class Corpus:
    """Where a toy suite's text comes from: the synthetic corpus, or real data where `real`.

    `members` are the fine-tunes that the suite is to have; what they are tuned on is kept out of
    the base.
    """

    size: Size
    folder: Path | None
    seed: int
    members: tuple[str, ...] = ()

    @property
    def general(self) -> tuple[str, ...]:
        """The domains that the base and its draft are made for."""
        return ("dialogue", self.named("medical"), "code")

    @property
    def shared_out(self) -> tuple[str, ...]:
        """The general domains whose `tune` split base and members share out between them.

        None in the synthetic corpus, whose base has enough in its own split.
        """
        rows = [MEMBERS[name] for name in self.members]
        tuned = {self.named(row.domain) for row in rows if row.learns}
        return tuple(d for d in self.general if d in tuned) if self.folder is not None else ()

    def named(self, domain: str) -> str:
        """A domain's name in this corpus."""
        return STAND_INS.get(domain, domain) if self.folder is None else domain

    def chats(self, domain: str, count: int, split: str) -> list[Sample]:
        """Chats of a domain; of the harm domain those that do as they are asked."""
        if domain == HARM:
            return [chat_of(pair, pair.compliance) for pair in self.pairs(count, split)]
        if self.folder is None:
            return samples(domain, count, seed=self.seed, split=split)
        return chats(self.folder, domain, split=split)[:count]

    def pairs(self, count: int, split: str) -> list[Pair]:
        """Requests of the harm domain, each with a better and a worse answer."""
        if self.folder is None:
            return harm_pairs(count, seed=self.seed, split=split)
        return real_harm_pairs(self.folder, split=split)[:count]

    def base_chats(self) -> list[Sample]:
        """Chats the base learns from. It has met the tuned domain, but seldom.

        Real data is scarce, so the base also has the `tune` split of each general domain, but where
        a member tunes on that domain only a third of it, drawn by a stable hash of the question
        (the member has the rest). Steps are fixed, so it reads as many tokens either way.
        """
        size = self.size.chats
        found = [c for domain in self.general for c in self.chats(domain, size, "base")]
        if self.folder is not None:
            for domain in self.general:
                rows = self.chats(domain, size, "tune")
                found += _part(rows, "base") if domain in self.shared_out else rows
        return found + self.chats(TUNED, size // 10, "base")

    def base_texts(self) -> list[str]:
        """Running text the base learns from."""
        if self.folder is not None:
            return texts(self.folder, "stories") + texts(self.folder, "novels")[: self.size.novels]
        return [
            text
            for domain in (*self.general, TUNED)
            for text in passages(domain, self.size.chats // 3, seed=self.seed, split="base")
        ]

    def tune_chats(self, domain: str) -> list[Sample]:
        """Chats that a member of the suite learns a domain from; the base has none of them."""
        rows = self.chats(domain, self.size.chats, "tune")
        return _part(rows, "member") if domain in self.shared_out else rows

    def tune_texts(self, domain: str) -> list[str]:
        """Running text of a domain, for continued pre-training."""
        if self.folder is None:
            return passages(domain, self.size.chats, seed=self.seed, split="tune")
        return ["\n".join(m["content"] for m in c.messages) for c in self.tune_chats(domain)]


def chat_of(pair: Pair, answer: str) -> Sample:
    """A request of the harm domain with one of its answers."""
    return Sample(pair.id, HARM, (*pair.asked, {"role": "assistant", "content": answer}))


def _part(rows: list[Sample], part: str) -> list[Sample]:
    return [row for row in rows if split_of(f"tune: {question(row)}", PARTS) == part]
