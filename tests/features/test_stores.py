"""Layouts of stored features: looked up by tokens, read back as written, damage and pickles refused."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.features.extract import Plan, read_states, write_features
from redraft.features.layouts import open_features
from redraft.features.rows import FeatureRows, RowIndex, answer_of, loss_mask, row_tokens
from redraft.features.speculators import SpeculatorsRows
from redraft.features.store import FeatureStore
from redraft.models.final_norm import find_final_norm
from redraft.models.target import Target
from tests.conftest import make_tokenizer

AUX_LAYERS = (2, 4, 5)
LAYOUTS = ("redraft", "speculators", "specforge")
CAPTURE = Path(__file__).parent / "vllm_capture.safetensors"


@pytest.fixture(scope="module")
def stores(
    target: Target, answers: list[Answer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("features")
    for layout in LAYOUTS:
        plan = Plan(root / layout, layout, shard_mb=0.2, batch_tokens=128)
        write_features(target, answers, AUX_LAYERS, plan)
    return {layout: root / layout for layout in LAYOUTS}


def opened(stores: dict[str, Path], layout: str) -> FeatureRows:
    return open_features(stores[layout], unpickle=layout == "specforge")


# -- what is read is what the target says ----------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_states_read_back_are_the_targets(
    stores: dict[str, Path], layout: str, target: Target, answers: list[Answer]
) -> None:
    rows = opened(stores, layout)
    assert (rows.layout, rows.aux_layers, rows.pre_norm) == (
        layout,
        AUX_LAYERS,
        layout != "specforge",
    )
    norm = find_final_norm(target)
    for answer in answers:
        tokens = row_tokens(answer)
        row, length = rows.index.find(tokens)
        assert length == len(tokens)
        states = rows.states(row)
        own = read_states(target, norm, torch.from_numpy(tokens)[None], AUX_LAYERS, rows.pre_norm)[
            0
        ]
        assert torch.allclose(states, own, rtol=1e-5, atol=1e-5)
        # Each column by what it is called, the last one before or after the norm.
        said = target.read(torch.from_numpy(tokens)[None], (*AUX_LAYERS, target.num_layers))
        hs2, hs4, hs5, last = said.features_BTF[0].unflatten(-1, (4, -1)).unbind(1)
        assert torch.allclose(states[:, :3], torch.stack([hs2, hs4, hs5], 1), atol=1e-5)
        post = norm(states[:, 3]) if rows.pre_norm else states[:, 3]
        assert torch.allclose(post, last, atol=1e-5)
        assert torch.equal(rows.states(row, 3), states[:3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_answers_again(
    stores: dict[str, Path], layout: str, answers: list[Answer]
) -> None:
    found = opened(stores, layout).answers()
    if layout == "redraft":
        assert found == answers
    alike = [(a.prompt, a.tokens, a.length) for a in answers]
    assert [(a.prompt, a.tokens, a.length) for a in found] == alike


@torch.no_grad()
def test_layer_ids_of_vllm_are_hs_and_its_last_state_is_before_the_norm(tmp_path: Path) -> None:
    """Against a capture by vLLM 0.32.0 (extract_hidden_states, layer ids 2, 4, 5 and 8 of 8)."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(11)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
    captured = Target(model, make_tokenizer(), ["captured"])
    shutil.copy(CAPTURE, tmp_path / "cmpl-0.safetensors")
    rows = SpeculatorsRows(tmp_path, AUX_LAYERS)
    tokens = torch.from_numpy(rows.tokens[0])[None]

    def apart(aux_layers: tuple[int, ...], pre_norm: bool) -> list[float]:
        own = read_states(captured, find_final_norm(captured), tokens, aux_layers, pre_norm)[0]
        stored = rows.states(0)
        return ((stored - own).norm(dim=(0, 2)) / own.norm(dim=(0, 2))).tolist()

    assert max(apart(AUX_LAYERS, True)) < 1e-5
    shifted = apart((3, 5, 6), True)  # SGLang's numbering
    assert min(shifted[:3]) > 0.1
    assert shifted[3] < 1e-5
    assert apart(AUX_LAYERS, False)[3] > 0.1  # the last state taken for the one after the norm


