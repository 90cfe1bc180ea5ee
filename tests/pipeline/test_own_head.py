"""`redraft mtp` on a target that keeps a recurrent state, as Qwen3.5 does, and lost its head."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from redraft.checkpoints.load import read_draft, stored
from redraft.checkpoints.own_head import inspect_head, stitch
from redraft.cli.app import app
from redraft.core import ranks
from redraft.core.errors import UserError
from redraft.core.folders import read_tensors
from redraft.models.loading import load_target
from tests.conftest import fresh_draft, make_tokenizer, write_prompts
from tests.drafts.mtp_targets import (
    SIZES,
    routed_head,
    save_glm4_moe,
    save_qwen3_5,
    save_qwen3_5_moe,
)

SETTINGS = {
    "regenerate.max_new_tokens": 24,
    "general.guard": "off",
    "train.epochs": 30,
    "train.rollout": 2,
    "train.evaluations": 4,
    "train.precision": "fp32",
    "train.lr": 0.01,
    "measure.k": 2,
    "measure.eval_limit": 4,
    "measure.heldout": 6,
    "measure.eval_new_tokens": 24,
}


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("lost"))


@pytest.fixture(scope="module", params=[save_qwen3_5_moe, save_glm4_moe])
def routed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads with routed experts; of the first in a target with a recurrent state, packed."""
    return made(tmp_path_factory.mktemp("routed"), request.param)


