"""Checkpoint folders: round trips, and a sentence for each way in which one can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from redraft.adapters.adapter import Adapter
from redraft.checkpoints.adapter_folder import check_belongs, load_adapter, save_adapter
from redraft.checkpoints.load import load_draft, read_draft, stored
from redraft.core.errors import UserError
from redraft.core.folders import WEIGHTS, state_hash
from redraft.models.target import Target
from tests.checkpoints.crafted import as_pickle, edit, retensor
from tests.conftest import fresh_draft


@pytest.fixture
def folder(draft_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(draft_folder, tmp_path / "draft"))


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
    assert (
        "eagle_config" not in config
    )  # the default aux layers need no ids, which engines number apart
    tensors = load_file(tmp_path / "d" / WEIGHTS)
    assert ("d2t" in tensors) == (vocab is not None)
    assert "embed_tokens.weight" not in tensors


def test_other_taps_are_written_in_both_numberings(target: Target, tmp_path: Path) -> None:
    from redraft.drafts.new import new_draft

    draft = new_draft(target, [], aux_layers=(1, 3, 6))
    stored(draft, target).save(tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]
    assert load_draft(str(tmp_path / "d"), target).aux_layers == (1, 3, 6)
    edit(tmp_path / "d", eagle_aux_hidden_state_layer_ids=...)
    assert load_draft(str(tmp_path / "d"), target).aux_layers == (1, 3, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc__weight": None}, "missing fc.weight"),
        ({"midlayer__mlp__up_proj__weight": None}, "missing midlayer.mlp.up_proj.weight"),
        ({"fc__bias": torch.zeros(32)}, "unknown fc.bias"),
        ({"norm__weight": torch.zeros(7)}, r"norm.weight should be \[32\] .* found \[7\]"),
        ({"norm__weight": torch.zeros(32).int()}, "norm.weight is stored as torch.int32, expected"),
        (
            {"norm__weight": torch.full((32,), float("nan"))},
            "norm.weight holds values that are not",
        ),
        (
            {"d2t": torch.ones(261).long()},
            "d2t leads from row 260 to target id 261, outside 0 to 260",
        ),
    ],
)
def test_wrong_tensors_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    retensor(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_before_fc": True}, "missing input_norm.weight"),
        ({"fc_norm": True}, "missing fc_norm.0.weight, fc_norm.1.weight, fc_norm.2.weight"),
        ({"norm_output": True}, "'norm before lm_head' to SpecForge"),
        ({"attention_bias": True}, "missing midlayer.self_attn.k_proj.bias"),
        ({"bias": True}, "bias: true, which engines read as attention biases"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "reads one hidden state"),
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


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("size", [40, 120])
def test_absolute_ids_in_d2t_are_noticed(
    target: Target, tmp_path: Path, mask: bool, size: int
) -> None:
    draft = fresh_draft(target, vocab=size)
    stored(draft, target).save(tmp_path / "d")
    ids = draft.draft_vocab if size > 40 else draft.draft_vocab + 200
    retensor(tmp_path / "d", d2t=ids, **({} if mask else {"t2d": None}))
    with pytest.raises(UserError, match="these look like absolute ids"):
        load_draft(str(tmp_path / "d"), target)


def test_a_map_that_disagrees_with_its_mask_is_noticed(target: Target, tmp_path: Path) -> None:
    stored(fresh_draft(target, vocab=40), target).save(tmp_path / "d")
    mask = load_file(tmp_path / "d" / WEIGHTS)["t2d"]
    retensor(tmp_path / "d", t2d=mask.roll(1))
    with pytest.raises(UserError, match="d2t and t2d disagree: d2t names 40 target ids"):
        read_draft(str(tmp_path / "d"))


def test_damaged_and_absent_files(folder: Path, tmp_path: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for broken in (whole[:200], b"\xff" + whole[1:], b""):
        (folder / WEIGHTS).write_bytes(broken)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_draft(str(folder))
    flipped = bytearray(whole)
    flipped[-7] ^= 0x10
    (folder / WEIGHTS).write_bytes(bytes(flipped))
    with pytest.raises(UserError, match="a damaged copy, or edited since redraft wrote it"):
        read_draft(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_draft(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"expected a file config.json, found README.md"):
        read_draft(str(folder))
    with pytest.raises(UserError, match="no such folder"):
        read_draft(str(tmp_path / "nowhere"))


def test_a_pickle_is_opened_only_where_it_is_allowed(folder: Path) -> None:
    expected = read_draft(str(folder)).hash()
    as_pickle(folder)
    with pytest.raises(UserError, match="found only the pickle pytorch_model.bin.*--allow-pickle"):
        read_draft(str(folder))
    assert read_draft(str(folder), unpickle=True).hash() == expected


class Evil:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nonexistent/ran").write_text, ("x",))


@pytest.mark.parametrize("content", ["object", "list", "truncated"])
def test_a_pickle_of_anything_but_tensors_is_refused(folder: Path, content: str) -> None:
    as_pickle(folder)
    path = folder / "pytorch_model.bin"
    if content == "object":
        path.write_bytes(pickle.dumps({"fc.weight": Evil()}))
    elif content == "list":
        torch.save([torch.zeros(2)], path)
    else:
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="pytorch_model.bin: (refused|expected a mapping)"):
        read_draft(str(folder), unpickle=True)


def test_what_is_no_draft_is_called_by_its_name(
    target_folder: Path, folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(target_folder, tmp_path / "other"))
    edit(other, architectures=["T5ForConditionalGeneration"])
    with pytest.raises(UserError, match=r"T5.* is no draft; redraft reads EAGLE-3 .* causal LMs"):
        read_draft(str(other))
    gate = torch.zeros(1, 32)
    retensor(folder, layers__0__block_sparse_moe__shared_gate__weight=gate)
    with pytest.raises(UserError, match="routed shared and private experts"):
        read_draft(str(folder))


def test_a_draft_for_another_tokenizer_is_refused(target: Target, folder: Path) -> None:
    record = json.loads((folder / "redraft.json").read_text())
    (folder / "redraft.json").write_text(json.dumps({**record, "tokenizer_hash": "0123"}))
    with pytest.raises(UserError, match="tokenizers differ: .* tokenizer 0123"):
        load_draft(str(folder), target)


def test_private_parts_round_trip_and_refuse_another_draft(
    target: Target, folder: Path, tmp_path: Path
) -> None:
    shared = read_draft(str(folder))
    part = Adapter("expert", {"a": torch.randn(3)}, {"shared_hash": shared.hash()})
    save_adapter(tmp_path / "p", part)
    back = load_adapter(tmp_path / "p")
    assert (back.method, back.card) == (part.method, part.card)
    assert state_hash(back.tensors) == state_hash(part.tensors)
    check_belongs(back, shared)
    retensor(folder, norm__weight=torch.zeros(32))
    with pytest.raises(UserError, match="trained next to the shared draft"):
        check_belongs(back, read_draft(str(folder)))