# -- looking rows up -------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
)
def test_the_index_finds_the_row_that_agrees_longest(
    stored: list[list[int]], wanted: list[int]
) -> None:
    def common(row: list[int]) -> int:
        pairs = enumerate(zip(row, wanted, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(row), len(wanted)))

    index = RowIndex([np.array(row) for row in stored])
    row, length = index.find(np.array(wanted))
    assert length == max(map(common, stored))
    assert length == 0 or common(stored[row]) == length


def test_a_mask_marks_the_last_answer() -> None:
    answer = Answer("a", (5, 6), (7, 8, 9, 10), 3, "stop")
    assert loss_mask(answer) == [0, 0, 1, 1, 1, 0]
    again = answer_of("a", [5, 6, 7, 8, 9, 10], loss_mask(answer))
    assert (again.prompt, again.tokens, again.length) == ((5, 6), (7, 8, 9, 10), 3)
    two_turns = answer_of("b", [1, 2, 3, 4, 5], [0, 1, 0, 1, 1])
    assert (two_turns.prompt, two_turns.answer) == ((1, 2, 3), (4, 5))
    with pytest.raises(UserError, match="row c: 2 tokens with a loss mask of 2, 0 of them marked"):
        answer_of("c", [1, 2], [0, 0])


# -- damage, and what is no store ------------------------------------------------------------------


