"""MTP heads with routed experts: their routing, the two forms they are stored in, and what is never trained."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from redraft.adapters.adapter import Adapter, check_carries, declare, prepare
from redraft.adapters.kind import Setup
from redraft.adapters.table import read_method
from redraft.checkpoints.inspect import inspect_draft
from redraft.checkpoints.load import StoredDraft, read_draft, stored
from redraft.checkpoints.reload_check import check_export
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.records import Answer, Prompt
from redraft.core.rng import seeded
from redraft.decoding.sampling import Sampling
from redraft.drafts.mtp.network import MLP, MtpDraft
from redraft.drafts.mtp.routed import RoutedFFN, RoutedShape
from redraft.drafts.routing import sum_of_chosen
from redraft.metrics.live import live
from redraft.metrics.measure import answer_all, measure
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.stages import merge_draft, train_adapter
from tests.conftest import asked, fresh_draft, in_double
from tests.drafts.mtp_targets import ROUTED, routed_head, routed_in_double

NEAR = 1e-5
BLOCKS = {
    "qwen3_5_moe": Qwen3_5MoeSparseMoeBlock,
    "qwen3_next": Qwen3NextSparseMoeBlock,
    "glm4_moe": Glm4MoeMoE,
}
FORMS = pytest.mark.parametrize("packed", [False, True], ids=["one by one", "packed"])


@pytest.fixture(scope="module", params=ROUTED)
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a family, and a target of it in float64."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, routed_in_double(ROUTED[request.param](folder))


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(str(ROUTED["glm4_moe"](tmp_path_factory.mktemp("glm"))))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(str(ROUTED["qwen3_5_moe"](tmp_path_factory.mktemp("qwen"))))


def in_form(draft: StoredDraft, packed: bool) -> StoredDraft:
    config: Any = draft.config
    routed = dataclasses.replace(config.routed, packed=packed)
    return dataclasses.replace(draft, config=dataclasses.replace(config, routed=routed))


# -- the function --------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_5_moe": {
        "not normalised": {"normalised": False},
        "two experts for three": {"per_token": 2},
        "no shared expert": {"shared_width": 0},
    },
    "qwen3_next": {"normalised": {"normalised": True}},
    "glm4_moe": {
        "not normalised": {"normalised": False},
        "not scaled": {"scale": 1.0},
        "without groups": {"groups": 1, "groups_per_token": 1},
        "another number of groups": {"groups_per_token": 3},
        "no shared expert": {"shared_width": 0},
    },
}
"""What is wrong with a shape."""


def ungated(ffn: RoutedFFN) -> None:
    ffn.shared_expert_gate.forward = lambda x: torch.ones_like(x[:, :1])  # type: ignore[method-assign]


def halves_swapped(ffn: RoutedFFN) -> None:
    gate, up = ffn.experts.gate_up_proj.chunk(2, dim=1)
    ffn.experts.gate_up_proj.data = torch.cat([up, gate], dim=1)


def without_bias(ffn: RoutedFFN) -> None:
    ffn.gate.e_score_correction_bias.zero_()


def bias_in_the_shares(ffn: RoutedFFN) -> None:
    route = ffn.gate._sigmoid

    def wrong(x_MH: Tensor) -> tuple[Tensor, Tensor]:
        chosen, share = route(x_MH)
        return chosen, share + ffn.gate.e_score_correction_bias[chosen]

    ffn.gate._sigmoid = wrong  # type: ignore[method-assign]


def routed_by_softmax(ffn: RoutedFFN) -> None:
    ffn.gate.shape = dataclasses.replace(ffn.gate.shape, sigmoid=False)


MISTAKES: dict[str, list[Callable[[RoutedFFN], None]]] = {
    "qwen3_5_moe": [ungated, halves_swapped],
    "qwen3_next": [],
    "glm4_moe": [halves_swapped, without_bias, bias_in_the_shares, routed_by_softmax],
}


@torch.no_grad()
def test_the_ffn_is_that_of_transformers_block(own: Any) -> None:
    """And would be seen to be another one, whatever of the routing was different."""
    name, target = own
    draft = routed_head(target)
    state = {n.removeprefix(MLP): t for n, t in draft.state_dict().items() if n.startswith(MLP)}
    block = BLOCKS[name](target.model.config).double()
    block.load_state_dict(state)
    x = 2 * torch.randn(3, 40, draft.hidden_size, generator=seeded(0, "x")).double()
    expected = block(x)

    def far(shape: RoutedShape, mistake: Callable[[RoutedFFN], None] | None = None) -> float:
        ffn = RoutedFFN(draft.hidden_size, shape, "silu").double()
        fitting = {n: t.clone() for n, t in state.items() if n in ffn.state_dict()}
        ffn.load_state_dict(fitting)
        if mistake is not None:
            mistake(ffn)
        return float((ffn(x) - expected).abs().max() / expected.abs().max())

    routed = draft.config.routed
    assert routed is not None
    assert far(routed) < NEAR
    for what, change in SHAPES[name].items():
        assert far(dataclasses.replace(routed, **change)) > 1e2 * NEAR, what
    for mistake in MISTAKES[name]:
        assert far(routed, mistake) > 1e2 * NEAR, mistake.__name__


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.largest = max(self.largest, tensor.numel())
        return made


def test_memory_follows_the_tokens_and_not_the_experts() -> None:
    """Neither the forward pass nor the backward pass makes a tensor of all experts, or of every token in each."""
    E, k, H, width, M = 64, 2, 32, 48, 50
    ffn = RoutedFFN(H, RoutedShape(E, k, width, shared_width=16), "silu")
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.normal_(generator=seeded(0, str(parameter.shape)))
    ffn.experts.requires_grad_(False)
    x = torch.randn(M, H, generator=seeded(0, "x"), requires_grad=True)

    def largest() -> int:
        with Sizes() as sizes:
            ffn(x).sum().backward()
        return sizes.largest

    assert largest() <= max(M * k * 2 * width, E * H)  # the router's own gradient is E * H
    ffn.experts.requires_grad_(True)
    assert largest() >= E * 2 * width * H


def test_shapes_alone_are_enough_to_plan() -> None:
    """Without numbers as many tokens go to every expert: the work of M * k rows."""
    ran: list[int] = []

    def run(index: int, x: Tensor) -> Tensor:
        ran.append(len(x))
        return x

    chosen = torch.zeros(10, 3, dtype=torch.long, device="meta")
    x, share = torch.zeros(10, 4, device="meta"), torch.zeros(10, 3, device="meta")
    assert sum_of_chosen(x, chosen, share, 8, run).shape == (10, 4)
    assert (sum(ran), max(ran) - min(ran)) == (30, 1)


# -- stored --------------------------------------------------------------------------------------


@FORMS
def test_a_head_is_written_in_the_form_that_it_was_read_in(
    own: Any, tmp_path: Path, packed: bool
) -> None:
    name, target = own
    draft = in_form(stored(routed_head(target), target), packed)
    draft.save(tmp_path / "d")
    found = load_file(next((tmp_path / "d").glob("*.safetensors")))
    front = "model.layers.3." if name == "glm4_moe" else "mtp.layers.0."
    experts = {
        n.removeprefix(f"{front}mlp.experts."): t
        for n, t in found.items()
        if "experts." in n and "shared" not in n
    }
    if packed:
        shapes = {n: tuple(t.shape) for n, t in experts.items()}
        assert shapes == {"gate_up_proj": (8, 48, 128), "down_proj": (8, 128, 24)}
    else:
        parts = ("gate", "up", "down")
        assert set(experts) == {f"{e}.{part}_proj.weight" for e in range(8) for part in parts}
        whole = draft.tensors[f"{MLP}experts.gate_up_proj"]
        assert torch.equal(experts["5.up_proj.weight"], whole[5, 24:])
    back = read_draft(str(tmp_path / "d"))
    assert back.hash() == draft.hash()
    back.save(tmp_path / "again")
    again = load_file(next((tmp_path / "again").glob("*.safetensors")))
    assert {n: (t.dtype, t.shape) for n, t in again.items()} == {
        n: (t.dtype, t.shape) for n, t in found.items()
    }
    assert check_export(back, tmp_path / "again") < 1e-6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_topk_prob", False),
        ("routed_scaling_factor", 2.0),
        ("topk_group", 3),
        ("num_experts_per_tok", 2),
    ],
)
def test_the_second_reader_sees_another_routing(
    glm: Target, tmp_path: Path, key: str, value: Any
) -> None:
    draft = stored(routed_head(glm), glm)
    config: Any = draft.config
    draft.save(tmp_path / "d")
    assert check_export(draft, tmp_path / "d") < 1e-6
    other = dataclasses.replace(config, checkpoint={**config.checkpoint, key: value})
    dataclasses.replace(draft, config=other).save(tmp_path / "other")
    with pytest.raises(UserError, match="differ"):
        check_export(draft, tmp_path / "other")


Tensors = dict[str, Tensor]
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "an expert lost": (
        lambda t: {n: x for n, x in t.items() if ".experts.3.up" not in n},
        {},
        r"missing mtp\.layers\.0\.mlp\.experts\.3\.up_proj\.weight",
    ),
    "more experts than declared": (
        lambda t: t,
        {"num_experts": 7},
        r"unknown mtp\.layers\.0\.mlp\.experts\.7\.down_proj\.weight",
    ),
    "all experts lost": (
        lambda t: {n: x for n, x in t.items() if ".experts." not in n},
        {},
        r"missing mtp\.layers\.0\.mlp\.experts\.0\.down_proj\.weight.* and 16 more",
    ),
    "the shared gate lost": (
        lambda t: {n: x for n, x in t.items() if "shared_expert_gate" not in n},
        {},
        r"missing mtp\.layers\.0\.mlp\.shared_expert_gate\.weight",
    ),
    "the router lost": (
        lambda t: {n: x for n, x in t.items() if ".mlp.gate." not in n},
        {},
        r"missing mtp\.layers\.0\.mlp\.gate\.weight",
    ),
    "another width": (
        lambda t: t,
        {"moe_intermediate_size": 25},
        r"experts\.0\.gate_proj\.weight should be \[25, 128\] according to config.json, found \[24, 128\]",
    ),
    "no number of experts": (lambda t: t, {"num_experts": None}, "expected a key 'num_experts'"),
    "more per token than there are": (
        lambda t: t,
        {"num_experts_per_tok": 9},
        "expected 1 to 8, the number of experts as num_experts_per_tok, found 9",
    ),
    "quantised": (
        lambda t: {**t, "mtp.layers.0.mlp.experts.0.up_proj.weight_scale_inv": torch.zeros(1)},
        {},
        "with quantised weights",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_head_is_named(qwen: Target, tmp_path: Path, name: str) -> None:
    change, keys, says = BROKEN[name]
    written(stored(routed_head(qwen), qwen), tmp_path, change, keys)
    with pytest.raises(UserError, match=says):
        read_draft(str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"n_group": 3}, r"expected a divisor of n_routed_experts \(8\)"),
        ({"n_group": 8}, "2 experts a group as n_group"),
        ({"topk_group": 5}, r"expected at most n_group \(4\)"),
        ({"topk_group": 1}, "and groups of 3 experts together as topk_group, found 1"),
        ({"topk_group": None}, "expected a key 'topk_group'"),
        ({"scoring_func": "softmax"}, "scoring_func is softmax, redraft computes sigmoid routers"),
    ],
)
def test_routing_that_is_not_computed_is_refused(
    glm: Target, tmp_path: Path, keys: dict[str, Any], says: str
) -> None:
    written(stored(routed_head(glm), glm), tmp_path, dict, keys)
    with pytest.raises(UserError, match=says):
        read_draft(str(tmp_path))


def written(
    draft: StoredDraft, folder: Path, change: Callable[[Any], Any], keys: dict[str, Any]
) -> None:
    """The folder of a head, changed."""
    config: Any = draft.config
    checkpoint = {k: v for k, v in {**config.checkpoint, **keys}.items() if v is not None}
    changed = dataclasses.replace(config, checkpoint=checkpoint)
    dataclasses.replace(draft, config=changed).save(folder)
    (folder / "redraft.json").unlink()
    path = next(folder.glob("*.safetensors"))
    save_file(change(load_file(path)), path)


UNGROUPED = {"n_group": 1, "topk_group": 1}
RULES: dict[str, tuple[str, bool, dict[str, Any], str, str]] = {
    "one by one": ("glm", False, UNGROUPED, "vllm", ""),
    "packed in vLLM": ("glm", True, {}, "vllm", "refused: its loader .* one by one"),
    "packed in llama.cpp": (
        "glm",
        True,
        UNGROUPED,
        "llama.cpp",
        "refused: its converter .* one by one",
    ),
    "packed, Qwen's": ("qwen", True, {}, "vllm", ""),
    "packed, Qwen's, in llama.cpp": ("qwen", True, {}, "llama.cpp", ""),
    "groups": ("glm", False, {}, "llama.cpp", r"wrong: .* writes no groups of experts"),
}


@pytest.mark.parametrize("name", RULES)
def test_engines_are_judged_by_the_form_and_the_routing(
    glm: Target, qwen: Target, tmp_path: Path, name: str
) -> None:
    family, packed, keys, engine, says = RULES[name]
    target = glm if family == "glm" else qwen
    written(in_form(stored(routed_head(target), target), packed), tmp_path, dict, keys)
    found = inspect_draft(str(tmp_path))
    assert found.unreadable is None
    said = [
        f"{finding.level}: {finding.says}" for finding in found.engines if finding.engine == engine
    ]
    hard = [sentence for sentence in said if not sentence.startswith("note")]
    assert len(hard) == bool(says), hard
    assert not says or re.match(says, hard[0])


def test_a_dense_head_where_engines_build_experts(qwen: Target, tmp_path: Path) -> None:
    """And the other way round."""
    stored(fresh_draft(qwen, kind="mtp", width=24), qwen).save(tmp_path / "dense")
    written(stored(routed_head(qwen), qwen), tmp_path / "routed", dict, {})
    path = tmp_path / "routed" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in raw.items() if k != "num_experts"}))
    for folder, says in (
        ("dense", "builds 8 routed experts by config.json, and this head is dense"),
        ("routed", "builds a dense FFN by config.json, and this head has routed experts"),
    ):
        found = inspect_draft(str(tmp_path / folder)).engines
        levels = {(f.engine, f.level) for f in found if f.says == says}
        assert levels == {("vllm", "refused"), ("sglang", "wrong"), ("llama.cpp", "refused")}


def test_frozen_experts_are_not_held_twice_and_a_bias_stays_exact(
    glm: Target, tmp_path: Path
) -> None:
    draft = stored(routed_head(glm).to(torch.bfloat16), glm)
    bias = f"{MLP}gate.e_score_correction_bias"
    exact = torch.randn(8, generator=seeded(0, "exact"))
    draft = draft.with_tensors({**draft.tensors, bias: exact}, {})
    draft.save(tmp_path)
    read = read_draft(str(tmp_path))
    assert torch.equal(read.tensors[bias], exact)
    built = read.build(dtype=torch.bfloat16)
    state = built.state_dict()
    assert torch.equal(state[bias], exact)
    shared = {n for n, t in state.items() if t.data_ptr() == read.tensors[n].data_ptr()}
    assert shared == {
        f"{MLP}{name}"
        for name in (
            "gate.weight",
            "gate.e_score_correction_bias",
            "experts.gate_up_proj",
            "experts.down_proj",
        )
    }
    assert {t.dtype for n, t in state.items() if n != bias} == {torch.bfloat16}


# -- run and trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_replay_is_the_live_loop(
    router: str, target_folder: Path, tmp_path: Path, prompts: list[Prompt]
) -> None:
    """The softmax router in a target that keeps no recurrent state, as Qwen's do."""
    if router == "softmax":
        target = in_double(target_folder)
        draft = routed_head(target, routed=RoutedShape(8, 3, 24, shared_width=40))
    else:
        target = routed_in_double(ROUTED["glm4_moe"](tmp_path))
        draft, prompts = routed_head(target), asked(target)
    steps, _ = live(target, draft, prompts[:5], 3, 16)
    assert measure(target, draft, prompts[:5], k=3, max_new_tokens=16).traces == steps


