"""`redraft export --verify`: the written folder, read by a second reader, computes what was exported.

Both sides get the same tokens, features, and where the draft shares the target's embedding or
head, the same random ones, so no target is needed. The second reader of a token LM is Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import UserError, as_sentence
from ..core.rng import seeded
from ..drafts.eagle import EagleDraft
from ..drafts.one_layer import OneLayerDraft
from .load import StoredDraft
from .reference_reader import Reference

TOKENS, STEPS, IDS = 8, 3, 32
TOLERANCE = 1e-5
"""Largest relative difference of a logit; rotary frequencies are float32 on one side."""


@torch.no_grad()
def check_export(stored: StoredDraft, folder: Path) -> float:
    """Compare logits of chains; returns the worst relative difference.

    Raises UserError when the folder computes another function than `stored`.
    """
    worst = SECOND_READERS[stored.kind](stored, folder)
    if not worst < TOLERANCE:
        raise UserError(
            f"{folder}: read back apart, the folder computes another function than what was "
            f"exported (logits differ by {worst:.2g} of their size); do not serve it, and please "
            "report this"
        )
    return worst


def _by_the_twin(stored: StoredDraft, folder: Path) -> float:
    hidden = stored.config.hidden_size
    embedding, head = _random((IDS, hidden), "embedding"), _random((IDS, hidden), "head")
    draft = stored.build(dtype=torch.float64)
    assert isinstance(draft, OneLayerDraft), (
        "the reference implementation reads drafts of one layer"
    )
    draft.shared_embedding = embedding
    if isinstance(draft, EagleDraft):
        draft.head = nn.Linear(hidden, IDS, bias=False, dtype=torch.float64)
        draft.head.weight.copy_(head)
    tokens = torch.randint(IDS, (1, TOKENS), generator=seeded(0, "verify", "tokens"))
    features = _random((1, TOKENS, draft.feature_size), "features")
    reference = Reference(folder, embedding, head)
    rolled = [draft.logits(states)[0] for states in draft.rollout(tokens, features, 0, STEPS)]
    worst = 0.0
    for start in range(TOKENS - 1 - STEPS):
        chain = reference.chain_logits(tokens[0].tolist(), features[0], start, STEPS)
        for step, expected in enumerate(chain):
            worst = max(worst, _apart(rolled[step][start], expected))
    return worst


def _by_transformers(stored: StoredDraft, folder: Path) -> float:
    from transformers import AutoModelForCausalLM

    draft = stored.build(dtype=torch.float64)
    ids = min(IDS, stored.config.vocab_size)
    tokens = torch.randint(ids, (1, TOKENS), generator=seeded(0, "verify", "tokens"))
    with as_sentence(f"{folder}: Transformers could not load the export"):
        other = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float64, trust_remote_code=False
        ).eval()
    expected = other(input_ids=tokens).logits
    worst = 0.0
    for step, states in enumerate(draft.rollout(tokens, tokens[..., None], 0, STEPS)):
        worst = max(worst, _apart(draft.logits(states), expected[:, 1 + step : TOKENS - 1]))
    return worst


SECOND_READERS: dict[str, Callable[[StoredDraft, Path], float]] = {
    "eagle3": _by_the_twin,
    "eagle": _by_the_twin,
    "token_lm": _by_transformers,
}


def _apart(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def _random(shape: tuple[int, ...], name: str) -> Tensor:
    return torch.randn(shape, generator=seeded(0, "verify", name)).double()
