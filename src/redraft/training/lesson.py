"""A lesson: what the target says of one batch, read once for every private part that trains on it.

Where all labels' logits over the vocabulary would be too many, only the target's final states are
kept, and logits are made from them in chunks (see `losses.py`).

Shapes: B batch, T tokens, F features, S chain starts, H hidden, V target vocabulary, N labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..batches import Batch
from ..config import TrainConfig
from ..drafts.base import Draft
from ..errors import UserError
from ..rng import seeded
from ..target import Target
from .losses import LOSSES, Teacher, chunked_loss

VALUES = 1 << 26
"""Logits held at once, of the target and of a draft: above, the chunked form of the losses is used."""
PUBLISHED_LENGTH = 512
"""Feature noise is given for sequences of this length, as EAGLE's training code scales it."""


@dataclass(frozen=True)
class Lesson:
    """`teacher_logits` gives the target's logits [n, V] at a slice of the labels.

    Labels are sorted by their offset in the answer; the target predicts one from the position
    before it.
    """

    batch: Batch
    features_BTF: Tensor
    row_N: Tensor
    label_N: Tensor
    offset_N: Tensor
    teacher_logits: Callable[[slice], Tensor]
    chunked: bool
    seconds: float = 0.0  # that reading it took
    teachers: dict[int, Teacher] = field(default_factory=dict)

    @property
    def said_N(self) -> Tensor:
        """The answers' tokens that are labels."""
        return self.batch.tokens_BT[self.row_N, self.label_N]

    def next_features(self) -> Tensor:
        """The target's features [N, F] at the positions that predict the labels."""
        return self.features_BTF[self.row_N, self.label_N - 1]

    def teacher(self, draft: Draft) -> Teacher:
        """The target's distributions over a draft's vocabulary, made once per vocabulary."""
        key = id(draft.draft_vocab) if draft.draft_vocab is not None else 0
        if key not in self.teachers:
            logits_NV = self.teacher_logits(slice(None))
            alike = draft.feature_size == draft.hidden_size  # else states are no features
            features = self.next_features() if alike else None
            self.teachers[key] = Teacher.from_logits(
                logits_NV, draft.draft_vocab, self.said_N, features
            )
        return self.teachers[key]


@torch.no_grad()
def read_lesson(
    target: Target, batch: Batch, taps: tuple[int, ...], values: int = VALUES
) -> Lesson:
    """Run the target over a batch. It computes as it will be served, also under autocast.

    Features of padding are zeros, whether the target is run or its stored features are read.
    """
    row_N, label_N, offset_N = batch.labels()
    if not len(label_N):
        raise UserError(
            "a batch holds no supervised token: its answers have fewer than two tokens, and the "
            "first comes from the prefill"
        )
    with torch.autocast(target.device.type, enabled=False):
        if len(label_N) * target.vocab_size > values:
            last = target.num_layers
            reading = target.read(
                batch.tokens_BT, (*taps, last) if last not in taps else taps, keep=1
            )
            features, states = (
                reading.features_BTF,
                reading.features_BTF[..., -target.hidden_size :],
            )
            if last not in taps:
                features = features[..., : -target.hidden_size]
            if torch.allclose(
                target.head(states[:, -1:]), reading.logits_BTV, rtol=1e-3, atol=1e-3
            ):
                states_NH = states[row_N, label_N - 1]

                def from_states(at: slice) -> Tensor:
                    logits: Tensor = target.head(states_NH[at])
                    return logits

                return Lesson(
                    batch, _unpadded(batch, features), row_N, label_N, offset_N, from_states, True
                )
            # This model does more to its logits than its head: take them as it gives them.
        reading = target.read(batch.tokens_BT, taps)
        logits_NV = reading.logits_BTV[row_N, label_N - 1]
    features = _unpadded(batch, reading.features_BTF)
    return Lesson(batch, features, row_N, label_N, offset_N, lambda at: logits_NV[at], False)


def _unpadded(batch: Batch, features_BTF: Tensor) -> Tensor:
    at_T = torch.arange(features_BTF.shape[1], device=features_BTF.device)
    return features_BTF.masked_fill((at_T >= batch.ends_B[:, None])[..., None], 0.0)


def rollout_loss(
    lesson: Lesson, draft: Draft, config: TrainConfig, step: int = 0
) -> tuple[Tensor, int]:
    """The loss per supervised token over all rollout steps, weighted by step_decay ** j.

    `step` keys the feature noise. Returns the loss and the number of supervised tokens (those of
    rollout step 0).
    """
    features_BTF, first = _noised(lesson.features_BTF, config, step), lesson.batch.first
    total: Tensor | None = None
    weight = 0.0
    steps = config.rollout if draft.feeds_back else 1
    for j, states_BSH in enumerate(
        draft.rollout(lesson.batch.tokens_BT, features_BTF, first, steps)
    ):
        begin = int((lesson.offset_N < 1 + j).sum())
        if begin == len(lesson.label_N):
            break
        start_N = lesson.label_N[begin:] - 2 - j - first
        states_NH = states_BSH[lesson.row_N[begin:], start_N]
        if lesson.chunked:
            loss = _in_chunks(lesson, draft, config.loss, states_NH, begin)
        else:
            teacher = lesson.teacher(draft).last(len(start_N))
            loss = LOSSES[config.loss](teacher, draft.logits(states_NH), states_NH)
        share = config.step_decay**j
        total = share * loss if total is None else total + share * loss
        weight += share * len(start_N)
    if total is None:
        raise AssertionError("a lesson has labels, so a rollout has a step")
    return total / weight, len(lesson.label_N)


def _in_chunks(lesson: Lesson, draft: Draft, name: str, states_NH: Tensor, begin: int) -> Tensor:
    def teacher_logits(at: slice) -> Tensor:
        return lesson.teacher_logits(slice(begin + at.start, begin + at.stop))

    features = lesson.next_features()[begin:] if name == "paper" else None
    return chunked_loss(
        name,
        draft.logits,
        states_NH,
        teacher_logits,
        draft.draft_vocab,
        lesson.said_N[begin:],
        features,
        values=VALUES,
    )


def _noised(features_BTF: Tensor, config: TrainConfig, step: int) -> Tensor:
    if not config.feature_noise:
        return features_BTF
    noise = torch.rand(features_BTF.shape, generator=seeded(config.seed, "noise", step)) - 0.5
    width = config.feature_noise * PUBLISHED_LENGTH / features_BTF.shape[1]
    return features_BTF + width * noise.to(features_BTF)
