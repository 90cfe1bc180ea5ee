"""Private parts: exact start, exact fuse, exact unfuse, and nobody touches a shared tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from redraft.drafts.base import Draft
from redraft.drafts.table import KINDS
from redraft.errors import UserError
from redraft.formats.folders import tensor_hash
from redraft.private.expert import measure_activity, widenable
from redraft.private.fuse import CONCATENATED, fuse, unfuse
from redraft.private.part import PrivatePart, declare, prepare, put, take
from redraft.private.table import METHODS
from redraft.target import Target
from tests.conftest import fresh_draft

WARM = [name for name, row in METHODS.items() if not row.fresh]
SHARED_WIDTH, WIDTH = 24, 10


def attached(target: Target, method: str, init: str = "active", kind: str = "eagle3") -> Any:
    draft = fresh_draft(target, kind=kind)
    prepare(draft, method, width=WIDTH, init=init, seed=5)
    return draft


def outputs(draft: Draft, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 200, (2, 12), generator=generator)
    features = torch.randn(2, 12, draft.feature_size, generator=generator).to(dtype)
    draft = draft.to(dtype)
    with torch.no_grad():
        states = list(draft.rollout(tokens, features, 1, 4))
        # The head of an eagle draft is the target's, in the target's dtype.
        return states if draft.kind == "eagle" else [draft.logits(s) for s in states]


def stir(draft: Draft, method: str) -> None:
    """Give every private tensor some trained-looking values."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in declare(draft, method):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def fused_draft(draft: Draft, method: str) -> tuple[Draft, dict[str, torch.Tensor]]:
    """A stock draft of the fused tensors, in the dtype they are held in."""
    shared = {n: t for n, t in draft.state_dict().items() if ".private." not in n}
    state = fuse(shared, take(draft, method))
    width = next(t.shape[0] for n, t in state.items() if n.endswith("mlp.gate_proj.weight"))
    fused = KINDS[draft.kind](dataclasses.replace(draft.config, intermediate_size=width))
    fused.load_state_dict(state)
    fused.shared_embedding = draft.shared_embedding
    return fused.eval(), state


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", WARM)
def test_before_the_first_step_it_is_the_reused_draft_bit_for_bit(
    target: Target, method: str, kind: str
) -> None:
    reused = outputs(fresh_draft(target, kind=kind), torch.float32)
    private = outputs(attached(target, method, kind=kind), torch.float32)
    for a, b in zip(reused, private, strict=True):
        assert torch.equal(a, b)


def test_a_random_start_is_not_the_reused_draft(target: Target) -> None:
    reused = outputs(fresh_draft(target), torch.float32)
    assert not torch.equal(
        reused[0], outputs(attached(target, "expert", "random"), torch.float32)[0]
    )


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", WARM)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_fused_equals_unfused(
    target: Target, method: str, dtype: torch.dtype, tolerance: float, kind: str
) -> None:
    draft = attached(target, method, kind=kind)
    stir(draft, method)
    fused, _ = fused_draft(draft, method)
    scale = max(float(x.abs().max()) for x in outputs(fused, torch.float64))
    for a, b in zip(outputs(draft, dtype), outputs(fused, dtype), strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(scale, 1.0)


def test_a_wrong_fuse_is_caught(target: Target) -> None:
    """Down columns in another order than gate rows: the same shapes, another function."""
    draft = attached(target, "expert")
    stir(draft, "expert")
    fused, state = fused_draft(draft, "expert")
    state["midlayer.mlp.down_proj.weight"] = state["midlayer.mlp.down_proj.weight"].flip(1)
    fused.load_state_dict(state)
    difference = outputs(draft, torch.float64)[0] - outputs(fused, torch.float64)[0]
    assert float(difference.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", ["expert", "expert+fc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_slices_and_unfuse_are_bit_exact(
    target: Target, method: str, dtype: torch.dtype, kind: str
) -> None:
    draft = attached(target, method, kind=kind)
    (ffn,) = widenable(draft)
    shared = {n: t.to(dtype) for n, t in fresh_draft(target, kind=kind).state_dict().items()}
    stir(draft, method)
    private = take(draft, method, dtype)
    fused = fuse(shared, private)
    for name, tensor in shared.items():
        suffix = name.removeprefix(f"{ffn}.")
        part = (
            fused[name].narrow(CONCATENATED[suffix], 0, SHARED_WIDTH)
            if suffix in CONCATENATED
            else fused[name]
        )
        if not METHODS[method].owns(name):
            assert tensor_hash(part) == tensor_hash(tensor), name
    replaced = [n for n in private if ".private." not in n]
    back = unfuse(fused, {ffn: SHARED_WIDTH}, replaced)
    assert set(back) == set(private)
    assert all(tensor_hash(back[n]) == tensor_hash(private[n]) for n in private)


def test_fuse_refuses_a_part_without_a_home() -> None:
    with pytest.raises(ValueError, match="has no shared tensor other.weight"):
        fuse({"fc.weight": torch.zeros(1)}, {"other.weight": torch.zeros(1)})


def test_put_restores_what_take_took(target: Target) -> None:
    draft = attached(target, "expert+fc")
    stir(draft, "expert+fc")
    other = fresh_draft(target)
    put(other, take(draft, "expert+fc"))
    for a, b in zip(outputs(draft, torch.float32), outputs(other, torch.float32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("method", list(METHODS))
def test_ownership_is_declared_for_every_tensor(target: Target, method: str, kind: str) -> None:
    draft = attached(target, method, kind=kind)
    owned = {name for name, _ in declare(draft, method)}
    for name, parameter in draft.named_parameters():
        assert parameter.requires_grad == (name in owned)
    assert any(".private." in n for n in owned) == METHODS[method].expert
    assert ("fc.weight" in owned) == (method != "expert")
    last = "lm_head.weight" if kind == "eagle3" else "layers.0.self_attn.o_proj.weight"
    assert (last in owned) == (method in ("full", "scratch"))


def test_the_expert_copies_the_most_active_neurons(target: Target) -> None:
    draft = fresh_draft(target)
    ffn = draft.midlayer.mlp
    with torch.no_grad():
        ffn.gate_proj.weight[7] *= 50  # neuron 7 now dominates

    def calibrate() -> None:
        ffn(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))

    activity = measure_activity(widenable(draft), calibrate)["midlayer.mlp"]
    assert int(activity.argmax()) == 7
    prepare(draft, "expert", width=1, init="active", seed=0, calibrate=calibrate)
    assert ffn.private is not None
    near = torch.nn.functional.cosine_similarity(ffn.private.gate_proj.weight, ffn.gate_proj.weight)
    assert int(near.argmax()) == 7


def test_an_ffn_that_cannot_be_widened_is_named(target: Target) -> None:
    class MixtureOfExperts(nn.Module):
        pass

    draft = fresh_draft(target)
    draft.midlayer.mlp = MixtureOfExperts()  # type: ignore[assignment]
    with pytest.raises(
        UserError, match=r"cannot widen .* found MixtureOfExperts; use --method full"
    ):
        prepare(draft, "expert", width=4, init="active", seed=0)


def test_a_private_part_counts_its_parameters() -> None:
    assert (
        PrivatePart("expert", {"a": torch.zeros(3, 4), "b": torch.zeros(5)}).parameter_count() == 17
    )
