"""Heads inside checkpoints of targets: found, judged, taken out and stitched in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from redraft.checkpoints.load import StoredDraft, read_draft, stored
from redraft.checkpoints.own_head import inspect_head, stitch, take_head
from redraft.core.errors import UserError
from redraft.core.folders import read_tensors, tensor_files
from redraft.models.loading import load_target
from tests.conftest import fresh_draft
from tests.drafts.mtp_targets import ROUTED, SAVED, SIZES, routed_head

WIDTH = SIZES["intermediate_size"]
HEAD, TRUNK = "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module", params=[*SAVED, *ROUTED])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A target without the head that it declares, a head for it, and the target with it."""
    return made(request.param, tmp_path_factory.mktemp(request.param))


def made(family: str, folder: Path) -> tuple[Path, StoredDraft, Path]:
    target = load_target(str((SAVED | ROUTED)[family](folder / "target")))
    draft = (
        routed_head(target) if family in ROUTED else fresh_draft(target, kind="mtp", width=WIDTH)
    )
    head = stored(draft, target)
    stitch(str(folder / "target"), head, folder / "whole")
    return folder / "target", head, folder / "whole"


@pytest.fixture
def qwen(tmp_path: Path) -> tuple[Path, StoredDraft, Path]:
    return made("qwen3_5", tmp_path)


def test_a_dropped_head_is_seen_grafted_and_taken_out_again(parts: Any, tmp_path: Path) -> None:
    folder, head, whole = parts
    before, after = inspect_head(str(folder)), inspect_head(str(whole))
    assert before is not None
    assert after is not None
    assert (before.state, before.tensors, before.declared) == ("missing", 0, 1)
    assert (after.state, after.hash, after.problem) == ("whole", head.hash(), None)
    assert after.parameters == sum(t.numel() for t in head.tensors.values())
    taken = take_head(str(whole))
    taken.save(tmp_path / "d")
    assert read_draft(str(tmp_path / "d")).hash() == head.hash()
    with pytest.raises(UserError, match=r"has no MTP head to take \(no tensors of a head"):
        take_head(str(folder))


def test_a_stitched_checkpoint_is_the_target_with_a_head(parts: Any) -> None:
    """The trunk is the same file; Transformers loads the same model from the folder."""
    folder, head, whole = parts
    assert (whole / TRUNK).stat().st_ino == (folder / "model.safetensors").stat().st_ino
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_tensors(whole))
    expected = set(lay_out(head)) | set(read_tensors(folder))
    assert set(index["weight_map"]) == expected
    assert set(load_file(whole / HEAD)) == set(lay_out(head))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        for where in (whole, folder)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    assert (whole / "tokenizer.json").is_file()


def lay_out(head: StoredDraft) -> dict[str, Any]:
    """The head's tensors as a folder of its own has them."""
    layout = head.row.layouts[0].lay_out
    assert layout is not None
    return layout(head.config, head.tensors, "")[1]


@pytest.mark.parametrize("family", ROUTED)
def test_packed_experts_replace_single_ones_without_a_rest(family: str, tmp_path: Path) -> None:
    """The tensors of the form before are gone, and the function is the same."""
    _, head, whole = made(family, tmp_path)
    config: Any = head.config
    routed = dataclasses.replace(config.routed, packed=True)
    packed = dataclasses.replace(head, config=dataclasses.replace(config, routed=routed))
    said = stitch(str(whole), packed, tmp_path / "packed")
    before, after = set(read_tensors(whole)), set(read_tensors(tmp_path / "packed"))
    gone, new = before - after, after - before
    assert said["replaced"] == len(lay_out(head))
    assert {name.rpartition("experts.")[2] for name in new} == {"gate_up_proj", "down_proj"}
    parts = {f"{e}.{part}_proj.weight" for e in range(8) for part in ("gate", "up", "down")}
    assert {name.rpartition("experts.")[2] for name in gone} == parts
    found = inspect_head(str(tmp_path / "packed"), str(whole))
    assert found is not None
    assert (found.state, found.hash, found.same_as_base) == ("whole", head.hash(), True)
    assert take_head(str(tmp_path / "packed")).config.routed.packed  # type: ignore[attr-defined]


