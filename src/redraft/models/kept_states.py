"""States that the target read of some rows, kept in this machine's memory for the next time they are asked for.

The target does not change while a draft is trained, so that it says the same of an answer in every epoch. Its pass over
the answers is the larger part of training: about two thirds of the operations with SmolLM2 and an EAGLE-3 draft.

Shapes: B rows, T tokens, W numbers of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    ):
        """`read` gives the states [T, W] of rows that are read side by side, for each row its own. `lengths` are the tokens of
        the rows that are kept; others are read whenever they are asked for.

        `together` names which rows are read side by side, the first mention of a row counts: numbers are rounded otherwise in
        another company, and a resumed run is to read what an uninterrupted one did. Rows without a mention are read with those
        that they are asked for with.
        """
        self._read, self._lengths = read, lengths
        self._company = {row: rows for rows in reversed(together) for row in rows}
        self._begins: dict[int, int] = {}
        self._used = 0
        self._states: Tensor | None = None
        """All rows in one block: many small ones would tear the heap between the batches of training."""

    def of(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The states [B, T, W] of some rows, zeros past the end of each."""
        fresh: dict[int, Tensor] = {}
        for row in rows:
            if row not in fresh and row not in self._begins:
                company = self._company.get(row, rows)
                fresh.update(zip(company, self._read(company), strict=True))
        found = [fresh[row] if row in fresh else self._held(row).to(device) for row in rows]
        for row, states_TW in fresh.items():
            self._keep(row, states_TW)
        return pad_sequence(found, batch_first=True)

    def _held(self, row: int) -> Tensor:
        assert self._states is not None, "a row has a place"
        return self._states[self._begins[row] :][: self._lengths[row]]

    def _keep(self, row: int, states_TW: Tensor) -> None:
        if row in self._begins or row not in self._lengths:
            return
        if self._states is None:
            size = (sum(self._lengths.values()), states_TW.shape[1])
            self._states = torch.empty(size, dtype=states_TW.dtype)
        self._begins[row] = self._used
        self._used += self._lengths[row]
        self._held(row).copy_(states_TW)
