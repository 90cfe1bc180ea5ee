"""What was stored or typed under a name of before is read as today's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from redraft.adapters.adapter import Adapter
from redraft.adapters.table import read_method
from redraft.checkpoints.adapter_folder import CARD, OLD_CARD, load_adapter, save_adapter
from redraft.cli import app
from redraft.config import RegenerateConfig, resolve
from redraft.core.folders import state_hash
from redraft.core.records import Answer, Prompt
from redraft.core.renamed import OLD
from redraft.features.extract import Plan, write_features
from redraft.features.layouts import open_features
from redraft.features.store import MANIFEST
from redraft.generation.answer_file import about
from redraft.generation.regenerate import regenerate
from redraft.models.target import Target
from redraft_experiments.members import chosen_members

BEFORE = {new: old for old, new in OLD.items()}


def age(path: Path) -> None:
    """Rewrite a JSON record as it was stored before."""
    record = json.loads(path.read_text())
    old = {BEFORE.get(key, key): value for key, value in record.items()}
    assert old.keys() != record.keys()
    path.write_text(json.dumps(old))


def test_an_adapter_folder(tmp_path: Path) -> None:
    tensors = {"fc.weight": torch.ones(2, 2)}
    card: dict[str, Any] = {"adapter_hash": state_hash(tensors), "samples": 3}
    save_adapter(tmp_path, Adapter("fc", tensors, card))
    (tmp_path / CARD).rename(tmp_path / OLD_CARD)
    age(tmp_path / OLD_CARD)
    found = load_adapter(tmp_path)
    assert (found.method, found.card) == ("fc", card)
    assert torch.equal(found.tensors["fc.weight"], tensors["fc.weight"])


def test_an_answers_file_is_not_answered_again(
    target: Target, prompts: list[Prompt], tmp_path: Path
) -> None:
    out, settings = tmp_path / "a.jsonl", RegenerateConfig(max_new_tokens=4)
    first = regenerate(target, prompts[:2], out, settings)
    age(about(out))
    assert regenerate(target, prompts[:2], out, settings) == first
    assert not (tmp_path / "set-aside").exists()


def test_a_feature_store(target: Target, answers: list[Answer], tmp_path: Path) -> None:
    out = tmp_path / "store"
    write_features(target, answers[:2], (2, 4, 5), Plan(out, "redraft", float("inf"), 128.0, 4096))
    age(out / MANIFEST)
    assert open_features(out).aux_layers == (2, 4, 5)


def test_values_that_were_typed() -> None:
    assert read_method("relay+refresh+expert") == read_method("feature-map+weight-sync+expert")
    assert resolve([("f", {"train.vocab": "retarget"})]).config.train.vocab == "remap"
    assert chosen_members(["zoo"]) == chosen_members(["all"])


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("train", "--taps", "--aux-layers"),
        ("measure", "--feature-taps", "--feature-aux-layers"),
        ("regenerate", "--overrun", "--lookahead"),
        ("export", "--private", "--adapter"),
        ("check", "--cases", "--calibration"),
    ],
)
def test_flags_that_were_typed(command: str, old: str, new: str) -> None:
    (flag,) = [p for p in get_command(app).commands[command].params if new in p.opts]
    assert old in flag.opts
