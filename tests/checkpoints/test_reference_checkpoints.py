"""Checkpoints of EDA's reference code: read, run, told what they are, folded where that is exact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from redraft.checkpoints.inspect import inspect_draft
from redraft.checkpoints.load import load_draft, read_draft
from redraft.checkpoints.reload_check import check_export
from redraft.core.errors import UserError
from redraft.drafts.eagle.routed import RoutedShape
from redraft.models.target import Target
from redraft.pipeline.adapt import adapt
from redraft.report.terminal import print_inspection
from tests.checkpoints.crafted import as_pickle, eda_reference, edit, retensor
from tests.conftest import fresh_draft, in_double, write_prompts
from tests.drafts.test_drafts import read, worst_difference

ROUTED = RoutedShape(3, 2, 2, 1, 10)
ONE_AND_ONE = RoutedShape(1, 1, 1, 1, 10)
EXPERTS = "layers.0.block_sparse_moe"


@pytest.fixture(scope="module")
def target64(target_folder: Path) -> Target:
    return in_double(target_folder)


def made(target: Target, shape: RoutedShape = ROUTED, **variant: Any) -> Any:
    return fresh_draft(target, kind="eagle", routed=shape, **variant)


def logits(target: Target, draft: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [draft.logits(s) for s in draft.rollout(*read(target, draft), 1, 4)]


# -- routed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fc_bias", [True, False])
@pytest.mark.parametrize("pickle", [True, False])
def test_routed_experts_are_read_and_run_exactly(
    target64: Target, tmp_path: Path, fc_bias: bool, pickle: bool
) -> None:
    draft = made(target64, fc_bias=fc_bias)
    folder = eda_reference(tmp_path / "d", draft)
    if pickle:
        as_pickle(folder)
    back = read_draft(str(folder), unpickle=pickle).build(target64)
    assert back.config == draft.config
    assert back.config.routed.private_width == 10  # which config.json does not say
    for name, tensor in draft.stored_state().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    for a, b in zip(logits(target64, back), logits(target64, draft), strict=True):
        assert torch.equal(a, b)


def test_how_many_experts_run_is_taken_from_the_config(target64: Target, tmp_path: Path) -> None:
    draft = made(target64)
    folder = eda_reference(tmp_path / "d", draft)
    edit(folder, top_k_shared=1)
    other = load_draft(str(folder), target64)
    pairs = zip(logits(target64, other), logits(target64, draft), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-3
    edit(folder, top_k_shared=..., num_shared_experts=...)  # the reference's default is one
    default = load_draft(str(folder), target64)
    assert default.config == other.config


def test_saving_says_why_it_cannot(target: Target, tmp_path: Path) -> None:
    stored = read_draft(str(eda_reference(tmp_path / "d", made(target))))
    for format in ("auto", "vllm-eagle", "sglang-eagle"):
        with pytest.raises(UserError, match="routed experts, 3 shared .* no dense layer is equal"):
            stored.save(tmp_path / "out", format, tp=[1, 5])
    assert not (tmp_path / "out").exists()


def test_adapting_it_is_refused_before_anything_is_generated(
    target: Target, tmp_path: Path
) -> None:
    draft = str(eda_reference(tmp_path / "d", made(target)))
    write_prompts(tmp_path / "p.jsonl", 8)
    with pytest.raises(UserError, match="no dense layer is equal"):
        adapt(target, draft, str(tmp_path / "p.jsonl"), method="fc", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_inspect_says_what_it_is(target: Target, tmp_path: Path) -> None:
    found = inspect_draft(str(eda_reference(tmp_path / "d", made(target))), target)
    assert found.unreadable is None
    assert (found.kind, found.layout) == (
        "eagle",
        "EDA reference (3 shared experts (2 per token), 2 private (1 per token))",
    )
    assert any("routers choose token by token" in variant for variant in found.variants)
    for engine in ("vllm", "sglang", "llama.cpp"):
        assert found.serves(engine) == "does not load it"
    console = Console(record=True, width=200)
    print_inspection(found, console)
    assert "3 shared experts" in console.export_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shared_experts": 4}, r"num_shared_experts 4, the file has shared experts \[0, 1, 2"),
        ({"num_private_experts": 1}, r"num_private_experts 1, the file has private experts \[0, 1"),
        ({"top_k_shared": 4}, "top_k_shared is 4, expected 1 to 3"),
        ({"top_k_private": 0}, "expected a positive integer below 2.31 as top_k_private, found 0"),
        ({"intermediate_size": 25}, f"{EXPERTS}.shared_experts.0.gate_proj.weight should be"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    target: Target, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = eda_reference(tmp_path / "d", made(target))
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))
    found = inspect_draft(str(folder))
    assert found.unreadable is not None
    assert found.layout.startswith("EDA reference")


@pytest.mark.parametrize("shape", [ROUTED, ONE_AND_ONE])
@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("shared_gate.weight", None, "missing {}"),
        ("private_experts.0.up_proj.weight", None, "missing {}"),
        ("shared_experts.0.down_proj.weight", torch.zeros(32, 23), "{} should be"),
        ("private_gate.weight", torch.zeros(3, 32), "{} should be"),
        ("shared_experts.0.gate_proj.bias", torch.zeros(24), "unknown {}"),
        ("private_experts.0.gate_proj.weight", torch.full((10, 32), torch.nan), "not finite"),
    ],
)
def test_a_file_that_lacks_a_tensor_or_has_another_is_refused(
    target: Target,
    tmp_path: Path,
    shape: RoutedShape,
    tensor: str,
    value: torch.Tensor | None,
    message: str,
) -> None:
    folder = eda_reference(tmp_path / "d", made(target, shape))
    retensor(folder, **{f"{EXPERTS}.{tensor}".replace(".", "__"): value})
    with pytest.raises(UserError, match=message.format(f"{EXPERTS}.{tensor}")):
        read_draft(str(folder))


# -- one shared and one private expert ------------------------------------------------------------


@pytest.mark.parametrize("fc_bias", [True, False])
def test_one_and_one_is_read_as_the_dense_draft_it_is(
    target64: Target, tmp_path: Path, fc_bias: bool
) -> None:
    draft = made(target64, ONE_AND_ONE, fc_bias=fc_bias)
    folder = eda_reference(tmp_path / "d", draft)
    stored = read_draft(str(folder))
    wider = draft.config.intermediate_size + ONE_AND_ONE.private_width
    assert stored.config == dataclasses.replace(draft.config, routed=None, intermediate_size=wider)
    given = draft.stored_state()
    for projection, dimension in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        whole = stored.tensors[f"layers.0.mlp.{projection}.weight"]
        shared, private = whole.split([wider - 10, 10], dim=dimension)
        for part, group in ((shared, "shared"), (private, "private")):
            assert torch.equal(part, given[f"layers.0.mlp.{group}_experts.0.{projection}.weight"])
    others = {n for n in given if ".mlp." not in n}
    assert ("fc.bias" in others) == fc_bias
    for name in others:
        assert torch.equal(stored.tensors[name], given[name]), name
    dense = stored.build(target64)
    for a, b in zip(logits(target64, dense), logits(target64, draft), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_and_one_is_exported_like_any_dense_draft(target64: Target, tmp_path: Path) -> None:
    folder = eda_reference(tmp_path / "d", made(target64, ONE_AND_ONE, fc_bias=True))
    stored = read_draft(str(folder))
    with pytest.raises(UserError, match="fc.bias that is not zero"):
        stored.save(tmp_path / "vllm", "vllm-eagle")
    stored.save(tmp_path / "out", "sglang-eagle")
    assert check_export(stored, tmp_path / "out") < 1e-6
    back = load_draft(str(tmp_path / "out"), target64)
    assert worst_difference(target64, back, 1, tmp_path / "out") < 1e-7
    record = json.loads((tmp_path / "out" / "redraft.json").read_text())
    assert "one shared and one private expert, read as one dense FFN" in record["read_from"]
    assert not any("experts" in name for name in read_draft(str(tmp_path / "out")).tensors)


def test_inspect_says_that_one_and_one_was_folded(target: Target, tmp_path: Path) -> None:
    found = inspect_draft(str(eda_reference(tmp_path / "d", made(target, ONE_AND_ONE))), target)
    assert found.unreadable is None
    assert "one shared and one private expert, read as one dense FFN" in found.layout
    assert found.shape["intermediate_size"] == 24 + 10
    assert not any("routers" in variant for variant in found.variants)
    assert found.serves("vllm") == "does not load it"  # as stored; exported it does
