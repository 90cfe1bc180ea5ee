"""Adapters, every kind times every method: exact start, exact merge, nobody touches a shared tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.adapters.adapter import Adapter, check_carries, declare, prepare, put, take
from redraft.adapters.expert import CONCATENATED
from redraft.adapters.kind import Setup
from redraft.adapters.merge import extract, home_of, merge
from redraft.adapters.table import ADAPTERS, TABLE, read_method
from redraft.checkpoints.adapter_folder import load_adapter, save_adapter
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.folders import state_hash, tensor_hash
from redraft.core.records import Answer
from redraft.drafts.base import Draft
from redraft.drafts.kinds import kind_named, kind_names
from redraft.models.target import Target
from redraft.training import train as train_module
from redraft.training.adapter_run import AdapterRun
from redraft.training.train import Trained, train
from tests.adapters.toy import NEURON
from tests.conftest import fresh_draft

pytestmark = pytest.mark.usefixtures("toy_adapter")

SHARED_WIDTH, WIDTH, RANK = 24, 10, 4
METHODS = (
    *(row.name for row in (*TABLE, NEURON) if not row.closed_form),
    "fc+norms",
    "expert+fc",
    "expert+fc+norms",
    "lora+fc+norms",
    "expert+lora",
    "expert+fc+norms+head-lora",
    "lora+head-lora",
    "body+head-lora",
    "full+expert",
    "scratch+expert",
    "neuron+fc+norms",
    "neuron+lora",
)
"""Every adapter that trains, the toy included, and combinations."""
LAYER_OF = {
    "mtp": ("layers.0",),
    "eagle": ("layers.0",),
    "eagle3": ("midlayer",),
    "token_lm": ("model.layers.0", "model.layers.1"),
}
NORMS_OF = {
    "eagle": ("layers.0.post_attention_layernorm",),
    "mtp": (
        "embedding_norm",
        "hidden_norm",
        "layers.0.input_layernorm",
        "layers.0.post_attention_layernorm",
        "layers.0.self_attn.q_norm",
        "layers.0.self_attn.k_norm",
        "norm",
    ),
    "eagle3": (
        "midlayer.input_layernorm",
        "midlayer.hidden_norm",
        "midlayer.post_attention_layernorm",
        "norm",
    ),
    "token_lm": (
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ),
}
WITHOUT_HEAD = ("eagle", "mtp")
LACKS = {"eagle3": set(), "token_lm": {"fc"}} | {
    kind: {"head", "head-lora"} for kind in WITHOUT_HEAD
}
"""What a kind has not; its module names are above."""


def lacks(kind: str, method: str) -> set[str]:
    return set(LACKS[kind]) & set(method.split("+"))


CELLS = [(kind, method) for kind in kind_names() for method in METHODS]
CARRIED = [cell for cell in CELLS if not lacks(*cell)]
EVERY = pytest.mark.parametrize(("kind", "method"), CARRIED)
WARM = pytest.mark.parametrize(("kind", "method"), [c for c in CARRIED if "scratch" not in c[1]])
REFUSED = pytest.mark.parametrize(("kind", "method"), [c for c in CELLS if lacks(*c)])


def attached(target: Target, kind: str, method: str, init: str = "active") -> Any:
    draft = fresh_draft(target, kind=kind)
    prepare(draft, read_method(method), Setup(width=WIDTH, rank=RANK, init=init, seed=5))
    return draft


def outputs(draft: Draft, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 200, (2, 12), generator=generator)
    features = torch.randn(2, 12, draft.feature_size, generator=generator).to(dtype)
    draft = draft.to(dtype)
    with torch.no_grad():
        states = list(draft.rollout(tokens, features, 1, 4))
        # The head of these drafts is the target's, in the target's dtype.
        return states if draft.kind in WITHOUT_HEAD else [draft.logits(s) for s in states]


def apart(one: Draft, other: Draft, dtype: torch.dtype = torch.float64, steps: int = 4) -> float:
    """The largest difference of two drafts' outputs, against the size of the second's."""
    pairs = list(zip(outputs(one, dtype)[:steps], outputs(other, dtype)[:steps], strict=True))
    scale = max(1.0, *(float(b.abs().max()) for _, b in pairs))
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


def stir(draft: Draft, method: str) -> None:
    """Give every adapter tensor some trained-looking values."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in declare(draft, read_method(method)):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def stock(kind: str, state: dict[str, Tensor], like: Draft) -> Draft:
    """A stock draft of these tensors, in the dtype they are held in."""
    width = next(t.shape[0] for n, t in state.items() if n.endswith("mlp.gate_proj.weight"))
    made: Any = kind_named(kind).network(dataclasses.replace(like.config, intermediate_size=width))
    made.to(next(iter(state.values())).dtype).load_state_dict(state)
    made.shared_embedding = getattr(like, "shared_embedding", None)
    made.eval()
    return made  # type: ignore[no-any-return]


