"""Low-rank pairs: W + B A against written-out sums, PEFT's names, and a draft that still decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redraft.adapters import lora
from redraft.adapters.adapter import declare, prepare, put, take
from redraft.adapters.kind import Setup
from redraft.adapters.table import read_method
from redraft.core.errors import UserError
from redraft.core.folders import tensor_hash
from redraft.drafts.base import Draft
from redraft.drafts.kinds import kind_names
from redraft.models.target import Target
from tests.conftest import fresh_draft, in_double

LORA = read_method("lora")
RANK, STEPS = 4, 4


def adapted(target: Target, kind: str = "eagle3", rank: int = RANK, seed: int = 5) -> Any:
    draft = fresh_draft(target, kind=kind)
    prepare(draft, LORA, Setup(width=1, rank=rank, init="active", seed=seed))
    return draft


def stirred(target: Target, kind: str = "eagle3", method: str = "lora") -> Any:
    draft = fresh_draft(target, kind=kind)
    prepare(draft, read_method(method), Setup(width=6, rank=RANK, init="active", seed=5))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in declare(draft, read_method(method)):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return draft


@pytest.fixture(scope="module")
def target64(target_folder: Path) -> Target:
    return in_double(target_folder)


@pytest.mark.parametrize("kind", kind_names())
def test_every_linear_layer_but_the_head_has_a_pair_of_the_rank(target: Target, kind: str) -> None:
    plain = fresh_draft(target, kind=kind)
    expected = {}
    for name, tensor in plain.state_dict().items():
        if tensor.dim() == 2 and not name.startswith(("lm_head", "model.embed_tokens")):
            layer = name.removesuffix(".weight")
            expected[f"{layer}.lora_A.weight"] = (RANK, tensor.shape[1])
            expected[f"{layer}.lora_B.weight"] = (tensor.shape[0], RANK)
    taken = take(adapted(target, kind), LORA)
    assert {name: tuple(tensor.shape) for name, tensor in taken.items()} == expected


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_a_layer_computes_w_plus_ba(target64: Target, rank: int) -> None:
    """Against numpy, whatever the rank; another scale, and A and B of another layer, are seen."""
    draft = fresh_draft(target64)
    names = ["fc", "midlayer.mlp.gate_proj", "midlayer.mlp.up_proj"]
    before = {name: draft.get_parameter(f"{name}.weight").numpy().copy() for name in names}
    prepare(draft, LORA, Setup(width=1, rank=rank, init="active", seed=5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in declare(draft, LORA):
            parameter.normal_(generator=generator)
    taken = {name: t.numpy() for name, t in take(draft, LORA).items()}
    pairs = {n: (taken[f"{n}.lora_A.weight"], taken[f"{n}.lora_B.weight"]) for n in names}
    for name in names:
        x = np.random.default_rng(0).normal(size=(5, before[name].shape[1]))
        got = draft.get_submodule(name)(torch.from_numpy(x)).detach().numpy()
        a, b = pairs[name]
        exact = x @ before[name].T + (x @ a.T) @ b.T
        assert np.abs(got - exact).max() < 1e-10
        for wrong in (2.0, 1 / RANK, 0.0):
            other = x @ before[name].T + wrong * (x @ a.T) @ b.T
            assert np.abs(got - other).max() > 1e-2
    a, _ = pairs["midlayer.mlp.up_proj"]
    _, b = pairs["midlayer.mlp.gate_proj"]
    x = np.random.default_rng(0).normal(size=(5, 32))
    got = draft.midlayer.mlp.gate_proj(torch.from_numpy(x)).detach().numpy()
    swapped = x @ before["midlayer.mlp.gate_proj"].T + (x @ a.T) @ b.T
    assert np.abs(got - swapped).max() > 1e-2


@pytest.mark.parametrize("kind", kind_names())
def test_the_stored_names_are_pefts_own(target: Target, kind: str) -> None:
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    plain = fresh_draft(target, kind=kind)
    layers = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    ]
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=layers), plain)
    theirs = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(plain).items()}
    ours = take(adapted(target, kind), LORA)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == theirs


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("fc.weight", "fc.base_layer.weight"),
        ("fc.bias", "fc.base_layer.bias"),
        ("a.b.lora_A.weight", "a.b.lora_A.default.weight"),
        ("norm.weight", "norm.weight"),
    ],
)
def test_stored_names_leave_pefts_wrapping_out(stored: str, name: str) -> None:
    assert lora.stored_name(name) == stored


@pytest.mark.parametrize("kind", kind_names())
def test_the_start_is_decided_by_the_seed_and_b_is_zero(target: Target, kind: str) -> None:
    def start(seed: int, elsewhere: int) -> dict[str, Tensor]:
        torch.manual_seed(elsewhere)  # the library's own start must not show
        return take(adapted(target, kind, seed=seed), LORA)

    one, again, other = start(5, 1), start(5, 2), start(6, 1)
    for name, tensor in one.items():
        assert tensor_hash(tensor) == tensor_hash(again[name]), name
        if "lora_B" in name:
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name]), name
    starts = [tensor for name, tensor in one.items() if "lora_A" in name]
    assert len({tensor_hash(t) for t in starts}) == len(starts), "two layers begin alike"
    for tensor in starts:  # the variance of a linear layer's usual start
        assert 0.5 < float(tensor.std()) * tensor.shape[1] ** 0.5 < 1.5


def test_a_rank_above_a_layers_size_is_refused_with_the_bound(target: Target) -> None:
    sizes = {
        name: min(tensor.shape)
        for name, tensor in fresh_draft(target).state_dict().items()
        if tensor.dim() == 2 and "lm_head" not in name
    }
    smallest = min(sizes.values())
    assert smallest == 16  # two heads of keys
    adapted(target, rank=smallest)
    with pytest.raises(UserError) as caught:
        adapted(target, rank=smallest + 1)
    text = str(caught.value)
    assert "train.rank 17 is above the size of midlayer.self_attn.k_proj" in text
    assert text.endswith("choose 1 to 16")


def test_nothing_to_adapt_is_said(target: Target) -> None:
    draft = fresh_draft(target)
    with pytest.raises(
        UserError, match="a low-rank adapter finds no linear layer in this eagle3 draft"
    ):
        lora.attach(draft, [], RANK, 0)


def worst_step(target: Target, draft: Draft) -> float:
    """Rollout against decoding one token after the other, chains and all."""
    tokens = torch.randint(5, 200, (1, 14), generator=torch.Generator().manual_seed(1))
    features = target.read(tokens, draft.aux_layers).features_BTF
    worst = 0.0
    with torch.no_grad():
        rolled = [draft.logits(s) for s in draft.rollout(tokens, features, 0, STEPS)]
        cache = draft.new_cache(tokens[:, 0])
        for start in range(tokens.shape[1] - 2 - STEPS):
            here, following = slice(start, start + 1), slice(start + 1, start + 2)
            state = draft.extend(cache, tokens[:, following], features[:, here])
            for step in range(STEPS):
                far = draft.logits(state)[0, 0] - rolled[step][0, start]
                worst = max(worst, float(far.abs().max()))
                token = tokens[:, start + 2 + step : start + 3 + step]
                state = draft.step(cache, token, state)
    return worst


@pytest.mark.parametrize("kind", kind_names())
@pytest.mark.parametrize("method", ["lora", "expert+lora", "lora+norms"])
def test_the_draft_decodes_with_its_pairs_as_it_is_trained(
    target64: Target, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = stirred(target64, kind, method)
    assert worst_step(target64, draft) < 1e-9
    # Pairs that only training would see are noticed.
    extend = type(draft).extend

    def without_pairs(self: Any, *args: Any, **named: Any) -> Tensor:
        zeroed = {n: torch.zeros_like(t) for n, t in take(self, LORA).items() if "lora_B" in n}
        kept = take(self, LORA)
        put(self, zeroed)
        found: Tensor = extend(self, *args, **named)
        put(self, kept)
        return found

    monkeypatch.setattr(type(draft), "extend", without_pairs)
    assert worst_step(target64, draft) > 1e-3


def test_rows_of_different_length_decode_with_pairs(target64: Target) -> None:
    """A draft asks its own weights for dtype and device, which a pair wraps."""
    draft = stirred(target64)
    assert draft.dtype == torch.float64
    tokens = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    features = target64.read(tokens, draft.aux_layers).features_BTF
    with torch.no_grad():
        cache = draft.new_cache(tokens[:, 0])
        both = draft.extend(cache, tokens[:, 1:], features[:, :-1], [8, 5])
        draft.keep_rows(cache, [1])
        after = draft.step(cache, tokens[1:, 6:7], both[1:])
        alone = draft.new_cache(tokens[1:, 0])
        single = draft.extend(alone, tokens[1:, 1:6], features[1:, :5])
        expected = draft.step(alone, tokens[1:, 6:7], single)
    assert float((both[1:] - single).abs().max()) < 1e-9
    assert float((after - expected).abs().max()) < 1e-9
