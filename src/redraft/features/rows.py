"""Stored hidden states of a target, in whatever layout: what a reader of each gives.

A row is one sample, a prompt with its answer. Its states are [S, L+1, H]: the auxiliary hs[] in
ascending order, then the last state, before the target's final norm (`pre_norm`) or after it.

Shapes: S tokens of a row, L aux layers, H target hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.records import Answer

TOKENS, STATES = "token_ids", "hidden_states"


class FeatureRows(ABC):
    """The rows of one folder, each read when it is asked for."""

    layout: str
    folder: Path
    aux_layers: tuple[int, ...]
    pre_norm: bool
    dtype: torch.dtype
    hidden_size: int
    tokens: Sequence[np.ndarray[Any, Any]]
    """Token ids of each row, prompt and answer."""

    @abstractmethod
    def states(self, row: int, stop: int | None = None) -> Tensor:
        """States [S, L+1, H] of a row, of its first `stop` tokens if that is given.

        Raises UserError for a damaged file.
        """

    @abstractmethod
    def answers(self) -> list[Answer]:
        """The rows as answers, in their order. Raises UserError where the folder does not say."""

    @cached_property
    def index(self) -> RowIndex:
        return RowIndex(self.tokens)

    def columns(self, aux_layers: Sequence[int]) -> list[int]:
        """Where `aux_layers` and the last state lie among a row's states; raises UserError if they do not."""
        missing = [aux_layer for aux_layer in aux_layers if aux_layer not in self.aux_layers]
        if missing:
            raise UserError(
                f"{self.folder} holds {_named(self.aux_layers)} and the last state, not {_named(missing)}; "
                "write the features of this draft: redraft features --draft DRAFT"
            )
        return [
            *(self.aux_layers.index(aux_layer) for aux_layer in aux_layers),
            len(self.aux_layers),
        ]


class RowIndex:
    """Finds the stored row that begins with given tokens.

    By the states' causality, what is stored of a longer row holds for its beginning.
    """

    def __init__(self, tokens: Sequence[np.ndarray[Any, Any]]):
        keys = [_key(row) for row in tokens]
        self._order = sorted(range(len(keys)), key=keys.__getitem__)
        self._keys = [keys[row] for row in self._order]

    def find(self, tokens: np.ndarray[Any, Any]) -> tuple[int, int]:
        """The row that agrees with `tokens` for longest, and for how many of them; (-1, 0) for none."""
        key = _key(tokens)
        at = bisect_left(self._keys, key)
        best = (-1, 0)
        for near in (at - 1, at):  # in sorted order the closest are neighbours
            if 0 <= near < len(self._keys):
                common = _common(self._keys[near], key)
                if common > best[1]:
                    best = (self._order[near], common)
        return best


def row_tokens(answer: Answer) -> np.ndarray[Any, Any]:
    """The token ids of a row: the prompt, the answer, and what was kept past its end."""
    return np.array([*answer.prompt, *answer.tokens], dtype=np.int64)


def loss_mask(answer: Answer) -> list[int]:
    """1 for each token of the answer, its first and its stop token included, as other tools mark it."""
    rest = len(answer.tokens) - answer.length
    return [0] * len(answer.prompt) + [1] * answer.length + [0] * rest


def answer_of(id: str, tokens: Sequence[int], mask: Sequence[int]) -> Answer:
    """The answer that a loss mask marks: its last run of ones, what is before it being the prompt.

    A mask does not record how the answer was sampled or ended: it counts as greedy, and as cut.
    Raises UserError for a mask without ones.
    """
    marked = np.flatnonzero(np.asarray(mask))
    if not len(marked) or len(mask) != len(tokens):
        raise UserError(
            f"row {id}: {len(tokens)} tokens with a loss mask of {len(mask)}, {len(marked)} of them "
            "marked; expected one of the same length that marks an answer"
        )
    end = int(marked[-1]) + 1
    breaks = np.flatnonzero(np.diff(marked) > 1)
    begin = int(marked[breaks[-1] + 1]) if len(breaks) else int(marked[0])
    plain = tuple(int(token) for token in tokens)
    return Answer(id, plain[:begin], plain[begin:], end - begin, "length")


def _key(row: np.ndarray[Any, Any]) -> bytes:
    """Bytes that sort as the tokens do."""
    return row.astype(">u4").tobytes()


def _common(one: bytes, other: bytes) -> int:
    """Tokens that two rows begin with alike."""
    short = min(len(one), len(other)) // 4
    a, b = (np.frombuffer(key, ">u4", short) for key in (one, other))
    differ = np.flatnonzero(a != b)
    return int(differ[0]) if len(differ) else short


def _named(aux_layers: Sequence[int]) -> str:
    return ", ".join(f"hs[{aux_layer}]" for aux_layer in aux_layers) or "no aux layer"