def stirred(
    target: Target, kind: str, method: str, dtype: torch.dtype
) -> tuple[Draft, dict[str, Tensor], dict[str, Tensor]]:
    """A draft with a stirred adapter, the shared tensors next to it, and the private ones."""
    draft = attached(target, kind, method).to(dtype)
    stir(draft, method)
    shared = fresh_draft(target, kind=kind).to(dtype).state_dict()
    return draft, shared, take(draft, read_method(method))


def test_every_kind_has_its_row_here() -> None:
    assert set(LACKS) == set(LAYER_OF) == set(NORMS_OF) == set(kind_names())


@WARM
def test_before_the_first_step_it_is_the_unadapted_draft_bit_for_bit(
    target: Target, kind: str, method: str
) -> None:
    unadapted = outputs(fresh_draft(target, kind=kind), torch.float32)
    private = outputs(attached(target, kind, method), torch.float32)
    for a, b in zip(unadapted, private, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", kind_names())
@pytest.mark.parametrize("method", ["scratch", "scratch+expert"])
def test_from_scratch_nothing_of_the_unadapted_draft_is_left(
    target: Target, kind: str, method: str
) -> None:
    unadapted, made = fresh_draft(target, kind=kind), attached(target, kind, method)
    assert apart(made, unadapted, torch.float32) > 1e-2
    before = unadapted.state_dict()
    assert not any(torch.equal(t, before[n]) for n, t in made.state_dict().items() if n in before)


@pytest.mark.parametrize("kind", kind_names())
def test_a_random_start_is_not_the_unadapted_draft(target: Target, kind: str) -> None:
    assert apart(attached(target, kind, "expert", "random"), fresh_draft(target, kind=kind)) > 1e-3


@EVERY
def test_ownership_is_declared_for_every_tensor(target: Target, kind: str, method: str) -> None:
    """Against the names of each part, written out per kind."""
    draft = attached(target, kind, method)
    every = set(fresh_draft(target, kind=kind).state_dict())
    attention = {f"{at}.self_attn.{p}_proj.weight" for at in LAYER_OF[kind] for p in "qkvo"}
    within = {f"{name}.weight" for name in NORMS_OF[kind] if "self_attn" in name}
    ffn = {f"{at}.mlp.{p}_proj" for at in LAYER_OF[kind] for p in ("gate", "up", "down")}
    in_place = {
        "fc": {"fc.weight"},
        "norms": {f"{name}.weight" for name in NORMS_OF[kind]},
        "attention": attention | within,
        "ffn": {f"{name}.weight" for name in ffn},
        "head": {"lm_head.weight"},
        "body": {n for n in every if n.split(".")[-2] not in ("embed_tokens", "lm_head")},
        "full": every,
        "scratch": every,
    }
    parts = method.split("+")
    expected = set().union(*(in_place.get(part, set()) for part in parts))
    assert expected <= every
    if "lora" in parts:
        layers = attention | {f"{f}.weight" for f in ffn} | ({"fc.weight"} & every)
        pairs = {n.removesuffix(".weight") for n in layers - expected}
        expected |= {f"{pair}.lora_{side}.weight" for pair in pairs for side in "AB"}
    if "head-lora" in parts:
        expected |= {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
    for part, mark in (("expert", "private"), ("neuron", "neuron")):
        if part in parts:
            expected |= {f.replace("mlp.", f"mlp.{mark}.") + ".weight" for f in ffn}
    owned = dict(declare(draft, read_method(method)))
    assert set(owned) == expected
    mine = {id(parameter) for parameter in owned.values()}
    for name, parameter in draft.named_parameters():
        assert parameter.requires_grad == (id(parameter) in mine), name


@EVERY
@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"), [(torch.float64, 4, 1e-12), (torch.bfloat16, 1, 0.05)]
)
def test_merged_equals_separate(
    target: Target, kind: str, method: str, dtype: torch.dtype, steps: int, tolerance: float
) -> None:
    """In bf16 the first step of a chain: the later ones of a random eagle draft magnify rounding."""
    draft, shared, private = stirred(target, kind, method, dtype)
    merged = stock(kind, merge(shared, private), draft)
    without = stock(kind, shared, draft)
    assert apart(draft, without, dtype, steps) > 2 * tolerance, "the adapter does nothing"
    assert apart(draft, merged, dtype, steps) <= tolerance


def columns_in_another_order(merged: dict[str, Tensor], _: dict[str, Tensor]) -> None:
    for name in merged:
        if name.endswith("down_proj.weight"):
            merged[name] = merged[name].flip(1)


def pairs_of_two_layers_swapped(merged: dict[str, Tensor], private: dict[str, Tensor]) -> None:
    for name in merged:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            own = name.removesuffix(".weight")
            other = own.replace("gate_proj", "#").replace("up_proj", "gate_proj")
            other = other.replace("#", "up_proj")
            merged[name] = merged[name] - added(private, own) + added(private, other)


def scale_of_two(merged: dict[str, Tensor], private: dict[str, Tensor]) -> None:
    for name in merged:
        if name.removesuffix("weight") + "lora_A.weight" in private:
            merged[name] = merged[name] + added(private, name.removesuffix(".weight"))


def added(private: dict[str, Tensor], layer: str) -> Tensor:
    return private[f"{layer}.lora_B.weight"] @ private[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("kind", kind_names())
@pytest.mark.parametrize(
    ("method", "mistake"),
    [
        ("expert", columns_in_another_order),
        ("lora", pairs_of_two_layers_swapped),
        ("lora", scale_of_two),
    ],
)
def test_a_wrong_merge_is_caught(target: Target, kind: str, method: str, mistake: Any) -> None:
    """The same names and shapes, another function."""
    draft, shared, private = stirred(target, kind, method, torch.float64)
    merged = merge(shared, private)
    assert apart(draft, stock(kind, merged, draft)) < 1e-12
    mistake(merged, private)
    assert apart(draft, stock(kind, merged, draft)) > 1e-4


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_tensors_stay_bit_exact_beside_it_and_in_the_merged_draft(
    target: Target, kind: str, method: str, dtype: torch.dtype
) -> None:
    draft, shared, private = stirred(target, kind, method, dtype)
    touched = {home_of(n) for n in private if home_of(n) == n or "lora_" in n}
    now = {n.replace(".base_layer.", "."): t for n, t in draft.state_dict().items()}
    assert set(shared) <= set(now)
    merged = merge(shared, private)
    assert set(merged) == set(shared)
    for name, tensor in shared.items():
        if name not in {n for n in private if home_of(n) == n}:
            assert tensor_hash(now[name]) == tensor_hash(tensor), name
        if name not in touched:
            suffix = name.split("mlp.")[-1]
            whole = merged[name]
            if suffix in CONCATENATED:
                whole = whole.narrow(CONCATENATED[suffix], 0, SHARED_WIDTH)
            assert tensor_hash(whole) == tensor_hash(tensor), name


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extract_gives_the_adapter_back_bit_for_bit(
    target: Target, kind: str, method: str, dtype: torch.dtype
) -> None:
    _, shared, private = stirred(target, kind, method, dtype)
    merged = merge(shared, private)
    if "lora" in method:
        with pytest.raises(UserError, match="cannot be taken out of a merged draft"):
            extract(merged, shared, read_method(method))
        return
    back = extract(merged, shared, read_method(method))
    assert {n: tensor_hash(t) for n, t in back.items()} == {
        n: tensor_hash(t) for n, t in private.items()
    }


@EVERY
def test_a_resumed_run_ends_with_the_same_bytes(
    target: Target,
    answers: list[Answer],
    kind: str,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = TrainConfig(
        method,
        "6",
        4,
        lr=1e-2,
        epochs=1,
        batch_tokens=400,
        rollout=2,
        evaluations=3,
        precision="fp32",
    )
    answers, evaluations = answers[:9], iter("rdr")

    def rising(_: object, runs: Sequence[AdapterRun], *rest: object) -> None:
        if next(evaluations, "r") == "d":
            raise KeyboardInterrupt
        for run in runs:
            run.note_tau(float(run.state.step))

    def trained(checkpoints: Path | None) -> Trained:
        draft = fresh_draft(target, kind=kind)
        return train(target, draft, answers, answers[:2], config, k=3, checkpoints=checkpoints)

    monkeypatch.setattr(train_module, "_evaluate", rising)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path)
    resumed, whole = trained(tmp_path), trained(None)
    assert whole.record.best_step == whole.record.planned_steps > 1
    assert resumed.record.lasting() == whole.record.lasting()
    assert state_hash(resumed.tensors) == state_hash(whole.tensors)


@EVERY
def test_put_restores_in_a_fresh_draft_what_take_took(
    target: Target, kind: str, method: str
) -> None:
    draft, _, private = stirred(target, kind, method, torch.float32)
    other = fresh_draft(target, kind=kind)
    put(other, private)
    for a, b in zip(outputs(draft, torch.float32), outputs(other, torch.float32), strict=True):
        assert torch.equal(a, b)
    again = take(other, read_method(method))
    assert {n: tensor_hash(t) for n, t in again.items()} == {
        n: tensor_hash(t) for n, t in private.items()
    }


@EVERY
def test_a_saved_adapter_is_loaded_as_it_was(
    target: Target, kind: str, method: str, tmp_path: Path
) -> None:
    _, _, private = stirred(target, kind, method, torch.bfloat16)
    card = {"adapter_hash": state_hash(private), "shared_widths": {"a": 3}}
    save_adapter(tmp_path / "part", Adapter(method, private, card))
    back = load_adapter(tmp_path / "part")
    assert (back.method, back.card) == (method, card)
    assert {n: tensor_hash(t) for n, t in back.tensors.items()} == {
        n: tensor_hash(t) for n, t in private.items()
    }


@REFUSED
def test_an_adapter_that_the_kind_has_not_is_refused_with_what_it_can_carry(
    target: Target, kind: str, method: str
) -> None:
    draft = fresh_draft(target, kind=kind)
    before = state_hash(draft.state_dict())
    missing = ", ".join(sorted(lacks(kind, method)))
    with pytest.raises(UserError) as caught:
        prepare(draft, read_method(method), Setup(width=WIDTH, init="active", seed=0))
    said, _, possible = str(caught.value).partition("; it can carry ")
    name = read_method(method).name
    assert said == f"this {kind} draft has no {missing} to train (method {name})"
    offered = possible.split(", ")
    for part in offered:  # whatever is offered is then taken
        check_carries(draft, read_method(part), Setup())
    assert set(offered) == set(ADAPTERS) - {"feature-map", "weight-sync"} - LACKS[kind]
    assert state_hash(draft.state_dict()) == before


def test_merge_refuses_a_tensor_without_a_home() -> None:
    with pytest.raises(ValueError, match="has no shared tensor other.weight"):
        merge({"fc.weight": torch.zeros(1)}, {"other.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="has no shared tensor other.weight"):
        merge({"fc.weight": torch.zeros(1)}, {"other.lora_A.weight": torch.zeros(1)})


def test_a_tensor_is_replaced_then_added_to_then_widened_whatever_the_order_of_names() -> None:
    shared = {"mlp.gate_proj.weight": torch.full((2, 2), 7.0)}
    private = {
        "mlp.private.gate_proj.weight": torch.full((1, 2), 5.0),
        "mlp.gate_proj.lora_A.weight": torch.tensor([[1.0, 2.0]]),
        "mlp.gate_proj.lora_B.weight": torch.tensor([[10.0], [20.0]]),
        "mlp.gate_proj.weight": torch.ones(2, 2),
    }
    expected = torch.tensor([[11.0, 21.0], [21.0, 41.0], [5.0, 5.0]])
    for names in (list(private), list(reversed(private))):
        merged = merge(shared, {name: private[name] for name in names})
        assert torch.equal(merged["mlp.gate_proj.weight"], expected)


def test_a_low_rank_sum_is_rounded_once(target: Target) -> None:
    """In bf16 the sum is taken in float32 first; adding a product rounded to bf16 is another number."""
    _, shared, private = stirred(target, "eagle3", "lora", torch.bfloat16)
    merged = merge(shared, private)["fc.weight"]
    up, down = private["fc.lora_B.weight"], private["fc.lora_A.weight"]
    exact = shared["fc.weight"].double() + up.double() @ down.double()
    rounded_once = exact.to(torch.bfloat16)
    assert float((merged != rounded_once).double().mean()) < 0.01  # ties of float32
    twice = (shared["fc.weight"] + up @ down).to(torch.bfloat16)
    assert float((twice != rounded_once).double().mean()) > 0.05


def test_a_adapter_counts_its_parameters() -> None:
    assert Adapter("expert", {"a": torch.zeros(3, 4), "b": torch.zeros(5)}).parameter_count() == 17
