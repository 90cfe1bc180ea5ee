"""The target's KV cache, with a length for each row: see `model_cache.py`.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import model_cache
from ..model_cache import Rows, keep_rows
from ..target import Reading, Target

__all__ = ["RowCache", "keep_rows", "new_cache", "why_alone"]


class RowCache(Rows):
    """The cache of a batch, with a length per row."""

    def __init__(self, target: Target, rows: int):
        super().__init__(target.model, rows, target.name)
        self.target = target

    def read(
        self,
        tokens_BT: Tensor,
        taps: Sequence[int],
        counts: Sequence[int] | None = None,
        keep: Tensor | int = 0,
    ) -> Reading:
        """Read tokens that follow each row's own; `counts` says how many of the T are real.

        The rest is padding on the right: it is hidden from every real token and overwritten. `keep`
        are the token indices whose logits are wanted (a whole number: that many last ones).
        """
        T = tokens_BT.shape[1]
        placed = self.place(T)
        reading = self.target.read(tokens_BT, taps, self.layers, keep=keep, **placed)
        self.grow(counts or [T] * len(self.lengths))
        return reading


def new_cache(target: Target) -> Any:
    """An empty cache of Transformers' shape. Raises UserError for targets whose state cannot be
    rolled back."""
    return model_cache.new_cache(target.model, target.name)


def why_alone(target: Target) -> str:
    """Why rows of different lengths cannot be read together by this target; empty if they can.

    Found by trying once: two short rows together, and the shorter one alone.
    """
    if target not in _ALONE:
        _ALONE[target] = _try_uneven(target)
    return _ALONE[target]


_ALONE: WeakKeyDictionary[Target, str] = WeakKeyDictionary()


def _try_uneven(target: Target) -> str:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, target.vocab_size, (2, 9), generator=draw).to(target.device)
    try:
        cache = RowCache(target, 2)
        cache.read(tokens[:, :5], (), counts=[5, 2])
        together = cache.read(tokens[:, 5:9], (), keep=4).logits_BTV[1]
        alone = target.read(torch.cat([tokens[1:, :2], tokens[1:, 5:9]], 1), ()).logits_BTV[0, 2:]
    except Exception as problem:  # noqa: BLE001 - any refusal of the model's means the same here
        return f"its model refuses a mask per row ({type(problem).__name__}: {problem})"
    far = float((together.double() - alone.double()).abs().max() / alone.double().abs().max())
    if far > 64 * torch.finfo(alone.dtype).eps ** 0.75:
        return f"its model does not keep to a mask per row (logits are off by {far:.1e})"
    return ""
