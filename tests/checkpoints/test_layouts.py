"""Published layouts in: each is read, runs exactly, and is checked against the second reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.checkpoints.load import load_draft, read_draft
from redraft.core.errors import UserError
from redraft.models.target import Target
from tests.checkpoints.crafted import LAYOUTS, as_pickle, as_shards, edit, retensor
from tests.conftest import fresh_draft, in_double
from tests.drafts.test_drafts import worst_difference

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "EAGLE-3 by its authors": ("safeai_eagle3", {"vocab": 40}),
    "EAGLE-3, whole vocabulary": ("safeai_eagle3", {}),
    "SpecForge": ("specforge", {"vocab": 40}),
    "SpecForge, other aux layers": ("specforge", {"aux_layers": (1, 3, 6)}),
    "speculators": ("speculators", {"vocab": 40}),
    "speculators as it trains": (
        "speculators",
        {"vocab": 40, "norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    ),
    "EAGLE-1/2": ("safeai_eagle", {"kind": "eagle"}),
    "EAGLE-1/2 with fc.bias": ("safeai_eagle", {"kind": "eagle", "fc_bias": True}),
}


@pytest.fixture(scope="module")
def target64(target_folder: Path) -> Target:
    return in_double(target_folder)


@pytest.mark.parametrize("shards", ["single", "sharded", "pickle"])
@pytest.mark.parametrize("case", CASES)
def test_a_published_layout_is_read_and_runs_exactly(
    target64: Target, tmp_path: Path, case: str, shards: str
) -> None:
    layout, options = CASES[case]
    made = fresh_draft(target64, **options)
    folder = LAYOUTS[layout](tmp_path / "published", made)
    if shards == "sharded":
        as_shards(folder)
    if shards != "pickle":
        draft = load_draft(str(folder), target64)
        assert draft.aux_layers == made.aux_layers
        assert worst_difference(target64, draft, 1, folder) < 1e-7
    else:
        as_pickle(folder)
        read_draft(str(folder), unpickle=True).save(tmp_path / "converted", _written(made))
        draft = load_draft(str(tmp_path / "converted"), target64)
        assert worst_difference(target64, draft, 1, tmp_path / "converted") < 1e-7
    for name, tensor in made.stored_state().items():
        if name not in ("d2t", "t2d"):
            assert torch.equal(draft.state_dict()[name], tensor), name


def _written(draft: Any) -> str:
    """A format whose engine serves the draft's own function."""
    if draft.kind == "eagle":
        return "sglang-eagle"
    return "speculators" if draft.config.norm_output else "auto"


