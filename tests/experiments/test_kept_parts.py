"""The parts of the suite of real models that are kept: whole again to the last bit, and for their own base only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from redraft.checkpoints.load import read_draft
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.models.loading import load_target
from redraft_experiments import real_demo, real_drafts
from redraft_experiments.kept_parts import DRAFT, KEPT, MEMBER, pack, restore
from redraft_experiments.real_suite import build_real_suite
from tests.conftest import SHAPE, make_tokenizer, save_target

LARGEST_MB = 14
"""All kept parts together: what a clone is asked to fetch for them."""


def test_the_draft_is_restored_to_the_last_bit(
    data: Path,
    tmp_path: Path,
    small_real: list[RegenerateConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = tmp_path / "real"
    build_real_suite(suite, data=str(data), members=["code-lora"])
    (suite / "members" / "code-lora").rename(suite / "members" / MEMBER)
    kept = tmp_path / "kept"
    pack(suite, kept)
    sizes = [(folder / DRAFT / "model.safetensors").stat().st_size for folder in (suite, kept)][
        ::-1
    ]
    whole = (suite / "draft/model.safetensors").stat().st_size
    assert sizes[0] < whole
    restore(suite / "base", tmp_path / "draft", kept)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "draft" / name).read_bytes() == (suite / "draft" / name).read_bytes()
    asked = len(small_real)
    monkeypatch.setattr(real_drafts, "restore", partial(restore, kept=kept))
    build_real_suite(tmp_path / "again", data=str(data), members=[], drafts=["kept"])
    assert len(small_real) == asked  # no answers of the base are needed
    weights = "draft/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (suite / weights).read_bytes()
    target = load_target(str(suite / "base"), adapter=str(kept / MEMBER))
    assert read_draft(str(tmp_path / "draft")).build(target).aux_layers
    other = save_target(
        tmp_path / "other", LlamaConfig(vocab_size=len(make_tokenizer()), **SHAPE), seed=7
    )
    with pytest.raises(UserError, match="is not the model that the kept draft was trained for"):
        restore(other, tmp_path / "wrong", kept)
    assert not (tmp_path / "wrong").exists()
    tensors = dict(read_draft(str(suite / "draft")).tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    read_draft(str(suite / "draft")).with_tensors(tensors, {}).save(tmp_path / "changed/draft")
    (tmp_path / "changed/base").symlink_to(suite / "base")
    with pytest.raises(UserError, match="its head is not the base's"):
        pack(tmp_path / "changed", kept)
    with pytest.raises(UserError, match="holds no draft"):
        restore(suite / "base", tmp_path / "none", tmp_path / "nothing")


def test_what_is_kept_is_small_and_of_bf16() -> None:
    sizes = {path: path.stat().st_size for path in KEPT.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < LARGEST_MB * 1e6
    from safetensors.torch import load_file

    body = load_file(KEPT / DRAFT / "model.safetensors")
    assert "lm_head.weight" not in body
    assert body["fc.weight"].dtype == torch.bfloat16


def test_the_questions_differ() -> None:
    asked = real_demo.questions()
    assert len(set(asked)) == len(asked) >= real_demo.LIMIT
