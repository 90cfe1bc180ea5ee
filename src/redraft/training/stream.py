"""The stream of batches that adapters train on, with the target's output on each.

The target's states of an answer are the same in every epoch, so they are kept in memory where they fit. Processes of
one machine that share out the batches have that memory in common: an answer is read by the one that gets it first.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..core import ranks
from ..core.records import Answer
from ..core.shared_memory import shared_tensor
from ..models.batching import Batch, collate, shares
from ..models.kept_states import KeptStates
from ..models.target import Target
from .flops import counted
from .memory import MB, fits, free_memory
from .teacher_batch import TeacherBatch, layers_read, read_states, teacher_batch_of

CALIBRATION_BATCHES = 4
COUNTED_TOKENS = 96
"""Of the longest row on which the target's operations are counted."""
SHARE_KEPT = 0.25
"""Of the memory that is free before a run, what the kept states of the target may take."""


class AnswerStream:
    """Batches in their order, and the target's output on each."""

    def __init__(
        self,
        target: Target,
        aux_layers: tuple[int, ...],
        answers: Sequence[Answer],
        plan: list[list[int]],
        hold: bool,
        accumulate: int = 1,
    ):
        self.target, self.aux_layers, self.answers, self.plan = target, aux_layers, answers, plan
        self.hold, self.accumulate = hold, accumulate
        self.kept: KeptStates | None = None
        self.kept_mb = 0.0
        self._last: list[int] = []

    def keep(self, heldout: Sequence[Answer]) -> None:
        """Keep the target's states of answers that are read again, if they and those of the `heldout` answers fit into memory.

        Ranks of several machines keep nothing: each gets other answers in each epoch.
        """
        if not self.target.runs_layers:
            return
        uses = Counter(i for indices in self.plan for i in indices)
        looked_at = {i for indices in self.plan[:CALIBRATION_BATCHES] for i in indices}
        lengths = {
            i: len(self.answers[i].prompt) + self.answers[i].length
            for i, count in uses.items()
            if count > 1 or i in looked_at
        }
        width = len(layers_read(self.target, self.aux_layers)) * self.target.hidden_size
        own = sum(lengths.values())
        tokens = own + sum(len(a.prompt) + len(a.tokens) for a in heldout)
        size = tokens * width * self.target.dtype.itemsize / MB
        copies = ranks.size() if ranks.shares() == 1 else 1
        if not ranks.all_agree(copies * size <= SHARE_KEPT * free_memory(torch.device("cpu"))):
            return
        block = None
        if ranks.shares() > 1:
            block = shared_tensor((own, width), self._dtype())
            if block is None:
                return
        parts = [
            [indices[i] for i in places]
            for indices in self.plan
            for rank in range(ranks.shares())
            for places in shares(len(indices), self.accumulate, rank)
        ]
        self.kept, self.kept_mb = KeptStates(self._states_of_rows, lengths, parts, block), size

    def with_kept(self, predicted: float) -> float:
        """The predicted peak in MB plus the kept states, which are dropped where they do not fit next to the run."""
        if self.target.device.type != "cpu" or self.kept is None:
            return predicted
        if ranks.all_agree(fits(self.target.device, predicted + self.kept_mb)):
            return predicted + self.kept_mb
        self.kept = None
        return predicted

    @torch.no_grad()
    def _dtype(self) -> torch.dtype:
        """The type of the states, which may be another than that of the weights."""
        first = self.plan[0][:1]
        with self.target.giving([self.answers[first[0]]]):
            row_11 = self._batch(first).tokens_BT[:, :1]
            return self.target.read(row_11, self.aux_layers, keep=1).features_BTF.dtype

    def _batch(self, indices: Sequence[int]) -> Batch:
        return collate([self.answers[i] for i in indices], self.target.device)

    def _states(self, indices: Sequence[int], batch: Batch) -> Tensor:
        with self.target.giving([self.answers[i] for i in indices]):
            return read_states(self.target, batch, self.aux_layers)

    def _states_of_rows(self, indices: Sequence[int]) -> list[Tensor]:
        batch = self._batch(indices)
        return batch.rows_of(self._states(indices, batch))

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Operations of the target for a token of the first batch, padding counted, and of its head for one token a row; of
        all processes that hold it together.

        They grow with a row as a polynomial of degree two, which three short rows tell: to read the batch once more would
        take as long as a step.
        """
        answers = [self.answers[i] for i in self.plan[0]]
        longest = max(len(a.prompt) + a.length for a in answers)
        one = answers[:1]
        row_1T = collate(one, self.target.device).tokens_BT
        third = min(row_1T.shape[1], COUNTED_TOKENS) // 3

        def of_row(tokens: int) -> float:
            with self.target.giving(one):
                return counted(
                    lambda: self.target.read(row_1T[:, :tokens], self.aux_layers, keep=1)
                )

        first, second, last = (of_row(third * times) for times in (1, 2, 3))
        at = longest / third - 1
        bend = last - 2 * second + first
        return ranks.of_all(first + at * (second - first) + at * (at - 1) / 2 * bend) / longest

    @functools.cached_property
    def first_teacher_batches(self) -> list[TeacherBatch]:
        """What runs look at before they train, read once for all."""
        first = range(len(self.plan[:CALIBRATION_BATCHES]))
        if self.kept is not None:
            for at in first:
                for places in shares(len(self.plan[at]), self.accumulate):
                    self.kept.of([self.plan[at][i] for i in places], self.target.device)
            ranks.wait()
            self._note(first)
        return [self._read(self.plan[at], (), self.kept) for at in first]

    def teacher_batch(self, at: int) -> TeacherBatch:
        """A whole batch, for probes of how long a step takes; the target reads those of which nothing is kept yet."""
        kept = self.kept if at < CALIBRATION_BATCHES else None
        return self._read(self.plan[at % len(self.plan)], (), kept)

    def parts(self, at: int) -> Iterator[TeacherBatch]:
        """This rank's share of a batch, in so many parts as are accumulated; a share may be empty.

        Between two steps the ranks wait for each other, as they add up their gradients.
        """
        indices = self.plan[at]
        self._note(self._last)
        self._last = [at]
        for places in shares(len(indices), self.accumulate):
            yield self._read([indices[i] for i in places], places, self.kept)

    def _note(self, steps: Iterable[int]) -> None:
        """What the ranks read for some steps is there now."""
        if self.kept is not None:
            self.kept.others_read(i for at in steps for i in self.plan[at])

    def _read(
        self, indices: Sequence[int], places: Sequence[int], kept: KeptStates | None
    ) -> TeacherBatch:
        began = time.monotonic()
        batch = self._batch(indices)
        if kept is None:
            states_BTW = self._states(indices, batch)
        else:
            states_BTW = kept.of(indices, self.target.device)
        teacher_batch = teacher_batch_of(
            self.target, batch, self.aux_layers, states_BTW, hold=self.hold
        )
        return dataclasses.replace(
            teacher_batch, seconds=time.monotonic() - began, places=tuple(places)
        )

    def length(self, begin: int, end: int) -> int:
        """Real tokens of some steps."""
        return self._tokens(i for batch in self.plan[begin:end] for i in batch)

    def read(self, end: int) -> int:
        """Tokens that the target reads for the steps before `end`."""
        rows = [i for indices in self.plan[:end] for i in indices]
        return self._tokens(rows if self.kept is None else set(rows))

    def _tokens(self, rows: Iterable[int]) -> int:
        return sum(len(self.answers[i].prompt) + self.answers[i].length for i in rows)
