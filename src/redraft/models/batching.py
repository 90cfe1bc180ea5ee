"""From answers to padded batches, planned before the work starts.

A plan is a list of index lists, so that a resumed run sees the same batches in the same order.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import ranks
from ..core.records import Answer, Prompt


@dataclass(frozen=True)
class Batch:
    """Answers side by side, padded on the right.

    `starts_B` is the index of each answer's first token; `ends_B` is one past its last label.
    Labels are the answer's tokens from the second on: the first comes from the prefill.
    """

    tokens_BT: Tensor
    starts_B: Tensor
    ends_B: Tensor

    @property
    def first(self) -> int:
        """The earliest chain start that any row needs: the pair before its first answer token."""
        return max(int(self.starts_B.min()) - 1, 0)

    def rows_of(self, some_BTX: Tensor) -> list[Tensor]:
        """`some_BTX` as one tensor per row, without padding."""
        return [row[:end] for row, end in zip(some_BTX, self.ends_B.tolist(), strict=True)]

    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every supervised label as (row, index in the row, offset from the answer's start), [M].

        Sorted by offset: chain step j is supervised on offsets of at least 1 + j (its chain must
        begin at the prefill's token or later), which is a suffix of this list.
        """
        positions = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)
        offset_BT = positions[None] - self.starts_B[:, None]
        row, index = ((offset_BT >= 1) & (positions < self.ends_B[:, None])).nonzero(as_tuple=True)
        offset = offset_BT[row, index]
        order = offset.argsort(stable=True)
        return row[order], index[order], offset[order]


def collate(answers: Sequence[Answer], device: torch.device, *, lookahead: bool = False) -> Batch:
    """Pad answers to one batch; with `lookahead` the tokens past the stop are kept and labelled."""
    rows = [[*a.prompt, *(a.tokens if lookahead else a.answer)] for a in answers]
    longest = max(len(row) for row in rows)
    padded = [row + [0] * (longest - len(row)) for row in rows]
    return Batch(
        torch.tensor(padded, device=device),
        torch.tensor([len(a.prompt) for a in answers], device=device),
        torch.tensor([len(row) for row in rows], device=device),
    )


def shares(rows: int, parts: int, rank: int | None = None) -> list[Sequence[int]]:
    """The places in a batch of so many rows that a rank (None: this one) computes, in at most so many parts; none is empty."""
    own = ranks.mine(range(rows), rank)
    cuts = [len(own) * part // parts for part in range(parts + 1)]
    return [own[a:b] for a, b in itertools.pairwise(cuts) if a < b]


def lengths_of(prompts: Sequence[Prompt]) -> Sequence[int]:
    """How many tokens each prompt has; a sequence that knows its `lengths` reads no prompt for it."""
    known: Sequence[int] | None = getattr(prompts, "lengths", None)
    return array("i", (len(prompt.tokens) for prompt in prompts)) if known is None else known


def plan_once(
    lengths: Sequence[int], batch_tokens: int, rows: int | None = None
) -> list[list[int]]:
    """Cover every sample once: sorted by length, as many as fit `batch_tokens` with padding, and at
    most `rows`."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return _fill(order, lengths, batch_tokens, rows)


def plan_in_order(lengths: Sequence[int], batch_tokens: int, rows: int) -> list[list[int]]:
    """The same without sorting: each batch is a run of neighbours."""
    return _fill(range(len(lengths)), lengths, batch_tokens, rows)


def _fill(
    order: Sequence[int], lengths: Sequence[int], batch_tokens: int, rows: int | None = None
) -> list[list[int]]:
    """Batches of neighbours in `order`, each within `batch_tokens` when padded to its longest, and of
    at most `rows`. A sample that alone exceeds the tokens is a batch of its own."""
    plan: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        size = len(plan[-1]) + 1 if plan else 1
        if plan and longest * size <= batch_tokens and (rows is None or size <= rows):
            plan[-1].append(index)
        else:
            plan.append([index])
            longest = lengths[index]
    return plan


def plan_epochs(
    lengths: Sequence[int], batch_tokens: int, epochs: float, seed: int
) -> list[list[int]]:
    """Length-bucketed batches over several epochs, in an order keyed by the seed.

    Samples of similar length are regrouped in each epoch; a fraction of an epoch takes that share
    of its batches, at least one.
    """
    plan: list[list[int]] = []
    for epoch in range(int(epochs) + (epochs % 1 > 0)):
        draw = random.Random(f"{seed}/{epoch}")
        jitter = [length * draw.uniform(0.9, 1.1) for length in lengths]
        order = sorted(range(len(lengths)), key=lambda i: (jitter[i], i))
        batches = _fill(order, lengths, batch_tokens)
        draw.shuffle(batches)
        share = min(epochs - epoch, 1.0)
        plan += batches[: max(1, round(len(batches) * share))]
    return plan