def test_a_head_begins_with_the_targets_last_layer(own: Any) -> None:
    _, target = own
    draft = MtpDraft.from_last_layer(target)
    theirs = target.decoder.layers[-1].state_dict()
    mine = draft.layers[0].state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name].float()) for name in mine)


TRAINED = {
    "body": {"fc", "norms", "attention", "shared"},
    "full": {"fc", "norms", "attention", "shared"},
    "fc+norms": {"fc", "norms"},
    "attention": {"attention"},
    "ffn": {"shared"},
}


@pytest.mark.parametrize("method", TRAINED)
def test_neither_experts_nor_router_are_ever_trained(qwen: Target, method: str) -> None:
    draft = routed_head(qwen)
    prepare(draft, read_method(method), Setup())
    owned = {name for name, _ in declare(draft, read_method(method))}
    parts = {
        "fc": {"fc.weight"},
        "norms": {n for n in draft.state_dict() if n.endswith("norm.weight")},
        "attention": {n for n in draft.state_dict() if ".self_attn." in n},
        "shared": {n for n in draft.state_dict() if ".shared_expert" in n},
    }
    assert len(parts["shared"]) == 4
    assert owned == set().union(*(parts[part] for part in TRAINED[method]))


def test_low_rank_pairs_go_to_dense_layers_alone(qwen: Target) -> None:
    draft = routed_head(qwen)
    prepare(draft, read_method("lora"), Setup(rank=4))
    owned = {name.split(".lora_")[0] for name, _ in declare(draft, read_method("lora"))}
    attention = {f"layers.0.self_attn.{name}_proj" for name in "qkvo"}
    shared = {f"{MLP}shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert owned == {"fc"} | attention | shared


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("expert", "needs an FFN that sums over neurons .* found RoutedFFN; use --method lora"),
        ("scratch", "8 experts of 24 neurons .* is not trained from nothing"),
    ],
)
def test_what_routed_experts_do_not_carry_is_a_sentence(
    glm: Target, method: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        check_carries(routed_head(glm), read_method(method), Setup())


def test_a_head_is_trained_merged_and_written(own: Any, tmp_path: Path) -> None:
    """It learns, the experts keep their bits, and what is written is read by a second reader."""
    name, target = own
    method, packed = ("lora+norms", True) if name == "qwen3_next" else ("body", name == "glm4_moe")
    prompts = asked(target)[:16]
    answers: list[Answer] = answer_all(target, prompts, 24, 8, Sampling())
    head = in_form(stored(routed_head(target), target), packed)
    config = TrainConfig(
        method=method, lr=1e-2, rank=4, epochs=12, batch_tokens=512, rollout=2, precision="fp32"
    )
    adapter: Adapter = train_adapter(target, head, answers, answers[:6], config, k=2)
    merged = merge_draft(head, adapter)
    frozen = [n for n in head.tensors if n.startswith((f"{MLP}experts.", f"{MLP}gate."))]
    assert all(torch.equal(merged.tensors[n], head.tensors[n]) for n in frozen)
    assert not any(name.startswith(tuple(frozen)) for name in adapter.tensors)
    merged.save(tmp_path / "d")
    back = read_draft(str(tmp_path / "d"))
    assert (back.hash(), back.config.routed.packed) == (merged.hash(), packed)  # type: ignore[attr-defined]
    assert check_export(merged, tmp_path / "d") < 1e-6
    before, after = (
        measure(target, draft.build(target), prompts[:8], k=2, max_new_tokens=24).acceptance.tau
        for draft in (head, back)
    )
    assert after > before + 0.1
