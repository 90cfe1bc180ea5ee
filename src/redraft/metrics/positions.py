"""Steps by where in the answer they begin: the same steps, pooled in bins of position.

A position is an index into the answer, from 0. Position 0 is the prefill's own token, which belongs to
no step, so the first step begins at 1; a step that accepts n tokens moves on by n + 1. A step
counts in the bin in which it begins, with all that it accepted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

Counts = tuple[int, int]
"""Accepted tokens and steps."""


def step_positions(accepted: Sequence[int]) -> list[int]:
    """The position of the first token that each step decides, from how many it accepted."""
    found, at = [], 1
    for count in accepted:
        found.append(at)
        at += count + 1
    return found


def binned_steps(accepted: Sequence[int], edges: Sequence[int]) -> tuple[Counts, ...]:
    """(accepted, steps) of one answer in each bin [edges[i], edges[i + 1]).

    `edges` rise; steps that begin outside of them are left out.
    """
    bins = [[0, 0] for _ in edges[1:]]
    for at, count in zip(step_positions(accepted), accepted, strict=True):
        index = bisect_right(edges, at) - 1
        if 0 <= index < len(bins):
            bins[index][0] += count
            bins[index][1] += 1
    return tuple((gained, steps) for gained, steps in bins)
