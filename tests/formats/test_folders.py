"""Checkpoint folders: round trips, and a sentence for each way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.errors import UserError
from redraft.formats.folders import INDEX, WEIGHTS, state_hash
from redraft.formats.load import load_draft, read_draft, stored
from redraft.formats.private_part import check_belongs, load_private, save_private
from redraft.private.part import PrivatePart
from redraft.target import Target
from tests.conftest import fresh_draft


@pytest.fixture
def folder(draft_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(draft_folder, tmp_path / "draft"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def retensor(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / WEIGHTS)


def test_round_trip(target: Target, folder: Path, tmp_path: Path) -> None:
    first = read_draft(str(folder))
    first.save(tmp_path / "again")
    again = read_draft(str(tmp_path / "again"))
    assert again.config == first.config
    assert again.hash() == first.hash()
    assert load_draft(str(folder), target).source == str(folder)


@pytest.mark.parametrize("vocab", [None, 40])
def test_config_is_what_engines_read(target: Target, tmp_path: Path, vocab: int | None) -> None:
    stored(fresh_draft(target, vocab=vocab), target).save(tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["num_hidden_layers"] == 1
    assert config["tie_word_embeddings"] is False
    assert config["draft_vocab_size"] == (vocab or target.vocab_size)
    assert "bias" not in config
    assert "eagle_config" not in config  # the default taps need no ids, which engines number apart
    tensors = load_file(tmp_path / "d" / WEIGHTS)
    assert ("d2t" in tensors) == (vocab is not None)
    assert "embed_tokens.weight" not in tensors


def test_other_taps_are_written_in_both_numberings(target: Target, tmp_path: Path) -> None:
    from redraft.drafts.new import new_draft

    draft = new_draft(target, [], taps=(1, 3, 6))
    stored(draft, target).save(tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]
    assert load_draft(str(tmp_path / "d"), target).taps == (1, 3, 6)
    edit(tmp_path / "d", eagle_aux_hidden_state_layer_ids=...)
    assert load_draft(str(tmp_path / "d"), target).taps == (1, 3, 6)


def test_layers_0_and_shards_are_read(folder: Path, tmp_path: Path) -> None:
    expected = read_draft(str(folder)).hash()
    tensors = load_file(folder / WEIGHTS)
    renamed = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
    names = sorted(renamed)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({n: renamed[n] for n in members}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {n: f for f, members in parts.items() for n in members}}
    (folder / INDEX).write_text(json.dumps(index))
    assert read_draft(str(folder)).hash() == expected
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b.safetensors: listed in the index but missing"):
        read_draft(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc__weight": None}, "missing fc.weight"),
        ({"midlayer__mlp__up_proj__weight": None}, "missing midlayer.mlp.up_proj.weight"),
        ({"fc__bias": torch.zeros(32)}, "unknown fc.bias"),
        ({"norm__weight": torch.zeros(7)}, r"norm.weight should be \[32\] .* found \[7\]"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    retensor(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_before_residual": True}, "norm before residual"),
        ({"norm_before_fc": True}, "norm before fc"),
        ({"norm_output": True}, "a normed state fed back"),
        ({"attention_bias": True}, "attention biases"),
        ({"bias": True}, "biases"),
        ({"num_hidden_layers": 2}, "one decoder layer, this one has 2"),
        ({"architectures": ["LlamaForCausalLM"]}, "no draft layout that redraft"),
        ({"hidden_act": "swish9"}, "hidden_act 'swish9'"),
        ({"vocab_size": ...}, "expected a key 'vocab_size'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' rotary"),
    ],
)
def test_another_function_is_refused_by_name(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))


def test_absolute_ids_in_d2t_are_noticed(target: Target, tmp_path: Path) -> None:
    draft = fresh_draft(target, vocab=40)
    stored(draft, target).save(tmp_path / "d")
    assert draft.draft_vocab is not None
    retensor(tmp_path / "d", d2t=draft.draft_vocab + 200)
    with pytest.raises(UserError, match="perhaps these are absolute ids"):
        load_draft(str(tmp_path / "d"), target)


def test_damaged_and_absent_files(folder: Path, tmp_path: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:200])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_draft(str(folder))
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="found only the pickle pytorch_model.bin"):
        read_draft(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_draft(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"expected a file config.json, found pytorch_model.bin"):
        read_draft(str(folder))
    with pytest.raises(UserError, match="no such folder"):
        read_draft(str(tmp_path / "nowhere"))


def test_a_draft_for_another_tokenizer_is_refused(target: Target, folder: Path) -> None:
    record = json.loads((folder / "redraft.json").read_text())
    (folder / "redraft.json").write_text(json.dumps({**record, "tokenizer_hash": "0123"}))
    with pytest.raises(UserError, match="tokenizers differ: .* tokenizer 0123"):
        load_draft(str(folder), target)


def test_export_refuses_other_formats(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown export format 'gguf'; known: eagle3"):
        read_draft(str(folder)).save(tmp_path / "x", "gguf")
    assert not (tmp_path / "x").exists()


def test_private_parts_round_trip_and_refuse_another_draft(
    target: Target, folder: Path, tmp_path: Path
) -> None:
    shared = read_draft(str(folder))
    part = PrivatePart("expert", {"a": torch.randn(3)}, {"shared_hash": shared.hash()})
    save_private(tmp_path / "p", part)
    back = load_private(tmp_path / "p")
    assert (back.method, back.card) == (part.method, part.card)
    assert state_hash(back.tensors) == state_hash(part.tensors)
    check_belongs(back, shared)
    retensor(folder, norm__weight=torch.zeros(32))
    with pytest.raises(UserError, match="trained beside the shared draft"):
        check_belongs(back, read_draft(str(folder)))
