"""Routed experts against loops over tokens and experts in plain Python, and wrong versions caught."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.adapters.expert import widenable
from redraft.core.errors import UserError
from redraft.decoding.acceptance_modes import Decoding
from redraft.decoding.plain import decode_plain
from redraft.decoding.sampling import Sampling
from redraft.decoding.speculative import decode_speculative
from redraft.drafts.eagle.network import EagleDraft
from redraft.drafts.eagle.routed import RoutedExperts, RoutedShape
from redraft.models.target import Target
from tests.conftest import fresh_draft, in_double

H, WIDTH = 6, 5
SHAPES = {
    "as published": RoutedShape(1, 1, 1, 1, 4),
    "the code's defaults": RoutedShape(4, 4, 1, 1, 4),
    "two of three": RoutedShape(3, 4, 2, 3, 7),
    "all of them": RoutedShape(2, 3, 2, 3, 4),
}
EVERY = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def experts(shape: RoutedShape, seed: int = 0) -> RoutedExperts:
    generator = torch.Generator().manual_seed(seed)
    made = RoutedExperts(H, WIDTH, shape, "silu").double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Weights = Callable[[list[float], int], dict[int, float]]


def weights(logits: list[float], k: int) -> dict[int, float]:
    """Of the experts that run: the k most probable, their probabilities renormalised."""
    p = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
    chosen = sorted(range(len(p)), key=lambda e: -p[e])[:k]
    return {e: p[e] / sum(p[c] for c in chosen) for e in chosen}


def by_hand(module: RoutedExperts, x: Tensor, weigh: Weights = weights) -> Tensor:
    """One token at a time, one expert at a time, one neuron at a time."""
    w = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    shape = module.shape
    out = []
    for token in x.reshape(-1, H).tolist():
        y = [0.0] * H
        for group, k in (("shared", shape.top_k_shared), ("private", shape.top_k_private)):
            logits = [dot(row, token) for row in w[f"{group}_gate.weight"]]
            for e, share in weigh(logits, k).items():
                gate, up, down = (
                    w[f"{group}_experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")
                )
                for j in range(len(gate)):
                    g = dot(gate[j], token)
                    neuron = g / (1 + math.exp(-g)) * dot(up[j], token)
                    for h in range(H):
                        y[h] += share * down[h][j] * neuron
        out.append(y)
    return torch.tensor(out, dtype=torch.float64).view(x.shape)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


@EVERY
def test_it_is_what_the_loops_compute(shape: RoutedShape) -> None:
    module, x = experts(shape), inputs(3, 5)
    torch.testing.assert_close(module(x), by_hand(module, x), rtol=1e-12, atol=1e-12)


def one_more(logits: list[float], k: int) -> dict[int, float]:
    return weights(logits, min(k + 1, len(logits)))


def one_less(logits: list[float], k: int) -> dict[int, float]:
    return weights(logits, k - 1)


def least_probable(logits: list[float], k: int) -> dict[int, float]:
    chosen = weights([-x for x in logits], k)
    p = weights(logits, len(logits))
    return {e: p[e] / sum(p[c] for c in chosen) for e in chosen}


def not_renormalised(logits: list[float], k: int) -> dict[int, float]:
    everything = weights(logits, len(logits))
    return {e: everything[e] for e in weights(logits, k)}


def equal_shares(logits: list[float], k: int) -> dict[int, float]:
    return dict.fromkeys(weights(logits, k), 1 / k)


@pytest.mark.parametrize(
    "wrong", [one_more, one_less, least_probable, not_renormalised, equal_shares]
)
def test_wrong_routing_is_told_apart(wrong: Weights) -> None:
    module, x = experts(SHAPES["two of three"]), inputs(3, 5)
    with torch.no_grad():
        assert float((module(x) - by_hand(module, x, wrong)).abs().max()) > 1e-2


def test_an_expert_that_no_token_chooses_is_left_alone() -> None:
    module = experts(SHAPES["the code's defaults"])
    x = inputs(1, 2)
    module(x).sum().backward()
    unused = [e for e in module.shared_experts if not e.gate_proj.weight.grad.any()]  # type: ignore[union-attr,operator]
    assert len(unused) >= 2
    torch.testing.assert_close(module(x), by_hand(module, x), rtol=1e-12, atol=1e-12)
    assert module(inputs(1, 0)).shape == (1, 0, H)


def test_one_of_each_has_weight_one_whatever_the_routers_say() -> None:
    module, x = experts(SHAPES["as published"]), inputs(3, 5)
    before = module(x)
    with torch.no_grad():
        module.shared_gate.weight.mul_(100)
        module.private_gate.weight.neg_()
    assert torch.equal(module(x), before)
    plain = module.shared_experts[0](x) + module.private_experts[0](x)
    torch.testing.assert_close(before, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routers_decide_in_float32(dtype: torch.dtype) -> None:
    module = experts(SHAPES["two of three"]).to(dtype).requires_grad_(False)
    x = inputs(3, 5).to(dtype)
    assert module(x).dtype == dtype
    exact = experts(SHAPES["two of three"]).requires_grad_(False)
    exact.load_state_dict(module.state_dict())
    far = (module(x).double() - exact(x.double())).abs() / exact(x.double()).abs().max()
    # A token close to a tie may run other experts; no other rounding is large.
    assert float(far.median()) < (0.02 if dtype == torch.bfloat16 else 1e-6)


# -- as the FFN of a draft ------------------------------------------------------------------------


def routed_like(trained: Any, shape: RoutedShape, target: Target) -> EagleDraft:
    """A draft of routed experts, each a disturbed copy of a trained draft's FFN."""
    config = dataclasses.replace(
        trained.config,
        routed=dataclasses.replace(shape, private_width=trained.config.intermediate_size),
    )
    draft = EagleDraft(config).double()
    generator = torch.Generator().manual_seed(0)
    given = trained.state_dict()
    filled = {}
    for name, tensor in draft.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator).double()
        if name in given:
            filled[name] = given[name].double()
        elif "_experts." in name:
            base = given[f"layers.0.mlp.{name.split('.', 5)[5]}"].double()
            size = 0.1 if "private" in name else 1.0
            filled[name] = size * base + 0.05 * base.std() * noise
        else:
            filled[name] = noise
    draft.load_state_dict(filled)
    draft.bind(target)
    return draft.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "decoding", [Decoding(), Decoding("seeded", Sampling(1.0))], ids=["greedy", "seeded"]
)
def test_decoding_with_it_is_lossless(
    target_folder: Path, trained_kind: Callable[[str], Any], decoding: Decoding
) -> None:
    target = in_double(target_folder)
    draft = routed_like(trained_kind("eagle"), SHAPES["two of three"], target)
    words = ("Say 7 and 1.", "Say 14 and 2.", "Hi", "Tell me more")
    prompts = [target.render([{"role": "user", "content": text}]) for text in words]
    plain = [decode_plain(target, p, 24, decoding, i) for i, p in enumerate(prompts)]
    for rows in (slice(0, 4), slice(1, 2)):
        seeds = list(range(4))[rows]
        found = decode_speculative(target, draft, prompts[rows], 4, 24, decoding, seeds)
        assert [d.tokens for d in found] == plain[rows]
    if decoding.mode == "greedy":
        assert sum(n for d in found for n in d.accepted) > 0, "a draft that is never right"


