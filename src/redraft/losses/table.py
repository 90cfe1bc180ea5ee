"""The losses, one literal row each. No torch here: settings are checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

LABELS, OWN, WHOLE = "labels", "own", "whole"
"""What a loss reads of the target: nothing but the answers' tokens, its distribution over the draft
vocabulary alone, or that over its whole vocabulary."""


@dataclass(frozen=True)
class LossRow:
    """A loss, and the `function` of functions.py that computes it.

    `reads` is LABELS, OWN or WHOLE; with `states` the draft's states are compared with the
    target's features as well.
    """

    name: str
    help: str
    function: str
    reads: str
    states: bool = False


TABLE = (
    LossRow("kl", "forward KL", "forward_kl", OWN),
    LossRow("tv", "total variation", "total_variation", WHOLE),
    LossRow("lk", "their LK blend", "lk_blend", WHOLE),
    LossRow("ce", "cross-entropy with the answer", "hard_cross_entropy", LABELS),
    LossRow(
        "paper",
        "the paper's SmoothL1 on features + 0.1 KL (drafts that read the last hidden state)",
        "features_and_kl",
        OWN,
        states=True,
    ),
)
