"""`redraft mtp` on a target that keeps a recurrent state, as Qwen3.5 does, and lost its head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from redraft.checkpoints.load import read_draft, stored
from redraft.checkpoints.own_head import inspect_head, stitch
from redraft.cli.app import app
from redraft.core.errors import UserError
from redraft.models.loading import load_target
from tests.conftest import fresh_draft, make_tokenizer, write_prompts
from tests.drafts.mtp_targets import SIZES, save_qwen3_5

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
    """base: a target with its head. tuned: a fine-tune, saved by Transformers."""
    folder = tmp_path_factory.mktemp("lost")
    target = load_target(str(save_qwen3_5(folder / "trunk", linear=True)))
    head = stored(fresh_draft(target, kind="mtp", width=SIZES["intermediate_size"]), target)
    stitch(str(folder / "trunk"), head, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    model.save_pretrained(folder / "tuned")
    make_tokenizer().save_pretrained(folder / "tuned")
    raw = json.loads((folder / "tuned" / "config.json").read_text())
    (folder / "tuned" / "config.json").write_text(json.dumps({**raw, "mtp_num_hidden_layers": 1}))
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


def test_a_head_begins_with_the_targets_last_layer(lost: Path, tmp_path: Path) -> None:
    said = mtp(lost, tmp_path / "run", "--from-layer")
    head, layer = read_draft(str(tmp_path / "run" / "head")), load_target(str(lost / "tuned"))
    own = layer.decoder.layers[-1].state_dict()
    assert torch.equal(head.tensors["layers.0.mlp.up_proj.weight"], own["mlp.up_proj.weight"])
    found = inspect_head(str(tmp_path / "run" / "checkpoint"))
    assert found is not None
    assert (found.state, found.hash) == ("whole", said["checkpoint"]["head"])
    assert found.hash != head.hash()


def test_what_cannot_be_given_back_is_a_sentence(lost: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no MTP head to take .* \(--base\)"):
        mtp(lost, tmp_path / "a")
    with pytest.raises(UserError, match="not both"):
        mtp(lost, tmp_path / "b", "--base", str(lost / "base"), "--from-layer")
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
