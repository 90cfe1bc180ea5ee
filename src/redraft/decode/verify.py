"""The acceptance rule. Pure: tokens in, a count out; no model, no cache, no device.

Greedy: accept drafted tokens as long as each equals the target's own choice at its position; the
target's choice at the first difference (or after the last drafted token) is emitted in any case.
"""

from __future__ import annotations

from collections.abc import Sequence


def accept_greedy(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of the K `drafted` tokens are accepted, 0..K.

    `chosen[j]` is the target's greedy token given the prefix and drafted[:j], K+1 of them; the
    step emits drafted[:n] + [chosen[n]].
    """
    assert len(chosen) == len(drafted) + 1, "verification sees one position more than was drafted"
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == chosen[accepted]:
        accepted += 1
    return accepted
