"""The state before the final norm is found in every family, and can be put back in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from redraft.core.errors import UserError
from redraft.models.final_norm import find_final_norm, in_place_of, states_entering
from redraft.models.loading import load_target
from redraft.models.target import Target
from tests.conftest import FAMILIES, make_tokenizer, save_target

TOKENS = torch.tensor([[5, 9, 40, 41, 42, 43, 7, 8]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_of_what_is_caught_is_the_last_state(family: str, tmp_path: Path) -> None:
    target = load_target(str(save_target(tmp_path, FAMILIES[family](len(make_tokenizer())))))
    norm = find_final_norm(target)
    with states_entering(norm) as caught, torch.no_grad():
        last = target.read(TOKENS, (target.num_layers,)).features_BTF
    (pre,) = caught
    assert not torch.allclose(pre, last)
    assert torch.equal(norm(pre), last)


@pytest.mark.parametrize("pre_norm", [True, False])
@torch.no_grad()
def test_states_put_in_place_decide_the_logits(target: Target, pre_norm: bool) -> None:
    norm = find_final_norm(target)
    with states_entering(norm) as caught:
        expected = target.read(TOKENS, (target.num_layers,))
    states = caught[0] if pre_norm else expected.features_BTF
    with in_place_of(norm, states, pre_norm) as left:
        other = target.read(torch.flip(TOKENS, [1]), ())
    assert torch.equal(other.logits_BTV, expected.logits_BTV)
    assert torch.equal(left[0], expected.features_BTF)
    assert not torch.equal(target.read(torch.flip(TOKENS, [1]), ()).logits_BTV, other.logits_BTV)


def test_a_model_without_a_final_norm_is_refused(target_folder: Path) -> None:
    target = load_target(str(target_folder))
    target.model.model.norm = nn.Identity()
    with pytest.raises(UserError, match="has no final norm .* train without --features"):
        find_final_norm(target)
