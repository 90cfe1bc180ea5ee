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
from ..model_cache import UNSTEADY, Rows, keep_rows
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

    Found by trying once: two rows together, and the shorter one alone.
    """
    if target not in _ALONE:
        _ALONE[target] = _try_uneven(target)
    return _ALONE[target]


ROUNDINGS = {torch.bfloat16: 4.0, torch.float16: 8.0, torch.float32: 64.0, torch.float64: 64.0}
"""Relative difference of logits that is always rounding, in units of eps."""
_ALONE: WeakKeyDictionary[Target, str] = WeakKeyDictionary()


def _try_uneven(target: Target) -> str:
    """Two rows of different lengths read together, and the shorter one alone in two ways.

    How far the two ways alone lie apart is what rounding does in this model and dtype.
    """
    long, short, new = 5 + _local_window(target), 2, 4
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, target.vocab_size, (2, long + new), generator=draw)
    tokens = tokens.to(target.device)
    row = torch.cat([tokens[1:, :short], tokens[1:, long:]], 1)
    try:
        cache = RowCache(target, 2)
        cache.read(tokens[:, :long], (), counts=[long, short], keep=1)
        together = cache.read(tokens[:, long:], (), keep=new).logits_BTV[1].double()
        cache = RowCache(target, 1)
        cache.read(row[:, :short], (), keep=1)
        stepwise = cache.read(row[:, short:], (), keep=new).logits_BTV[0].double()
        alone = target.read(row, (), keep=new).logits_BTV[0].double()
    except Exception as problem:  # noqa: BLE001 - any refusal of the model's means the same here
        return f"its model refuses a mask per row ({type(problem).__name__}: {problem})"
    scale = alone.square().mean().sqrt()
    far, own = ((x - alone).square().mean().sqrt() / scale for x in (together, stepwise))
    if not own <= UNSTEADY:
        return f"its model answers the same tokens with logits that differ by {float(own):.1e} of their size"
    if not far <= max(4 * float(own), ROUNDINGS[target.dtype] * torch.finfo(target.dtype).eps):
        return (
            f"its model does not keep to a mask per row (logits are off by {float(far):.1e} of their "
            f"size, by {float(own):.1e} through rounding alone)"
        )
    return ""


def _local_window(target: Target) -> int:
    """The longest local window that a model has apart from the masks it is given; 0 without one."""
    config = target.model.config.get_text_config()
    named = {k: v for k, v in vars(config).items() if "window" in k and k != "sliding_window"}
    sizes = [v for v in named.values() if isinstance(v, int) and not isinstance(v, bool)]
    return max((size for size in sizes if size < target.max_positions // 2), default=0)
