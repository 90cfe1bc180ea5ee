"""The target's KV cache: full length, written in place, rolled back exactly, a length for each row.

Transformers' dynamic cache concatenates all keys and values at every step, which costs more than
the rest of a small model's forward pass together. This one writes into buffers that grow by
doubling, so a step costs its own tokens and forgetting the last ones costs nothing. Sliding
windows are kept by the attention mask, so every layer may stay at full length.

Rows of one length need no mask of ours. Rows of different lengths are written each at its own
end, with a mask over slots that every attention layer of the target gets.

Shapes: B rows, G key/value heads, T tokens, C head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..errors import UserError
from ..slots import Slots, positions, visible
from ..target import Reading, Target


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [B, G, T, C]: views of larger buffers."""

    slots: Slots | None = None
    begins: Sequence[int] | None = None
    """Where each row's next tokens go; None while all rows have the length that is shown."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new positions and return all of them."""
        if self.slots is None:
            self.lazy_initialization(key_states, value_states)
            self.slots = Slots()
        begins = self.begins or [self.get_seq_length()] * key_states.shape[0]
        self.keys, self.values = self.slots.write(key_states, value_states, begins)
        return self.keys, self.values

    def show(self, length: int) -> None:
        """Show the first `length` positions."""
        assert self.slots is not None, "nothing was cached yet"
        self.keys, self.values = self.slots.shown(length)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch."""
        if self.slots is not None:
            length = self.get_seq_length()
            self.slots.keep_rows(rows)
            self.show(length)


class RowCache:
    """The cache of a batch, with a length per row."""

    def __init__(self, target: Target, rows: int):
        self.target = target
        self.layers = new_cache(target)
        self.lengths = [0] * rows

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
        begins = list(self.lengths)
        uneven = min(begins) != max(begins)
        for layer in self.layers.layers:
            layer.begins = begins if uneven else None
            if not uneven and begins[0]:
                layer.show(begins[0])
        extra: dict[str, Any] = {}
        if uneven:
            extra = {
                "position_ids": positions(begins, T, tokens_BT.device),
                "attention_mask": _masks(self.target, begins, T),
            }
        reading = self.target.read(tokens_BT, taps, self.layers, keep=keep, **extra)
        self.lengths = [n + c for n, c in zip(begins, counts or [T] * len(begins), strict=True)]
        return reading

    def roll_back(self, tokens: Sequence[int]) -> None:
        """Forget the last tokens of each row."""
        self.lengths = [n - t for n, t in zip(self.lengths, tokens, strict=True)]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        keep_rows(self.layers, torch.tensor(list(rows), device=self.target.device))
        self.lengths = [self.lengths[row] for row in rows]


def new_cache(target: Target) -> Any:
    """An empty cache of Transformers' shape. Raises UserError for targets whose state cannot be
    rolled back."""
    if getattr(target.model, "_is_stateful", False):
        raise UserError(
            f"{target.name} keeps a recurrent state, which cannot be rolled back after a rejected "
            "token; speculative decoding needs an attention cache"
        )
    return Cache(layer_class_to_replicate=GrowingLayer)


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Keep only some sequences of a batch."""
    for layer in cache.layers:
        layer.keep_rows(rows)


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


def _masks(target: Target, begins: Sequence[int], count: int) -> Any:
    """What the target's attention takes as mask over slots: one, or one for each kind of layer."""
    config = target.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return _as_taken(target, visible(begins, count, window, target.device))
    windows = {"full_attention": None, "sliding_attention": window}
    unknown = kinds - set(windows)
    if unknown:
        raise UserError(f"{target.name} has layers of kind {', '.join(sorted(unknown))}")
    return {
        kind: _as_taken(target, visible(begins, count, windows[kind], target.device))
        for kind in kinds
    }


def _as_taken(target: Target, seen: Tensor) -> Tensor:
    """A boolean mask for sdpa, an additive one for eager attention."""
    how = target.model.config.get_text_config()._attn_implementation
    if how == "sdpa":
        return seen
    if how == "eager":
        hidden = torch.finfo(target.dtype).min
        return torch.zeros(seen.shape, dtype=target.dtype, device=seen.device).masked_fill(
            ~seen, hidden
        )
    raise UserError(f"attention implementation {how} takes no mask per row; use sdpa or eager")
