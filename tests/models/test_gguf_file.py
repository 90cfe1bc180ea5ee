"""A target in a GGUF file computes what its blocks mean, or it is refused in one sentence that names the cause."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from redraft.models import gguf_file
from redraft.models.loading import load_target, stored_in
from redraft.models.target import Target, fingerprint, weights_hash
from tests.conftest import SHAPE, make_tokenizer, save_target
from tests.models.gguf_writer import write
from tests.models.test_loading import refusal

CHAT = [{"role": "user", "content": "Say  7 and it's 1."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole blocks."""
    config = LlamaConfig(vocab_size=len(make_tokenizer()), **{**SHAPE, "intermediate_size": 64})
    return save_target(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module")
def rounded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The reference: the same folder, with the numbers that the blocks mean as its weights."""
    copy = tmp_path_factory.mktemp("rounded") / "model"
    shutil.copytree(folder, copy)
    save_file(write(copy.parent / "of.gguf", folder), copy / "model.safetensors", {"format": "pt"})
    return load_target(str(copy))


@pytest.fixture
def alone(folder: Path, tmp_path: Path) -> Path:
    """A file with nothing next to it."""
    (tmp_path / "alone").mkdir()
    write(tmp_path / "alone" / "model.gguf", folder)
    return tmp_path / "alone" / "model.gguf"


@pytest.fixture
def dressed(folder: Path, tmp_path: Path) -> Path:
    """A folder with a file, the model's config.json and its tokenizer."""
    shutil.copytree(folder, tmp_path / "dressed")
    (tmp_path / "dressed" / "model.safetensors").unlink()
    write(tmp_path / "dressed" / "model.gguf", folder)
    return tmp_path / "dressed"


def logits(target: Target) -> Tensor:
    tokens = torch.arange(target.vocab_size)[None, :64]
    return target.read(tokens, (2, 4, 5)).logits_BTV


def test_it_computes_what_its_blocks_mean(
    alone: Path, dressed: Path, folder: Path, rounded: Target, tmp_path: Path
) -> None:
    reference = logits(rounded)
    for source in (alone, dressed, dressed / "model.gguf"):
        target = load_target(str(source))
        assert target.dtype == torch.float32
        assert torch.equal(logits(target), reference)
    unrounded = logits(load_target(str(folder)))
    assert 1e-3 < float((unrounded - reference).abs().max()) < 0.1 * float(reference.abs().max())
    write(tmp_path / "other.gguf", folder, interleaved=False)
    assert float((logits(load_target(str(tmp_path / "other.gguf"))) - reference).abs().max()) > 0.1


def test_its_own_tokenizer_and_stop_token(alone: Path, rounded: Target) -> None:
    target = load_target(str(alone))
    assert target.tokenizer_hash() == rounded.tokenizer_hash()
    assert target.tokenizer.all_special_ids == rounded.tokenizer.all_special_ids
    assert target.render(CHAT) == rounded.render(CHAT)
    assert target.tokenizer.decode(target.render(CHAT)) == rounded.tokenizer.decode(
        rounded.render(CHAT)
    )
    assert target.stop_ids == rounded.stop_ids
    assert target.max_positions == rounded.max_positions


def test_further_stop_tokens(folder: Path, dressed: Path, tmp_path: Path) -> None:
    write(tmp_path / "two.gguf", folder, fields={"tokenizer.ggml.eot_token_id": 5})
    assert 5 in load_target(str(tmp_path / "two.gguf")).stop_ids
    (dressed / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert {1, 7} <= set(load_target(str(dressed)).stop_ids)


def test_another_dtype(alone: Path) -> None:
    assert load_target(str(alone), dtype="bfloat16").dtype == torch.bfloat16


def test_the_same_target_with_the_weights_of_a_file(
    folder: Path, alone: Path, rounded: Target
) -> None:
    target = load_target(str(folder))
    found = stored_in(target, alone)
    assert torch.equal(logits(found), logits(rounded))
    assert found.stop_ids == target.stop_ids
    assert found.tokenizer is target.tokenizer
    assert not torch.equal(logits(target), logits(found))


def test_its_type(alone: Path) -> None:
    assert gguf_file.stored_type(alone) == "q8_0"
    assert gguf_file.rounds(alone, torch.float32)


def test_what_lies_around_it(alone: Path, dressed: Path, tmp_path: Path) -> None:
    assert gguf_file.surroundings(dressed / "model.gguf", tmp_path) == dressed
    written = gguf_file.surroundings(alone, tmp_path)
    assert written.parent == tmp_path
    assert json.loads((written / "config.json").read_text())["hidden_size"] == SHAPE["hidden_size"]
    again = load_target(str(alone)).tokenizer
    assert AutoTokenizer.from_pretrained(written).get_vocab() == again.get_vocab()


def test_hashes_follow_the_file(alone: Path, dressed: Path, folder: Path, tmp_path: Path) -> None:
    before = weights_hash(str(alone)), fingerprint(str(alone))
    copy = tmp_path / "copy"
    shutil.copytree(alone.parent, copy)
    (copy / "other.gguf").write_bytes(b"another model")
    assert weights_hash(str(copy / "model.gguf")) == before[0]
    bytes_ = bytearray(alone.read_bytes())
    bytes_[-1] ^= 1
    alone.write_bytes(bytes_)
    assert weights_hash(str(alone)) != before[0]
    assert fingerprint(str(alone)) != before[1]
    assert weights_hash(str(dressed)) == weights_hash(str(dressed / "model.gguf"))
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    plain = weights_hash(str(both)), fingerprint(str(both))
    shutil.copy(alone, both)
    assert (
        weights_hash(str(both)),
        fingerprint(str(both)),
    ) == plain  # its weights are the safetensors
    assert gguf_file.gguf_file(str(both)) is None


WRONG: dict[str, tuple[Callable[[Path, Path], Any], list[str]]] = {
    "no GGUF": (lambda file, _: file.write_bytes(b"GGUX" * 9), ["is no whole GGUF file"]),
    "cut short": (
        lambda file, _: file.write_bytes(file.read_bytes()[:-4000]),
        ["is no whole GGUF file"],
    ),
    "a part": (lambda f, m: write(f, m, fields={"split.count": 2}), ["one of 2 parts", "--merge"]),
    "unknown architecture": (
        lambda f, m: write(f, m, fields={"general.architecture": "nobody"}),
        ["Transformers does not read it", "nobody"],
    ),
    "scaled frequencies": (
        lambda f, m: write(f, m, tensors={"rope_freqs.weight": np.ones(4, np.float32)}),
        ["rotary frequencies are scaled (rope_freqs.weight)", "config.json"],
    ),
    "yarn": (
        lambda f, m: write(f, m, fields={"llama.rope.scaling.type": "yarn"}),
        ["rotary frequencies are scaled (yarn)"],
    ),
    "a tensor gone": (
        lambda f, m: write(f, m, left_out="ffn_up"),
        ["8 of its", "mlp.up_proj.weight"],
    ),
    "a tensor too many": (
        lambda f, m: write(f, m, tensors={"blk.0.attn_q.bias": np.ones(32, np.float32)}),
        ["numbers in 76 tensors, of which its model takes"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_it_cannot_be_read_as_is_named(wrong: str, alone: Path, folder: Path) -> None:
    change, words = WRONG[wrong]
    alone.unlink()
    if wrong in ("no GGUF", "cut short"):
        write(alone, folder)
    change(alone, folder)
    text = refusal(alone)
    for word in [str(alone), *words]:
        assert word in text


def test_layers_for_further_tokens_are_left_out(
    folder: Path, rounded: Target, tmp_path: Path
) -> None:
    write(
        tmp_path / "m.gguf", folder, tensors={"blk.8.nextn.enorm.weight": np.ones(32, np.float32)}
    )
    assert torch.equal(logits(load_target(str(tmp_path / "m.gguf"))), logits(rounded))


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 64), ("rms_norm_eps", 1e-3), ("model_type", "qwen2")]
)
def test_another_models_config(key: str, value: Any, dressed: Path) -> None:
    path = dressed / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert f"has {key} " in refusal(dressed)


def test_several_files(dressed: Path) -> None:
    shutil.copy(dressed / "model.gguf", dressed / "q4.gguf")
    assert "found model.gguf, q4.gguf; name one" in refusal(dressed)
    load_target(str(dressed / "q4.gguf"))


def test_without_the_package(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'redraft[gguf]'" in refusal(alone)


def test_no_bars(alone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_target(str(alone))
    assert "Converting" not in capfd.readouterr().err
