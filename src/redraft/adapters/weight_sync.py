"""Weight sync, in closed form: a draft's frozen copies of the base's embedding, head and norm follow
the target.

    tensor' = tensor + (target's - base's)        by rows of the draft vocabulary

Free of training. What the draft learned itself is no copy, and is left alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.console import say
from ..drafts.base import Draft
from ..models.target import Target
from .kind import AdapterKind, FitBatch, Fitted, parameters_of

ALIKE = 0.99
"""Mean cosine of rows from which a tensor counts as a copy; published copies differ by rounding."""
NEAR = 1e-2
"""Relative difference up to which a norm counts as a copy."""


class WeightSync(AdapterKind):
    def written(self, draft: Draft) -> list[str]:
        return [name for name, _ in draft.named_parameters()]

    def fit(
        self, draft: Draft, target: Target, base: Target, batches: Callable[[], list[FitBatch]]
    ) -> Fitted:
        found = renewed(draft, base, target)
        if not found:
            say(
                "weight-sync: the draft holds no copy of the base's tensors that changed; nothing to do"
            )
        self.restore(draft, found)
        return Fitted(found)


def renewed(draft: Draft, base: Target, target: Target) -> dict[str, Tensor]:
    """The draft's copies as they should be now, by name; empty when it holds none that changed."""
    found: dict[str, Tensor] = {}
    parameters = parameters_of(draft)
    pairs = {
        "embed_tokens.weight": (base.embedding_VH, target.embedding_VH),
        "lm_head.weight": (base.head_VH, target.head_VH),
    }
    if draft.draft_vocab is not None and (head := pairs["lm_head.weight"])[0] is not None:
        pairs["lm_head.weight"] = tuple(t[draft.draft_vocab] for t in head)  # type: ignore[index,assignment]
    for name, (old, new) in pairs.items():
        if name in parameters and old is not None and new is not None:
            own = parameters[name].detach()
            if own.shape == old.shape and _alike(own, old):
                found[name] = own + (new.detach().to(own) - old.detach().to(own))
    # A vector of nearly equal numbers looks like any other: it belongs to the head it stands before.
    old, new = _norm(base), _norm(target)
    if "lm_head.weight" in found and "norm.weight" in parameters and old is not None:
        own = parameters["norm.weight"].detach()
        if new is not None and torch.allclose(own, old.to(own), rtol=NEAR):
            found["norm.weight"] = own + (new.detach().to(own) - old.detach().to(own))
    return {
        name: tensor for name, tensor in found.items() if not torch.equal(tensor, parameters[name])
    }


def _alike(one: Tensor, other: Tensor) -> bool:
    cosine = torch.nn.functional.cosine_similarity(
        one.float(), other.detach().to(one).float(), dim=-1
    )
    return float(cosine.mean()) > ALIKE


def _norm(target: Target) -> Tensor | None:
    """The final norm's weight of the usual model layouts."""
    weight: Tensor | None = getattr(target.final_norm, "weight", None)
    return weight
