"""A teacher batch: the target's output on one batch, read once for every adapter that trains on it.

Of the target only features and final states are kept. Logits are made from the states a few labels
at a time, by the model's own code (see `Target.logits_from`).

Shapes: B batch, T tokens, F features, S chain starts, H hidden, V target vocabulary, D draft
vocabulary, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import TrainConfig
from ..core.errors import UserError
from ..core.rng import seeded
from ..drafts.base import Draft
from ..losses.functions import LOSSES, Teacher
from ..losses.fused import Fused, fused_loss
from ..losses.table import LABELS, OWN
from ..models.batching import Batch
from ..models.target import Target

VALUES = 1 << 24
"""Logits held at once, of the target and of a draft: labels are taken so many at a time (one at least)."""
HELD = 1 << 26
"""Probabilities held for all labels of a batch, where several adapters train on it."""
PUBLISHED_LENGTH = 512
"""Feature noise is given for sequences of this length, as EAGLE's training code scales it."""


@dataclass(frozen=True)
class TeacherBatch:
    """`logits` gives the target's logits at a slice of the labels: [n, V], or [n, D] of the token ids
    given.

    Labels are sorted by their offset in the answer; the target predicts one from the position
    before it. With `hold` the teacher of all labels is kept, where it is small enough.
    """

    batch: Batch
    features_BTF: Tensor
    row_N: Tensor
    label_N: Tensor
    offset_N: Tensor
    logits: Callable[[slice, Tensor | None], Tensor]
    seconds: float = 0.0  # that reading it took
    hold: bool = False
    places: Sequence[int] = ()  # of its rows in the step's whole batch, where it is a part of one
    held: dict[tuple[int, str], Teacher] = field(default_factory=dict)

    @property
    def token_N(self) -> Tensor:
        """The answers' tokens that are labels."""
        return self.batch.tokens_BT[self.row_N, self.label_N]

    def next_features(self) -> Tensor:
        """The target's features [N, F] at the positions that predict the labels."""
        return self.features_BTF[self.row_N, self.label_N - 1]

    def teacher(self, draft: Draft, reads: str, labels: slice) -> Teacher:
        """The target's distributions over a draft's vocabulary, as far as a loss `reads` them."""
        size = self._columns(draft)
        if not self.hold or len(self.label_N) * size > HELD:
            return self._teacher(draft, reads, labels)
        key = (id(draft.draft_vocab) if draft.draft_vocab is not None else 0, reads)
        if key not in self.held:
            rows = rows_at_once(self.width(draft, reads))
            starts = range(0, len(self.label_N), rows)
            self.held[key] = Teacher.joined(
                [self._teacher(draft, reads, slice(s, s + rows)) for s in starts]
            )
        return self.held[key].part(labels)

    def width(self, draft: Draft, reads: str) -> int:
        """Numbers held per label at least: the logits that a loss reads of the target, the draft's own."""
        return self._columns(draft) if reads in (LABELS, OWN) else draft.vocab_size

    def _columns(self, draft: Draft) -> int:
        return draft.vocab_size if draft.draft_vocab is None else len(draft.draft_vocab)

    def _teacher(self, draft: Draft, reads: str, labels: slice) -> Teacher:
        tokens_n = self.token_N[labels]
        vocab = draft.draft_vocab
        compared = draft.feature_size == draft.hidden_size  # else states are no features
        features = self.next_features()[labels] if compared else None
        if reads == LABELS:
            none = self.features_BTF.new_zeros(len(tokens_n), 0)
            return Teacher.from_own_logits(none, vocab, tokens_n, features)
        # The target computes as it will be served, also where the draft trains under autocast.
        with torch.no_grad(), torch.autocast(tokens_n.device.type, enabled=False):
            if reads == OWN:
                return Teacher.from_own_logits(
                    self.logits(labels, vocab), vocab, tokens_n, features
                )
            return Teacher.from_logits(self.logits(labels, None), vocab, tokens_n, features)


