"""The stream of batches that adapters train on, with the target's output on each.

The target's states of an answer are the same in every epoch, so they are kept in memory where they fit.
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

    def keep(self, heldout: Sequence[Answer]) -> None:
        """Keep the target's states of answers that are read again, if they and those of the `heldout` answers fit into memory.

        Several processes keep nothing: each gets other answers in each epoch.
        """
        if not self.target.runs_layers or ranks.shares() > 1:
            return
        uses = Counter(i for indices in self.plan for i in indices)
        looked_at = {i for indices in self.plan[:CALIBRATION_BATCHES] for i in indices}
        lengths = {
            i: len(self.answers[i].prompt) + self.answers[i].length
            for i, count in uses.items()
            if count > 1 or i in looked_at
        }
        width = len(layers_read(self.target, self.aux_layers)) * self.target.hidden_size
        tokens = sum(lengths.values()) + sum(len(a.prompt) + len(a.tokens) for a in heldout)
        size = tokens * width * self.target.dtype.itemsize / MB
        free = free_memory(torch.device("cpu"))
        if not ranks.agreed(size * ranks.size() <= SHARE_KEPT * free):
            return
        parts = [
            [indices[i] for i in places]
            for indices in self.plan
            for places in shares(len(indices), self.accumulate)
        ]
        self.kept, self.kept_mb = KeptStates(self._states_of_rows, lengths, parts), size

    def with_kept(self, predicted: float) -> float:
        """The predicted peak in MB plus the kept states, which are dropped where they do not fit next to the run."""
        if self.target.device.type != "cpu" or self.kept is None:
            return predicted
        if ranks.agreed(fits(self.target.device, predicted + self.kept_mb)):
            return predicted + self.kept_mb
        self.kept = None
        return predicted

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
        return [self._read(indices, (), self.kept) for indices in self.plan[:CALIBRATION_BATCHES]]

    def teacher_batch(self, at: int) -> TeacherBatch:
        """A whole batch as the target reads it, for probes of how long that takes."""
        return self._read(self.plan[at % len(self.plan)], (), None)

    def parts(self, at: int) -> Iterator[TeacherBatch]:
        """This rank's share of a batch, in so many parts as are accumulated; a share may be empty."""
        indices = self.plan[at]
        for places in shares(len(indices), self.accumulate):
            yield self._read([indices[i] for i in places], places, self.kept)

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