def test_rollout_equals_step_by_step_decoding(target_folder: Path) -> None:
    target = in_double(target_folder)
    shape = RoutedShape(3, 2, 2, 1, 10)
    draft = fresh_draft(target, kind="eagle", routed=shape)
    tokens = torch.randint(5, 200, (1, 12), generator=torch.Generator().manual_seed(1))
    features = target.read(tokens, draft.aux_layers).features_BTF
    with torch.no_grad():
        rolled = [draft.logits(s) for s in draft.rollout(tokens, features, 0, 4)]
        cache = draft.new_cache(tokens[:, 0])
        for start in range(6):
            here = slice(start, start + 1)
            state = draft.extend(cache, tokens[:, start + 1 : start + 2], features[:, here])
            for step in range(4):
                difference = draft.logits(state)[0, 0] - rolled[step][0, start]
                assert float(difference.abs().max()) < 1e-10
                state = draft.step(cache, tokens[:, start + 2 + step : start + 3 + step], state)


def test_no_private_expert_can_be_added_to_it(target: Target) -> None:
    draft = fresh_draft(target, kind="eagle", routed=RoutedShape(2, 2, 1, 1, 8))
    with pytest.raises(UserError, match="cannot widen this eagle draft: .* found RoutedExperts"):
        widenable(draft)