def rows_at_once(width: int) -> int:
    """Labels of one chunk, for so many logits per label."""
    return max(1, VALUES // width)


def read_teacher_batch(
    target: Target, batch: Batch, aux_layers: tuple[int, ...], *, hold: bool = False
) -> TeacherBatch:
    """Run the target over a batch. Raises UserError for a batch without labels."""
    return teacher_batch_of(
        target, batch, aux_layers, read_states(target, batch, aux_layers), hold=hold
    )


def layers_read(target: Target, aux_layers: tuple[int, ...]) -> tuple[int, ...]:
    """The aux layers and the last one, whose states logits are made from."""
    last = target.num_layers
    return aux_layers if last in aux_layers else (*aux_layers, last)


@torch.no_grad()
def read_states(target: Target, batch: Batch, aux_layers: tuple[int, ...]) -> Tensor:
    """The states [B, T, layers read * H] of a batch. The target computes as it will be served, also under autocast.

    Raises UserError for a model whose logits do not follow from the last of them.
    """
    layers, H = layers_read(target, aux_layers), target.hidden_size
    with torch.autocast(target.device.type, enabled=False):
        reading = target.read(batch.tokens_BT, layers, keep=1)
        at = layers.index(target.num_layers) * H
        _check_logits(target, reading.features_BTF[:, -1, at : at + H], reading.logits_BTV[:, -1])
    return reading.features_BTF


def teacher_batch_of(
    target: Target,
    batch: Batch,
    aux_layers: tuple[int, ...],
    states_BTW: Tensor,
    *,
    hold: bool = False,
) -> TeacherBatch:
    """A batch with the states that `read_states` gave.

    Features of padding are zeros, whether the target is run or its stored features are read.
    Raises UserError for a batch without labels.
    """
    row_N, label_N, offset_N = batch.labels()
    if not len(label_N):
        raise UserError(
            "a batch holds no supervised token: its answers have fewer than two tokens, and the "
            "first comes from the prefill"
        )
    H = target.hidden_size
    at = layers_read(target, aux_layers).index(target.num_layers) * H
    states_NH = states_BTW[row_N, label_N - 1, at : at + H]

    def logits(labels: slice, columns: Tensor | None) -> Tensor:
        return target.logits_from(states_NH[labels], columns)

    features_BTF = _unpadded(batch, states_BTW[..., : len(aux_layers) * H])
    return TeacherBatch(batch, features_BTF, row_N, label_N, offset_N, logits, hold=hold)


def _check_logits(target: Target, states_BH: Tensor, logits_BV: Tensor) -> None:
    """Raise UserError for a model whose logits do not follow from its last hidden state."""
    made_BV = target.logits_from(states_BH)
    far = float((made_BV - logits_BV).abs().max() / logits_BV.abs().max().clamp(min=1e-9))
    if not far <= max(8 * torch.finfo(logits_BV.dtype).eps, 1e-5):
        raise UserError(
            f"target {target.name} ({type(target.model).__name__}): logits made from its last hidden "
            f"state differ from its own by {far:.1e} of the largest, so the model does something "
            "after its layers that redraft does not know, and no draft can be trained for it"
        )


def _unpadded(batch: Batch, features_BTF: Tensor) -> Tensor:
    at_T = torch.arange(features_BTF.shape[1], device=features_BTF.device)
    return features_BTF.masked_fill((at_T >= batch.ends_B[:, None])[..., None], 0.0)


def rollout_weight(answer_lengths: Sequence[int], draft: Draft, config: TrainConfig) -> float:
    """The sum of the weights of all labels and rollout steps, by which the loss of a batch is divided.

    Rollout step j predicts an answer's tokens from number 2 + j on, each with weight step_decay ** j.
    """
    steps = config.rollout if draft.feeds_back else 1
    counts = [sum(max(length - 1 - j, 0) for length in answer_lengths) for j in range(steps)]
    return sum(config.step_decay**j * count for j, count in enumerate(counts) if count)


def rollout_loss(
    teacher_batch: TeacherBatch,
    draft: Draft,
    config: TrainConfig,
    step: int = 0,
    weight: float | None = None,
) -> tuple[Tensor, int]:
    """The loss per supervised token over all rollout steps, weighted by step_decay ** j.

    `step` keys the feature noise. `weight` is that of the whole batch (see `rollout_weight`) where this is a part of
    it, so that the parts' losses add up to the whole one. Returns the loss and the number of supervised tokens
    (those of rollout step 0).
    """
    features_BTF, first = _noised(teacher_batch, config, step), teacher_batch.batch.first
    states: list[Tensor] = []
    steps = config.rollout if draft.feeds_back else 1
    for j, states_BSH in enumerate(
        draft.rollout(teacher_batch.batch.tokens_BT, features_BTF, first, steps)
    ):
        begin = int((teacher_batch.offset_N < 1 + j).sum())
        if begin == len(teacher_batch.label_N):
            break
        start_N = teacher_batch.label_N[begin:] - 2 - j - first
        states.append(states_BSH[teacher_batch.row_N[begin:], start_N])
    loss = LOSSES[config.loss]
    weights = [config.step_decay**j for j in range(len(states))]
    merged = Fused(
        loss,
        lambda labels: teacher_batch.teacher(draft, loss.row.reads, labels),
        draft.logits,
        weights,
        rows_at_once(teacher_batch.width(draft, loss.row.reads)),
    )
    if weight is None:
        weight = sum(w * len(s) for w, s in zip(weights, states, strict=True))
    return fused_loss(merged, states) / weight, len(teacher_batch.label_N)


def _noised(teacher_batch: TeacherBatch, config: TrainConfig, step: int) -> Tensor:
    """The features with noise, drawn for each row by its place: the same however a step is split."""
    features_BTF = teacher_batch.features_BTF
    if not config.feature_noise:
        return features_BTF
    noised = features_BTF.clone()
    lengths = teacher_batch.batch.ends_B.tolist()
    for b, length in enumerate(lengths):
        place = teacher_batch.places[b] if teacher_batch.places else b
        row_TF = noised[b, :length]
        noise = torch.rand(row_TF.shape, generator=seeded(config.seed, "noise", step, place)) - 0.5
        row_TF += config.feature_noise * PUBLISHED_LENGTH / length * noise.to(row_TF)
    return noised