def made(folder: Path, save: Callable[..., Path] | None = None) -> Path:
    """base: a target with its head. tuned: a fine-tune, saved by Transformers."""
    linear = {} if save is save_glm4_moe else {"linear": True}
    target = load_target(str((save or save_qwen3_5)(folder / "trunk", **linear)))
    width = SIZES["intermediate_size"]
    draft = fresh_draft(target, kind="mtp", width=width) if save is None else routed_head(target)
    head = stored(draft, target)
    if save is save_qwen3_5_moe:
        experts = dataclasses.replace(draft.config.routed, packed=True)
        head = dataclasses.replace(head, config=dataclasses.replace(draft.config, routed=experts))
    stitch(str(folder / "trunk"), head, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
    model.save_pretrained(folder / "tuned")
    make_tokenizer().save_pretrained(folder / "tuned")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(folder / "trunk" / name, folder / "tuned" / name)
    write_prompts(folder / "p.jsonl", 24)
    return folder


def mtp(folder: Path, out: Path, *more: str) -> Any:
    sets = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    words = [
        "--target",
        str(folder / "tuned"),
        "--prompts",
        str(folder / "p.jsonl"),
        "--out",
        str(out),
    ]
    ended = CliRunner().invoke(app, ["mtp", *words, *more, *sets, "--json"])
    if ended.exception is not None:
        raise ended.exception
    return json.loads(ended.stdout)


def test_the_bases_head_is_grafted_adapted_and_stitched_in(lost: Path, tmp_path: Path) -> None:
    before = inspect_head(str(lost / "tuned"), str(lost / "base"))
    assert before is not None
    assert before.state == "missing"
    said = mtp(lost, tmp_path / "run", "--base", str(lost / "base"))
    found = inspect_head(str(tmp_path / "run" / "checkpoint"), str(lost / "base"))
    assert found is not None
    assert (found.state, found.same_as_base, found.trunk_changed) == ("whole", False, True)
    assert said["checkpoint"]["head"] == found.hash
    assert said["before"]["steps"] > 0
    assert said["train"]["trained_parameters"] == found.parameters
    assert read_draft(str(tmp_path / "run" / "run" / "draft")).hash() == found.hash
    again = mtp(lost, tmp_path / "run", "--base", str(lost / "base"))
    assert again["checkpoint"]["head"] == found.hash


def test_a_check_recommends_and_trains_nothing(lost: Path, tmp_path: Path) -> None:
    said = mtp(lost, tmp_path / "run", "--base", str(lost / "base"), "--check")
    assert said["draft"] == str(tmp_path / "run" / "head")
    assert said["evidence"]["on_base"]["steps"] > 0
    assert said["step_cost"]["target"] > 0
    assert {o["action"] for o in said["recommendation"]["options"]} >= {"keep", "adapt"}
    assert not (tmp_path / "run" / "run").exists()


def test_a_head_with_routed_experts_is_given_back(routed: Path, tmp_path: Path) -> None:
    """Everything is trained but the experts and their router, which keep their bits and their form."""
    said = mtp(routed, tmp_path / "run", "--base", str(routed / "base"))
    found = inspect_head(str(tmp_path / "run" / "checkpoint"), str(routed / "base"))
    assert found is not None
    assert (found.state, found.same_as_base, found.trunk_changed) == ("whole", False, True)
    assert said["checkpoint"]["head"] == found.hash
    before = {**read_tensors(routed / "base")}
    after = {**read_tensors(tmp_path / "run" / "checkpoint")}
    assert before.keys() == after.keys()
    head = {n for n in before if n.startswith(("mtp.", "model.layers.3."))} - read_tensors(
        routed / "tuned"
    ).keys()
    assert len(head) == found.tensors
    frozen = {n for n in head if ".mlp.experts." in n or ".mlp.gate." in n}
    assert {n for n in head if torch.equal(before[n], after[n])} == frozen
    trained = sum(before[n].numel() for n in head - frozen)
    assert said["train"]["trained_parameters"] == trained < found.parameters


def test_a_head_begins_with_the_targets_last_layer(lost: Path, tmp_path: Path) -> None:
    said = mtp(lost, tmp_path / "run", "--from-layer")
    head, layer = read_draft(str(tmp_path / "run" / "head")), load_target(str(lost / "tuned"))
    own = layer.decoder.layers[-1].state_dict()
    assert torch.equal(head.tensors["layers.0.mlp.up_proj.weight"], own["mlp.up_proj.weight"])
    found = inspect_head(str(tmp_path / "run" / "checkpoint"))
    assert found is not None
    assert (found.state, found.hash) == ("whole", said["checkpoint"]["head"])
    assert found.hash != head.hash()


def test_flags_that_do_nothing_are_refused(
    lost: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = ["--base", str(lost / "base")], tmp_path / "run"
    with pytest.raises(UserError, match="does not use --verify-in, --limit"):
        mtp(lost, out, *base, "--check", "--verify-in", "vllm", "--limit", "3")
    with pytest.raises(UserError, match="name that with --verify-in"):
        mtp(lost, out, *base, "--python", "python3")
    with pytest.raises(UserError, match="unknown --engine|no engine"):
        mtp(lost, out, *base, "--verify-in", "other")
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(UserError, match="the work of one process"):
        mtp(lost, out, *base, "--check")
    assert not out.exists()


def test_what_cannot_be_given_back_is_a_sentence(lost: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no MTP head to take .* \(--base\)"):
        mtp(lost, tmp_path / "a")
    with pytest.raises(UserError, match="not both"):
        mtp(lost, tmp_path / "b", "--base", str(lost / "base"), "--from-layer")
    with pytest.raises(UserError, match="--from-layer reads the last layer"):
        mtp(lost, tmp_path / "b", "--from-layer", "--device-map", "tensor-parallel")
    with pytest.raises(UserError, match="merge the adapter into the model first"):
        mtp(lost, tmp_path / "c", "--base", str(lost / "base"), "--target-adapter", "x")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_inspect_tells_scripts_by_its_end(lost: Path) -> None:
    ended = CliRunner().invoke(app, ["inspect", str(lost / "tuned")])
    assert ended.exit_code == 3
    assert "MTP head    missing" in ended.stdout
    ended = CliRunner().invoke(app, ["inspect", str(lost / "base"), "--base", str(lost / "base")])
    assert ended.exit_code == 0
    assert "the base's, to the last bit" in ended.stdout