@pytest.fixture
def store(stores: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(stores["redraft"], tmp_path / "store"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed_when_the_row_is_read(store: Path) -> None:
    shard = sorted(store.glob("shard-*"))[-1]
    flip(shard)
    rows = FeatureStore(store)  # sizes are right
    last = json.loads((store / "shards.jsonl").read_text().splitlines()[-1])["rows"][-1][0]
    with pytest.raises(
        UserError, match=f"{shard.name} is damaged .row {last} has another checksum"
    ):
        rows.states(last, 2)
    with pytest.raises(UserError, match=f"{shard.name} is damaged .its SHA-256 differs"):
        list(rows.check())


def test_whole_shards_pass_the_check(store: Path) -> None:
    names = sorted(path.name for path in store.glob("shard-*"))
    assert sorted(FeatureStore(store).check()) == names
    assert len(names) > 1


def test_a_shard_cut_short_or_lost_is_named(store: Path) -> None:
    shard = next(iter(store.glob("shard-00001*")))
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"expected {size:,} bytes, {size - 9:,} bytes"):
        FeatureStore(store)
    shard.unlink()
    with pytest.raises(UserError, match=r"missing.*; copy it again, or remove it and run the same"):
        FeatureStore(store)


def test_damaged_small_files_are_named(store: Path) -> None:
    (store / "answers.jsonl").write_text("")
    with pytest.raises(UserError, match=r"answers.jsonl is not as the manifest says"):
        FeatureStore(store)
    (store / "answers.jsonl").unlink()
    with pytest.raises(UserError, match=r"answers.jsonl is missing: a damaged copy"):
        FeatureStore(store)
    (store / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"manifest.json is damaged: no usable 'target'"):
        FeatureStore(store)
    (store / "manifest.json").write_text('{"format": 7}')
    with pytest.raises(UserError, match="format 7, this redraft reads 1"):
        FeatureStore(store)


def test_a_store_without_its_manifest_is_unfinished(store: Path) -> None:
    (store / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest.json, which is written last.*it continues"):
        open_features(store)


def test_what_is_no_store_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"expected features: a store.*; found notes.txt"):
        open_features(tmp_path)
    with pytest.raises(UserError, match="found no such folder"):
        open_features(tmp_path / "none")


# -- foreign layouts -------------------------------------------------------------------------------


def test_foreign_layouts_lie_as_their_trainers_read_them(
    stores: dict[str, Path], answers: list[Answer]
) -> None:
    H = 32
    S = len(answers[3].prompt) + len(answers[3].tokens)
    own = load_file(stores["speculators"] / "hidden_states" / "hs_3.safetensors")
    assert own["token_ids"].dtype == torch.int64
    assert {name: tuple(t.shape) for name, t in own.items()} == {
        "token_ids": (S,),
        "hidden_states": (S, 4, H),
    }
    forged = torch.load(stores["specforge"] / "rows_0-2000" / "data_3.ckpt", weights_only=True)
    assert {name: tuple(t.shape) for name, t in forged.items()} == {
        "input_ids": (S,),
        "loss_mask": (S,),
        "aux_hidden_state": (1, S, 3 * H),
        "hidden_state": (1, S, H),
    }
    assert int(forged["loss_mask"].sum()) == answers[3].length


def test_pickles_are_refused_without_the_flag_and_hold_tensors_only_with_it(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"which are pickles.*can run code.*--allow-pickle"):
        open_features(stores["specforge"])
    folder = Path(shutil.copytree(stores["specforge"], tmp_path / "forged"))
    first = folder / "rows_0-2000" / "data_0.ckpt"
    torch.save({"input_ids": Path("a.txt")}, first)
    with pytest.raises(UserError, match=r"data_0.ckpt: refused, or not a whole file"):
        open_features(folder, unpickle=True)
    torch.save({"input_ids": torch.zeros(1)}, first)
    with pytest.raises(UserError, match="expected the tensors input_ids, loss_mask, aux"):
        open_features(folder, unpickle=True)
    first.write_bytes(first.read_bytes()[:50])
    with pytest.raises(UserError, match=r"data_0.ckpt: refused, or not a whole file"):
        open_features(folder, unpickle=True)


def test_compressed_pickles_are_read(stores: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stores["specforge"], tmp_path / "forged"))
    plain = open_features(folder, unpickle=True).states(0)
    first = folder / "rows_0-2000" / "data_0.ckpt"
    first.with_name("data_0.ckpt.gz").write_bytes(gzip.compress(first.read_bytes()))
    first.unlink()
    assert torch.equal(open_features(folder, unpickle=True).states(0), plain)
    (folder / "rows_0-2000" / "data_0.ckpt.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"data_0.ckpt.gz cannot be read"):
        open_features(folder, unpickle=True)


def test_foreign_files_do_not_say_their_layers(stores: dict[str, Path], tmp_path: Path) -> None:
    for layout, complaint in (
        (
            "speculators",
            r"of shape .*; expected .tokens, 3,.*name them with --aux-layers, in vLLM's",
        ),
        ("specforge", r"aux_hidden_state is 96 wide, 3 layers .*; got 2 aux layers .2, 4."),
    ):
        folder = Path(shutil.copytree(stores[layout], tmp_path / layout))
        (folder / "redraft-features.json").unlink()  # what redraft itself wrote says it
        with pytest.raises(UserError, match="do not say which layers they hold; name them"):
            open_features(folder)
        with pytest.raises(UserError, match=complaint):
            open_features(folder, (2, 4), unpickle=True)
        assert open_features(folder, AUX_LAYERS, unpickle=True).aux_layers == AUX_LAYERS


def test_a_capture_without_a_dataset_needs_answers(stores: dict[str, Path], tmp_path: Path) -> None:
    own = load_file(stores["speculators"] / "hidden_states" / "hs_3.safetensors")
    save_file(own, tmp_path / "cmpl-17-0.safetensors")
    (tmp_path / "cmpl-17-0.safetensors.lock").touch()
    rows = open_features(tmp_path, AUX_LAYERS)
    assert torch.equal(rows.states(0), own["hidden_states"])
    with pytest.raises(UserError, match=r"has no dataset.*name the answers.*with --answers"):
        rows.answers()


def test_the_dataset_needs_pyarrow(
    target: Target, answers: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'redraft\[parquet\]'"):
        write_features(target, answers, AUX_LAYERS, Plan(tmp_path / "s", "speculators"))


def test_a_damaged_capture_is_named(stores: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stores["speculators"], tmp_path / "s"))
    path = folder / "hidden_states" / "hs_2.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    rows: Any = open_features(folder)
    with pytest.raises(UserError, match=r"hs_2.safetensors is not a whole safetensors file"):
        rows.states(2)
