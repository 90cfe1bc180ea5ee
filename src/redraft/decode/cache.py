"""The target's KV cache: full length, written in place, rolled back exactly.

Transformers' dynamic cache concatenates all keys and values at every step, which costs more than
the rest of a small model's forward pass together. This one writes into buffers that grow by
doubling, so a step costs its own tokens and forgetting the last ones costs nothing. Sliding
windows are kept by the attention mask, so every layer may stay at full length.

Shapes: B batch, G key/value heads, T tokens, C head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..errors import UserError
from ..target import Target

SMALLEST = 256


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [B, G, T, C]: views of larger buffers."""

    buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new positions and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if self.buffers is None or self.buffers[0].shape[2] < end:
            self.buffers = (
                _grown(self.keys, key_states, begin, end),
                _grown(self.values, value_states, begin, end),
            )
        keys, values = self.buffers
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self._show(end)
        return self.keys, self.values

    def roll_back(self, tokens: int) -> None:
        """Forget the last `tokens` positions."""
        self._show(self.get_seq_length() - tokens)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch."""
        length = self.get_seq_length()
        if self.buffers is not None:
            self.buffers = (self.buffers[0][rows], self.buffers[1][rows])
            self._show(length)

    def _show(self, length: int) -> None:
        assert self.buffers is not None, "nothing was cached yet"
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def new_cache(target: Target) -> Any:
    """An empty cache. Raises UserError for targets whose state cannot be rolled back."""
    if getattr(target.model, "_is_stateful", False):
        raise UserError(
            f"{target.name} keeps a recurrent state, which cannot be rolled back after a rejected "
            "token; speculative decoding needs an attention cache"
        )
    return Cache(layer_class_to_replicate=GrowingLayer)


def roll_back(cache: Any, tokens: int) -> None:
    """Forget the last `tokens` positions of every layer."""
    if tokens:
        for layer in cache.layers:
            layer.roll_back(tokens)


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Keep only some sequences of a batch."""
    for layer in cache.layers:
        layer.keep_rows(rows)


def _grown(old: Tensor, like: Tensor, filled: int, need: int) -> Tensor:
    B, G, _, C = like.shape
    size = max(SMALLEST, 1 << (need - 1).bit_length())
    new = torch.empty(B, G, size, C, dtype=like.dtype, device=like.device)
    if filled:
        new[:, :, :filled] = old
    return new