@pytest.mark.parametrize(
    ("layout", "options", "changes", "message"),
    [
        ("speculators", {}, {"speculators_model_type": "dflash"}, "type 'dflash'; redraft reads"),
        (
            "speculators",
            {},
            {"transformer_layer_config": ...},
            "a mapping transformer_layer_config",
        ),
        ("safeai_eagle", {"kind": "eagle"}, {"bias": True}, "bias: true, but there is no fc.bias"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(
    target: Target,
    tmp_path: Path,
    layout: str,
    options: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = LAYOUTS[layout](tmp_path / "d", fresh_draft(target, **options))
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))


@pytest.mark.parametrize("name", ["layers.0.input_layernorm", "norm", "lm_head"])
def test_an_eagle_draft_with_a_foreign_tensor_is_refused(
    target: Target, tmp_path: Path, name: str
) -> None:
    folder = LAYOUTS["safeai_eagle"](tmp_path / "d", fresh_draft(target, kind="eagle"))
    retensor(folder, **{f"{name.replace('.', '__')}__weight": torch.ones(32)})
    with pytest.raises(UserError, match=f"an EAGLE-1/2 draft has no {name}.weight"):
        read_draft(str(folder))


def test_speculators_leave_a_norm_flag_out_and_mean_true(target: Target, tmp_path: Path) -> None:
    folder = LAYOUTS["speculators"](tmp_path / "d", fresh_draft(target))
    assert not read_draft(str(folder)).config.norm_before_residual  # type: ignore[attr-defined]
    edit(folder, norm_before_residual=...)
    assert read_draft(str(folder)).config.norm_before_residual  # type: ignore[attr-defined]


def test_a_rotary_buffer_of_old_files_is_skipped(target: Target, tmp_path: Path) -> None:
    folder = LAYOUTS["safeai_eagle"](tmp_path / "d", fresh_draft(target, kind="eagle"))
    expected = read_draft(str(folder)).hash()
    retensor(folder, layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert read_draft(str(folder)).hash() == expected


def test_a_shard_outside_the_folder_is_refused(target: Target, tmp_path: Path) -> None:
    folder = LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target))
    as_shards(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../a.safetensors"}}))
    with pytest.raises(UserError, match="'../a.safetensors', named for fc.weight, is no file name"):
        read_draft(str(folder))
    (folder / "a.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"fc.weight": "a.safetensors"}}))
    with pytest.raises(UserError, match=r"a.safetensors: listed in the index but missing"):
        read_draft(str(folder))


@pytest.mark.parametrize(
    ("layout", "stored", "again"),
    [
        ("safeai_eagle3", "midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight"),
        ("safeai_eagle", "fc.weight", "model.fc.weight"),
    ],
)
def test_two_names_of_one_tensor(
    target: Target, tmp_path: Path, layout: str, stored: str, again: str
) -> None:
    kind = "eagle" if layout == "safeai_eagle" else "eagle3"
    folder = LAYOUTS[layout](tmp_path / "d", fresh_draft(target, kind=kind))
    stale = load_file(folder / "model.safetensors")[stored] + 1
    retensor(folder, **{again.replace(".", "__"): stale})
    with pytest.raises(UserError, match=f"{stored}.*two names of one|{again}.*two names of one"):
        read_draft(str(folder))


@pytest.mark.parametrize("layout", ["safeai_eagle3", "safeai_eagle"])
def test_a_second_layer_is_refused(target: Target, tmp_path: Path, layout: str) -> None:
    kind = "eagle" if layout == "safeai_eagle" else "eagle3"
    folder = LAYOUTS[layout](tmp_path / "d", fresh_draft(target, kind=kind))
    retensor(folder, layers__1__mlp__up_proj__weight=torch.ones(2, 2))
    with pytest.raises(UserError, match=r"one decoder layer, the file also has layers\.1; drafts"):
        read_draft(str(folder))


def test_the_index_decides_which_file_gives_a_tensor(target: Target, tmp_path: Path) -> None:
    folder = LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target))
    whole = read_draft(str(folder))
    as_shards(folder)
    for shard, other in (("a", "b"), ("b", "a")):
        tensors, others = (load_file(folder / f"{n}.safetensors") for n in (shard, other))
        stale = {name: t + 1 for name, t in others.items() if name not in tensors}
        save_file({**tensors, **stale}, folder / f"{shard}.safetensors")
    assert read_draft(str(folder)).hash() == whole.hash()


def test_a_whole_file_counts_before_an_index(target: Target, tmp_path: Path) -> None:
    """As in Transformers; the index is that of a download that was replaced."""
    folder = LAYOUTS["specforge"](tmp_path / "d", fresh_draft(target))
    whole = read_draft(str(folder)).hash()
    index = {"weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_draft(str(folder)).hash() == whole


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"fc.weight": ".."}, "'..', named for fc.weight, is no file name"),
        ({"fc.weight": 1}, "1, named for fc.weight, is no file name"),
        (
            {"fc.weight": "a.safetensors", "x": "a.safetensors"},
            "lists fc.weight, x in a.safetensors, which does not hold them",
        ),
        (["a.safetensors"], "expected an object as weight_map"),
        ({}, "expected an object weight_map of tensors and files, found none"),
        (None, "expected an object weight_map of tensors and files, found none"),
        ({"fc.weight": "config.json"}, "config.json is not a whole safetensors file"),
    ],
)
def test_an_index_that_fits_no_files_is_named(
    target: Target, tmp_path: Path, weight_map: Any, message: str
) -> None:
    folder = LAYOUTS["safeai_eagle"](tmp_path / "d", fresh_draft(target, kind="eagle"))
    as_shards(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        read_draft(str(folder))
