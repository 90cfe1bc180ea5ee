"""Second readings of drafts of one decoder layer: the reference reader on the same random input.

Both sides get the same tokens, features, and where the draft shares the target's embedding or
head, the same random ones, so no target is needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...core.rng import seeded
from ..base import Draft
from ..one_layer import OneLayerDraft
from .reference_reader import Reference

TOKENS, STEPS, IDS = 8, 3, 32


def by_the_reference(draft: Draft, folder: Path) -> float:
    """The worst relative difference of a chain's logits."""
    assert isinstance(draft, OneLayerDraft), "the reference reads drafts of one layer"
    hidden = draft.config.hidden_size
    embedding, head = random((IDS, hidden), "embedding"), target_head(hidden)
    draft.shared_embedding = embedding
    tokens = random_tokens(IDS)
    features = random((1, TOKENS, draft.feature_size), "features")
    reference = Reference(folder, embedding, head)
    rolled = [draft.logits(states)[0] for states in draft.rollout(tokens, features, 0, STEPS)]
    worst = 0.0
    for start in range(TOKENS - 1 - STEPS):
        chain = reference.chain_logits(tokens[0].tolist(), features[0], start, STEPS)
        for step, expected in enumerate(chain):
            worst = max(worst, apart(rolled[step][start], expected))
    return worst


def target_head(hidden: int) -> Tensor:
    """The head [IDS, hidden] of the target that is not there."""
    return random((IDS, hidden), "head")


def apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def random_tokens(ids: int) -> Tensor:
    return torch.randint(ids, (1, TOKENS), generator=seeded(0, "verify", "tokens"))


def random(shape: tuple[int, ...], name: str) -> Tensor:
    return torch.randn(shape, generator=seeded(0, "verify", name)).double()
