"""Keys and values of several rows in buffers that grow by doubling; every row has its own length.

A token's slot is its position in its row. Rows of one length are written side by side as a slice;
rows of different lengths are scattered, and a mask hides from each what lies past its own end.
Forgetting the last tokens of a row costs nothing: its length shrinks and the slots are overwritten.

Shapes: B rows, G key/value heads, T new tokens, S slots, C head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 128


class Slots:
    """Buffers [B, G, S, C] of keys and values. They do not know the rows' lengths."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, k_BGTC: Tensor, v_BGTC: Tensor, begins: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put each row's new tokens at its own `begins`; all slots up to the furthest end, as views."""
        begin, T = max(begins), k_BGTC.shape[2]
        end = begin + T
        if self.keys is None or self.values is None or self.keys.shape[2] < end:
            self.keys = _grown(self.keys, k_BGTC, end)
            self.values = _grown(self.values, v_BGTC, end)
        if min(begins) == begin:
            self.keys[:, :, begin:end] = k_BGTC
            self.values[:, :, begin:end] = v_BGTC
        else:
            rows = torch.arange(len(begins), device=k_BGTC.device)[:, None]
            slots = positions(begins, T, k_BGTC.device)
            self.keys[rows, :, slots] = k_BGTC.transpose(1, 2)
            self.values[rows, :, slots] = v_BGTC.transpose(1, 2)
        return self.shown(end)

    def shown(self, end: int) -> tuple[Tensor, Tensor]:
        """The first `end` slots of all rows, as views."""
        if self.keys is None or self.values is None:
            raise AssertionError("nothing was written yet")
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


def positions(begins: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Positions [B, T] of the `count` tokens that follow each row's `begins`."""
    begins_B = torch.tensor(list(begins), device=device)
    return begins_B[:, None] + torch.arange(count, device=device)


def visible(begins: Sequence[int], count: int, window: int | None, device: torch.device) -> Tensor:
    """Which slots each new token sees, bool [B, 1, T, S]: its own row up to itself.

    With a `window` it sees that many positions, its own included.
    """
    at_BT1 = positions(begins, count, device)[..., None]
    slots_S = torch.arange(max(begins) + count, device=device)
    seen = slots_S <= at_BT1
    if window is not None:
        seen &= slots_S > at_BT1 - window
    return seen[:, None]


def _grown(old: Tensor | None, like: Tensor, need: int) -> Tensor:
    """Zeros, not empty memory: a hidden slot is multiplied by a weight of 0, which no NaN survives."""
    B, G, _, C = like.shape
    size = max(SMALLEST, 1 << (need - 1).bit_length())
    new = torch.zeros(B, G, size, C, dtype=like.dtype, device=like.device)
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new
