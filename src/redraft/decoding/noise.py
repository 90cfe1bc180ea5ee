"""Noise keyed by (seed, position, token): the same numbers on every device, in any order.

A counter-based generator: each number is a hash of its place (the finaliser of splitmix64, applied
once per part of the key), so position t has its noise whichever step, batch or draft asks for it.
Two uses of one position never share numbers: each has a stream of its own.

Shapes: B rows, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOKEN, DRAFT, ACCEPT, REPLACE = range(4)
"""Streams: the target's own token, a draft's own token, acceptance, the token after a rejection."""

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def seeds_tensor(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Seeds of any size as int64 [B]."""
    return torch.tensor([_signed(seed) for seed in seeds], device=device)


def uniform(seeds_B: Tensor, at_BP: Tensor, stream: int) -> Tensor:
    """One number in (0, 1) for each position: float64 [B, P]."""
    return _unit(_place(seeds_B, at_BP, stream))


def gumbel(seeds_B: Tensor, at_BP: Tensor, vocabulary: int, stream: int = TOKEN) -> Tensor:
    """Standard Gumbel noise for each token of the vocabulary at each position: float64 [B, P, V].

    argmax(log p + noise) is a draw from p (the Gumbel-max trick).
    """
    tokens_V = torch.arange(1, vocabulary + 1, device=at_BP.device)
    numbers = _mix(_place(seeds_B, at_BP, stream)[..., None] + tokens_V * _signed(GOLDEN))
    return -torch.log(-torch.log(_unit(numbers)))


def _place(seeds_B: Tensor, at_BP: Tensor, stream: int) -> Tensor:
    golden = _signed(GOLDEN)
    key_B = _mix(seeds_B + _signed(GOLDEN * (stream + 1)))
    return _mix(key_B[:, None] + (at_BP + 1) * golden)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap as unsigned ones do."""
    z = (z ^ _shifted(z, 30)) * _signed(FACTORS[0])
    z = (z ^ _shifted(z, 27)) * _signed(FACTORS[1])
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical right shift (that of int64 copies the sign)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _unit(z: Tensor) -> Tensor:
    """The upper 52 bits as a number strictly between 0 and 1 (of 53, the largest would round to 1)."""
    return (_shifted(z, 12).double() + 0.5) * 2.0**-52


def _signed(number: int) -> int:
    """A whole number modulo 2^64, as int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
