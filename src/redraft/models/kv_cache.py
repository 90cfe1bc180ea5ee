"""A causal LM's KV cache: full length, written in place, rolled back exactly, a length for each row.

Transformers' dynamic cache concatenates all keys and values at every step, which costs more than
the rest of a small model's forward pass together. This one writes into buffers that grow by
doubling, so a step costs its own tokens and forgetting the last ones costs nothing. Sliding
windows are kept by the attention mask, so every layer may stay at full length.

Rows of one length need no mask of ours. Rows of different lengths are written each at its own
end, with a mask over slots that every attention layer of the model gets.

Shapes: B rows, G key/value heads, T tokens, C head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..core.errors import UserError
from .kv_slots import Slots, positions, visible
from .target import Reading, Target

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers (`layer_types`) whose whole state is keys and values."""


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


class Rows:
    """The cache of a batch that `model` (a causal LM or its body) reads, with a length per row."""

    def __init__(self, model: Any, rows: int, name: str):
        self.model, self.name = model, name
        self.layers = _cache_of(model, name)
        self.lengths = [0] * rows

    def place(self, count: int) -> dict[str, Any]:
        """Prepare `count` tokens after each row's own; what else the model's call needs."""
        begins = list(self.lengths)
        uneven = min(begins) != max(begins)
        for layer in self.layers.layers:
            layer.begins = begins if uneven else None
            if not uneven and begins[0]:
                layer.show(begins[0])
        if not uneven:
            return {}
        parameter = next(self.model.parameters())
        return {
            "position_ids": positions(begins, count, parameter.device),
            "attention_mask": _masks(self.model, self.name, begins, count, parameter),
        }

    def grow(self, counts: Sequence[int]) -> None:
        """Count tokens that were read; what was read past a row's own is padding, and overwritten."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def roll_back(self, tokens: Sequence[int]) -> None:
        """Drop the last tokens of each row."""
        self.lengths = [n - t for n, t in zip(self.lengths, tokens, strict=True)]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        device = next(self.model.parameters()).device
        keep_rows(self.layers, torch.tensor(list(rows), device=device))
        self.lengths = [self.lengths[row] for row in rows]


class RowCache(Rows):
    """The cache of a batch, with a length per row."""

    def __init__(self, target: Target, rows: int):
        super().__init__(target.model, rows, target.name)
        self.target = target

    def read(
        self,
        tokens_BT: Tensor,
        aux_layers: Sequence[int],
        counts: Sequence[int] | None = None,
        keep: Tensor | int = 0,
    ) -> Reading:
        """Read tokens that follow each row's own; `counts` are how many of the T are real.

        The rest is padding on the right: it is hidden from every real token and overwritten. `keep`
        are the token indices whose logits are wanted (a whole number: that many last ones).
        """
        T = tokens_BT.shape[1]
        placed = self.place(T)
        reading = self.target.read(tokens_BT, aux_layers, self.layers, keep=keep, **placed)
        self.grow(counts or [T] * len(self.lengths))
        return reading


class PromptCache:
    """The cache of a prompt that any tokens are read after, and taken back.

    Where the model keeps a recurrent state, the prompt's is copied each time.
    """

    def __init__(self, target: Target, tokens_BT: Tensor, aux_layers: Sequence[int]):
        self.target, self._length = target, tokens_BT.shape[1]
        self._cache = new_cache(target)
        self.reading = target.read(tokens_BT, aux_layers, self._cache, keep=1)
        self._kept = copy.deepcopy(self._cache) if is_recurrent(target.model) else None

    def read(self, tokens_BT: Tensor, aux_layers: Sequence[int]) -> Reading:
        """Read tokens after those that are there."""
        return self.target.read(tokens_BT, aux_layers, self._cache)

    def back(self) -> None:
        """Take back all but the prompt."""
        if self._kept is not None:
            self._cache = copy.deepcopy(self._kept)
            return
        for layer in self._cache.layers:
            layer.show(self._length)


def new_cache(target: Target) -> Any:
    """An empty cache of Transformers' shape, for tokens that are never taken back."""
    if is_recurrent(target.model):
        return DynamicCache(config=target.model.config)
    return Cache(layer_class_to_replicate=GrowingLayer)


def is_recurrent(model: Any) -> bool:
    """Whether a model keeps more than keys and values, so that no token can be taken back."""
    if _layer_types(model):
        return bool(_recurrent_kinds(model))
    return bool(getattr(model, "_is_stateful", False))


def _layer_types(model: Any) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def _recurrent_kinds(model: Any) -> list[str]:
    return sorted(_layer_types(model) - ATTENTION)


def _cache_of(model: Any, name: str) -> Any:
    """An empty cache of Transformers' shape. Raises UserError for models whose state cannot be
    rolled back."""
    if is_recurrent(model):
        others = _recurrent_kinds(model)
        named = f" (layers of kind {', '.join(others)})" if others else ""
        raise UserError(
            f"{name} keeps a recurrent state{named}, which cannot be rolled back after a rejected token: redraft answers "
            "with it, trains and replays, but does not decode speculatively; the serving engine does"
        )
    return Cache(layer_class_to_replicate=GrowingLayer)


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Keep only some sequences of a batch."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.keep_rows(rows)
        else:
            layer.reorder_cache(rows)


def _masks(model: Any, name: str, begins: Sequence[int], count: int, like: Tensor) -> Any:
    """What the model's attention takes as mask over slots: one, or one for each kind of layer."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := kinds - set(windows):
        raise UserError(f"{name} has layers of kind {', '.join(sorted(unknown))}")

    def mask(window: int | None) -> Tensor:
        return _as_taken(config, visible(begins, count, window, like.device), like)

    return {kind: mask(windows[kind]) for kind in kinds} if kinds else mask(window)


def _as_taken(config: Any, seen: Tensor, like: Tensor) -> Tensor:
    """A boolean mask for sdpa, an additive one for eager attention."""
    how = config._attn_implementation
    if how == "sdpa":
        return seen
    if how == "eager":
        hidden = torch.finfo(like.dtype).min
        return torch.zeros(seen.shape, dtype=like.dtype, device=seen.device).masked_fill(
            ~seen, hidden
        )
    raise UserError(f"attention implementation {how} takes no mask per row; use sdpa or eager")
