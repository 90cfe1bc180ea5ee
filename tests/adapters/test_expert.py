"""The expert: which neurons it copies, and the FFNs that it cannot widen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from redraft.adapters.adapter import prepare
from redraft.adapters.expert import measure_activity, widenable
from redraft.adapters.kind import Setup
from redraft.adapters.table import read_method
from redraft.core.errors import UserError
from redraft.drafts.kinds import kind_names
from redraft.models.target import Target
from tests.conftest import fresh_draft

SHARED_WIDTH = 24


@pytest.mark.parametrize("kind", kind_names())
def test_the_expert_copies_the_most_active_neurons(target: Target, kind: str) -> None:
    draft = fresh_draft(target, kind=kind)
    name, ffn = next(iter(widenable(draft).items()))
    hidden = ffn.gate_proj.in_features
    with torch.no_grad():
        ffn.gate_proj.weight[7] *= 50  # neuron 7 now dominates

    def calibrate() -> None:
        for each in widenable(draft).values():
            each(torch.randn(64, hidden, generator=torch.Generator().manual_seed(0)))

    activity = measure_activity(widenable(draft), calibrate)[name]
    assert int(activity.argmax()) == 7
    expert = read_method("expert")
    prepare(draft, expert, Setup(width=1, init="active", seed=0, calibrate=calibrate))
    assert ffn.private is not None
    near = torch.nn.functional.cosine_similarity(ffn.private.gate_proj.weight, ffn.gate_proj.weight)
    assert int(near.argmax()) == 7


def test_activity_is_the_mean_size_of_each_neurons_contribution(target: Target) -> None:
    """Against a loop over tokens and neurons; without the down column's norm it is another number."""
    draft = fresh_draft(target)
    ffn = draft.midlayer.mlp
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    found = measure_activity(widenable(draft), lambda: ffn(x))["midlayer.mlp"]
    gate, up, down = (p.weight for p in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
    by_hand, without_column = torch.zeros(SHARED_WIDTH), torch.zeros(SHARED_WIDTH)
    for n in range(SHARED_WIDTH):
        for row in x:
            g, u = float(gate[n] @ row), float(up[n] @ row)
            size = abs(g / (1 + float(torch.tensor(-g).exp())) * u)
            by_hand[n] += size * float((down[:, n] ** 2).sum()) ** 0.5
            without_column[n] += size
    assert torch.allclose(found, by_hand, rtol=1e-4)
    assert not torch.allclose(found, without_column, rtol=1e-2)


@pytest.mark.parametrize("method", ["expert", "expert+fc+norms", "full+expert"])
def test_an_ffn_that_cannot_be_widened_is_named(target: Target, method: str) -> None:
    class MixtureOfExperts(nn.Module):
        pass

    draft = fresh_draft(target)
    draft.midlayer.mlp = MixtureOfExperts()
    with pytest.raises(
        UserError, match=r"cannot widen .* found MixtureOfExperts; use --method lora or full"
    ):
        prepare(draft, read_method(method), Setup(width=4, init="active", seed=0))
