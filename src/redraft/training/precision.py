"""Which arithmetic trains faster here, found by trying: fp32, or bf16 autocast."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ..core import ranks

PROBE_SECONDS, ENOUGH_SECONDS = 0.2, 5.0
"""Timed at least, and after which no further round is timed."""
ROUNDS = 3
WORTH = 1.5
"""bf16 must be this many times faster to be chosen. On a CPU its products are compiled for each new
shape, and once more shapes than the library caches have been seen it slows down: a lead smaller
than this was lost again within a hundred batches."""
WORTH_FIXED = 1.15
"""The same where all batches have one shape, and for long steps, next to which compiling costs little; fp32 is
the more exact where they tie."""
LONG_SECONDS = 0.5
"""A long step in fp32. On SmolLM2 bf16 led by 1.51 over 46 batches of 2,048 tokens and kept its lead."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context a training step runs in."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def choose_precision(
    device: torch.device, step: Callable[[int], None], worth: float = WORTH
) -> str:
    """'bf16' where `step` (a forward and backward that leaves nothing behind) is clearly faster.

    `step(i)` must take the i-th batch: a probe that repeats one batch would never meet a new shape.
    """
    seconds = {"fp32": 0.0, "bf16": 0.0}
    for precision in seconds:
        with autocast(device, precision):
            step(0)  # warm-up
    rounds, spent = 1, 0.0
    while spent < PROBE_SECONDS or (rounds <= ROUNDS and spent < ENOUGH_SECONDS):
        for precision in seconds:
            began = time.perf_counter()
            with autocast(device, precision):
                step(rounds)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[precision] += ranks.agreed(time.perf_counter() - began)
        rounds, spent = rounds + 1, sum(seconds.values())
    if seconds["fp32"] / (rounds - 1) >= LONG_SECONDS:
        worth = min(worth, WORTH_FIXED)
    return "bf16" if seconds["bf16"] * worth < seconds["fp32"] else "fp32"