def test_a_head_that_the_target_counts_otherwise_is_refused(qwen: Any, tmp_path: Path) -> None:
    """Dense in a model with experts, routed in a dense one, and of another number of experts."""
    folder, dense, _ = qwen
    other, routed, _ = made("qwen3_5_moe", tmp_path / "moe")
    with pytest.raises(UserError, match="FFN is dense, the target's config.json counts 8 routed"):
        stitch(str(other), dense, tmp_path / "new")
    with pytest.raises(UserError, match="FFN is 8 experts of 24 neurons .* counts 0 routed"):
        stitch(str(folder), routed, tmp_path / "new")
    _set(other / "config.json", num_experts=9)
    with pytest.raises(UserError, match=r"mtp.layers.0.mlp.experts.8.down_proj.weight"):
        stitch(str(other), routed, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_routed_experts_of_a_family_that_has_none(tmp_path: Path) -> None:
    _, _, whole = made("mimo", tmp_path)
    name = "model.mtp_layers.0.mlp.experts.0.up_proj.weight"
    save_file({**load_file(whole / HEAD), name: torch.zeros(1)}, whole / HEAD)
    _index(whole)
    found = inspect_head(str(whole))
    assert found is not None
    assert (found.state, found.hash) == ("there, not read", None)
    assert "of family mimo with routed experts is seen" in str(found.problem)


def test_an_expert_that_a_checkpoint_lost_is_named(tmp_path: Path) -> None:
    _, _, whole = made("glm4_moe", tmp_path)
    name = "model.layers.3.mlp.experts.6.up_proj.weight"
    save_file({n: t for n, t in load_file(whole / HEAD).items() if n != name}, whole / HEAD)
    _index(whole)
    found = inspect_head(str(whole))
    assert found is not None
    assert found.state == "broken"
    assert f"missing {name}" in str(found.problem)


def test_an_architecture_that_never_counts_its_head_needs_no_count(tmp_path: Path) -> None:
    _, head, whole = made("qwen3_next", tmp_path)
    _set(whole / "config.json", mtp_num_hidden_layers=None)
    found = inspect_head(str(whole))
    assert found is not None
    assert (found.state, found.hash) == ("whole", head.hash())
    assert (found.declared_by, found.declared) == ("Qwen3NextForCausalLM", 1)


def test_a_head_is_replaced(qwen: Any, tmp_path: Path) -> None:
    """Also one in a file with layers of the target, which is written again without it."""
    folder, head, whole = qwen
    everything = tmp_path / "one file"
    everything.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (everything / path.name).write_bytes(path.read_bytes())
    save_file(read_tensors(whole), everything / "model.safetensors", {"format": "pt"})
    other = head.with_tensors({n: t + 1 for n, t in head.tensors.items()}, {})
    for source in (everything, whole):
        out = tmp_path / f"again from {source.name}"
        said = stitch(str(source), other, out)
        assert said["replaced"] == len(head.tensors)
        found = inspect_head(str(out))
        assert found is not None
        assert (found.state, found.hash) == ("whole", other.hash())
        trunk = {n: t for n, t in read_tensors(out).items() if not n.startswith("mtp.")}
        before = read_tensors(folder)
        assert trunk.keys() == before.keys()
        assert all(torch.equal(trunk[n], before[n]) for n in trunk)
    with pytest.raises(UserError, match="is not an empty folder"):
        stitch(str(folder), head, out)


def renamed(t: dict[str, Any]) -> dict[str, Any]:
    return {n.replace("mtp.", "base_model.model.mtp."): x for n, x in t.items()}


Change = Callable[[dict[str, Any]], dict[str, Any]]
BROKEN: dict[str, tuple[Change, dict[str, Any], str]] = {
    "half": (
        lambda t: {n: x for n, x in t.items() if "mlp" not in n},
        {},
        "missing mtp.layers.0.mlp.down_proj.weight",
    ),
    "one linear layer lost": (
        lambda t: {n: x for n, x in t.items() if n != "mtp.layers.0.self_attn.o_proj.weight"},
        {},
        "missing mtp.layers.0.self_attn.o_proj.weight",
    ),
    "renamed": (
        renamed,
        {},
        "engines look for mtp.fc.weight, which is here as base_model.model.mtp",
    ),
    "another base": (
        lambda t: {**t, "mtp.fc.weight": torch.zeros(32, 64)},
        {},
        r"mtp.fc.weight should be \[128, 256\] according to config.json, found \[32, 64\]",
    ),
    "quantised without scales": (
        lambda t: {**t, "mtp.fc.weight": torch.zeros(128, 256, dtype=torch.int8)},
        {},
        "mtp.fc.weight is stored as torch.int8.*quantised",
    ),
    "two layers": (
        lambda t: {**t, "mtp.layers.1.mlp.up_proj.weight": torch.zeros(1)},
        {},
        "expected one MTP layer, found a second",
    ),
    "two declared": (lambda t: t, {"mtp_num_hidden_layers": 2}, "declares 2 MTP layers"),
    "none declared": (lambda t: t, {"mtp_num_hidden_layers": None}, "does not declare it"),
    "a surplus tensor": (
        lambda t: {**t, "mtp.other.weight": torch.zeros(1)},
        {},
        "unknown mtp.other.weight",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_head_is_named(qwen: Any, name: str) -> None:
    _, head, whole = qwen
    change, keys, says = BROKEN[name]
    save_file(change(load_file(whole / HEAD)), whole / HEAD)
    _set(whole / "config.json", **keys)
    _index(whole)
    found = inspect_head(str(whole))
    assert found is not None
    assert found.state == "broken"
    with pytest.raises(UserError, match=says):
        raise UserError(found.problem or "")
    if found.hash is None:
        with pytest.raises(UserError, match="has no MTP head to take"):
            take_head(str(whole))
    else:  # engines would not find it, but it can be stitched in again
        assert take_head(str(whole)).hash() == head.hash()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mtp.layers.0.self_attn.kv_a_proj_with_mqa.weight", "multi-head latent attention"),
        ("mtp.layers.0.mlp.up_proj.weight_scale_inv", "quantised weights"),
    ],
)
def test_a_head_that_is_not_computed_is_no_broken_one(qwen: Any, name: str, what: str) -> None:
    _, _, whole = qwen
    save_file({**load_file(whole / HEAD), name: torch.zeros(1)}, whole / HEAD)
    _index(whole)
    found = inspect_head(str(whole))
    assert found is not None
    assert (found.state, found.hash) == ("there, not read", None)
    assert f"with {what} ({name})" in str(found.problem)
    with pytest.raises(UserError, match="has no MTP head to take .*neither checked"):
        take_head(str(whole))


def test_an_index_that_leaves_the_head_out(qwen: Any) -> None:
    _, _, whole = qwen
    path = whole / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    kept = {n: f for n, f in index["weight_map"].items() if not n.startswith("mtp.")}
    path.write_text(json.dumps({**index, "weight_map": kept}))
    found = inspect_head(str(whole))
    assert found is not None
    assert "does not list mtp.fc.weight in model-00002-of-00002" in str(found.problem)


def test_two_files_that_hold_one_tensor(qwen: Any) -> None:
    _, _, whole = qwen
    save_file({"mtp.norm.weight": torch.zeros(128)}, whole / "old.safetensors")
    with pytest.raises(UserError, match="old.safetensors both hold mtp.norm.weight"):
        inspect_head(str(whole))


def test_a_stale_head_is_the_bases_in_another_model(qwen: Any, tmp_path: Path) -> None:
    folder, head, base = qwen
    same = inspect_head(str(base), str(base))
    assert same is not None
    assert (same.same_as_base, same.trunk_changed, same.stale) == (True, False, False)
    tuned = tmp_path / "tuned"
    stitch(str(folder), head, tuned)
    weights = load_file(tuned / TRUNK)
    name = "model.layers.1.mlp.up_proj.weight"
    (tuned / TRUNK).unlink()
    save_file({**weights, name: weights[name] + 0.01}, tuned / TRUNK, {"format": "pt"})
    found = inspect_head(str(tuned), str(base))
    assert found is not None
    assert (found.same_as_base, found.trunk_changed, found.stale) == (True, True, True)


@pytest.mark.parametrize("begins", ["", "base_model.model.model.", "model.language_model."])
def test_a_stale_head_is_seen_whatever_the_other_tensors_are_called(
    qwen: Any, tmp_path: Path, begins: str
) -> None:
    """As training tools leave them; with other values, and with the base's."""
    folder, head, base = qwen
    weights = load_file(folder / "model.safetensors")
    for change in (0.0, 0.01):
        tuned = tmp_path / f"tuned {change}"
        stitch(str(folder), head, tuned)
        (tuned / TRUNK).unlink()
        layers = {n: t + change if n.startswith("model.") else t for n, t in weights.items()}
        named = {n.replace("model.", begins, 1): t for n, t in layers.items()}
        save_file(named, tuned / TRUNK, {"format": "pt"})
        found = inspect_head(str(tuned), str(base))
        assert found is not None
        assert (found.same_as_base, found.stale) == (True, change > 0)


def test_tensors_that_lost_their_beginning_are_stitched_and_those_of_a_wrapper_refused(
    qwen: Any, tmp_path: Path
) -> None:
    folder, head, _ = qwen
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({n.removeprefix("model."): t for n, t in weights.items()}, path, {"format": "pt"})
    stitch(str(folder), head, tmp_path / "short")
    loaded = load_target(str(tmp_path / "short")).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    save_file({f"base_model.model.{n}": t for n, t in weights.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="saved from inside a PEFT wrapper.*merge the adapter"):
        stitch(str(folder), head, tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()


def test_an_index_of_other_files_is_written_again(qwen: Any, tmp_path: Path) -> None:
    """The base's, copied next to a fine-tune's one file: Transformers does not load that, the stitched folder it does."""
    folder, head, base = qwen
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    name = "model.safetensors.index.json"
    (folder / name).write_bytes((base / name).read_bytes())
    with pytest.raises(UserError, match="could not be loaded"):
        load_target(str(folder))
    stitch(str(folder), head, tmp_path / "new")
    loaded = load_target(str(tmp_path / "new")).model.state_dict()
    for name, tensor in load_file(folder / "model-00001-of-00001.safetensors").items():
        assert torch.equal(loaded[name], tensor)


def test_an_adapter_has_no_head(qwen: Any, tmp_path: Path) -> None:
    _, head, _ = qwen
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    for look in (
        lambda where: inspect_head(where),
        lambda where: stitch(where, head, tmp_path / "new"),
    ):
        with pytest.raises(UserError, match="is an adapter.*merge the adapter into the model"):
            look(str(tmp_path / "lora"))


def test_a_wider_head_is_no_part_of_the_checkpoint(qwen: Any, tmp_path: Path) -> None:
    folder, _, _ = qwen
    target = load_target(str(folder))
    wide = stored(fresh_draft(target, kind="mtp", width=WIDTH + 8), target)
    with pytest.raises(UserError, match="FFN has 104 neurons, the target's config.json says 96"):
        stitch(str(folder), wide, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    eagle = stored(fresh_draft(target, kind="eagle"), target)
    with pytest.raises(UserError, match="kind eagle is no part of a target's checkpoint"):
        stitch(str(folder), eagle, tmp_path / "new")


def test_a_target_of_no_such_family_has_no_head(target_folder: Path, draft_folder: Path) -> None:
    assert inspect_head(str(target_folder)) is None
    assert inspect_head(str(draft_folder)) is None


def test_a_multimodal_config_is_read_and_declared_inside(qwen: Any, tmp_path: Path) -> None:
    """Qwen3.5's own folders: the keys in `text_config`, the layers below `model.language_model`."""
    folder, head, _ = qwen
    seen = tmp_path / "seen"
    seen.mkdir()
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("mtp_num_hidden_layers")
    outer = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": raw,
    }
    (seen / "config.json").write_text(json.dumps(outer))
    names = {
        n.replace("model.", "model.language_model.", 1): t for n, t in read_tensors(folder).items()
    }
    save_file(names, seen / "model.safetensors", {"format": "pt"})
    before = inspect_head(str(seen))
    assert before is not None
    assert (before.state, before.declared) == ("missing", None)
    stitch(str(seen), head, tmp_path / "out")
    found = inspect_head(str(tmp_path / "out"))
    assert found is not None
    assert (found.state, found.hash, found.declared) == ("whole", head.hash(), 1)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["text_config"][
            "mtp_num_hidden_layers"
        ]
        == 1
    )


def _set(path: Path, **keys: Any) -> None:
    raw = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def _index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": tensor_files(folder)})
    )


@pytest.mark.parametrize(
    ("architecture", "keys", "state"),
    [
        ("Glm4ForCausalLM", {}, None),  # of the same name, and has no head
        ("Glm4MoeForCausalLM", {"num_nextn_predict_layers": 1}, "missing"),
        ("DeepseekV3ForCausalLM", {"num_nextn_predict_layers": 0}, None),
        ("Qwen3NextForCausalLM", {}, "missing"),  # engines assume one
        ("Ernie4_5_MoeForCausalLM", {"num_nextn_predict_layers": 1}, "unknown"),
        ("LlamaForCausalLM", {}, None),
    ],
)
def test_who_is_to_have_a_head(
    architecture: str, keys: dict[str, int], state: str | None, tmp_path: Path
) -> None:
    raw = {"architectures": [architecture], "num_hidden_layers": 2, **keys}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    found = inspect_head(str(tmp_path))
    assert (found.state if found else None) == state
    if state == "unknown":
        assert "Ernie4_5_MoeForCausalLM" in str(found and found.problem)


def test_a_head_of_another_family_or_a_quantised_target_is_refused_before_anything_is_written(
    qwen: Any, target_folder: Path, tmp_path: Path
) -> None:
    folder, head, _ = qwen
    with pytest.raises(UserError, match="family qwen3_5 is no part of .'LlamaForCausalLM'."):
        stitch(str(target_folder), head, tmp_path / "new")
    _set(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="the target is quantised"):
        stitch(str(folder), head, tmp_path / "new")
    assert not any(path.name.startswith((".new", "new")) for path in tmp_path.iterdir())


def test_a_stitch_that_was_stopped_is_done_again(
    qwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder appears whole or not at all; other files are copies, and subfolders come along."""
    folder, head, _ = qwen
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("redraft.checkpoints.own_head.inspect_head", lambda _: None)
        with pytest.raises(UserError, match="reads back as None"):
            stitch(str(folder), head, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    stitch(str(folder), head, tmp_path / "new")
    assert (tmp_path / "new" / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    name = "tokenizer.json"
    assert (tmp_path / "new" / name).stat().st_ino != (folder / name).stat().st_ino
    assert not (tmp_path / ".new.part").exists()


@pytest.mark.parametrize("inner", ["model.", "model.language_model."])
def test_a_head_of_layer_n(inner: str, target_folder: Path, tmp_path: Path) -> None:
    """Of GLM's layout, dense; below `language_model` where the other layers are. A second layer is seen."""
    target = load_target(str(target_folder))
    raw = {**target.model.config.to_dict(), "architectures": ["Glm4MoeForCausalLM"]}
    raw["num_nextn_predict_layers"] = 1
    names = {n.replace("model.", inner, 1): t for n, t in read_tensors(target_folder).items()}
    folder = tmp_path / "glm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw, default=str))
    save_file(names, folder / "model.safetensors", {"format": "pt"})
    fields = {"norm_offset": 0.0, "output_gate": False, "rotary_share": 1.0, "head_norms": False}
    draft = fresh_draft(target, kind="mtp", width=48, family="nextn", **fields)
    head = stored(draft, target)
    stitch(str(folder), head, tmp_path / "whole")
    assert f"{inner}layers.8.eh_proj.weight" in tensor_files(tmp_path / "whole")
    found = inspect_head(str(tmp_path / "whole"))
    assert found is not None
    assert (found.state, found.family) == ("whole", "nextn")
    more = {f"{inner}layers.9.enorm.weight": torch.zeros(1)}
    path = tmp_path / "whole" / HEAD
    save_file({**load_file(path), **more}, path)
    _index(tmp_path / "whole")
    found = inspect_head(str(tmp_path / "whole"))
    assert found is not None
    assert "found a second" in str(found.problem)


def test_names_alike_in_an_unknown_architecture_are_no_head(qwen: Any) -> None:
    _, _, whole = qwen
    _set(whole / "config.json", architectures=["Exaone4_5ForCausalLM"])
    found = inspect_head(str(whole))
    assert found is not None
    assert (found.state, found.tensors) == ("unknown", 0)
