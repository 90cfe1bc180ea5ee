"""Hidden states of rows: the target computes them once, and this machine's memory keeps them.

The target does not change while a draft is trained, so its states of an answer are the same in every epoch. Its forward
pass is the larger part of training: about two thirds of the operations with SmolLM2 and an EAGLE-3 draft.

Shapes: B rows, T tokens, W numbers of a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class KeptStates:
    """The states of rows by their number, each read once."""

    def __init__(
        self,
        read: Callable[[Sequence[int]], Sequence[Tensor]],
        lengths: Mapping[int, int],
        together: Sequence[Sequence[int]] = (),
        block: Tensor | None = None,
    ):
        """`read` computes rows as one batch and returns the states [T, W] of each. `lengths` are the numbers of tokens of the
        rows to keep; other rows are read each time.

        `together` are the batches in which rows are read; the first with a row counts. A batch of other rows rounds otherwise,
        and a resumed run must get the numbers of an uninterrupted one. A row in none of them is read with the rows of the
        request.

        `block` [tokens of all rows, W] is where they are kept, which other processes may fill too (see `others_read`); without
        one it is made at the first reading. It is one, because many small ones would fragment the heap between training batches.
        """
        self._read, self._lengths, self._block = read, lengths, block
        self._batch_of = {row: rows for rows in reversed(together) for row in rows}
        ends = itertools.accumulate(lengths.values())
        self._ends = dict(zip(lengths, ends, strict=True))
        self._kept: set[int] = set()

    def of(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The states [B, T, W] of some rows, zeros past the end of each."""
        fresh: dict[int, Tensor] = {}
        for row in rows:
            if row not in fresh and row not in self._kept:
                batch = self._batch_of.get(row, rows)
                fresh.update(zip(batch, self._read(batch), strict=True))
        found = [self._place(row).to(device) if row in self._kept else fresh[row] for row in rows]
        for row, states_TW in fresh.items():
            self._keep(row, states_TW)
        return pad_sequence(found, batch_first=True)

    def others_read(self, rows: Iterable[int]) -> None:
        """Other processes filled the block's places of these rows, and of those that are read with them."""
        batches = (self._batch_of.get(row, (row,)) for row in rows)
        self._kept |= {row for batch in batches for row in batch} & self._lengths.keys()

    def _place(self, row: int) -> Tensor:
        assert self._block is not None, "a row was read"
        end = self._ends[row]
        return self._block[end - self._lengths[row] : end]

    def _keep(self, row: int, states_TW: Tensor) -> None:
        if row in self._kept or row not in self._lengths:
            return
        if self._block is None:
            size = (sum(self._lengths.values()), states_TW.shape[1])
            self._block = torch.empty(size, dtype=states_TW.dtype)
        self._place(row).copy_(states_TW)
        self._kept.add(row)
