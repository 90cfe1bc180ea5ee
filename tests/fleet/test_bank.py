"""A bank: what goes in comes out, shared tensors are held once, and what is wrong is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from redraft.adapters.adapter import Adapter, declare, prepare, take
from redraft.adapters.kind import Setup
from redraft.adapters.table import read_method
from redraft.checkpoints.adapter_folder import load_adapter, save_adapter
from redraft.checkpoints.load import read_draft
from redraft.cli.app import app
from redraft.config import TrainConfig
from redraft.core.errors import UserError
from redraft.core.files import write_tensors
from redraft.core.folders import read_file, state_hash
from redraft.core.lock import held
from redraft.core.records import Answer
from redraft.fleet import bank as bank_module
from redraft.fleet.bank import add, check_bank, read_bank
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.stages import train_adapter
from redraft_experiments.bank import bench_bank
from tests.conftest import make_tokenizer

METHODS = ("lora", "expert+norms", "body", "lora+head-lora")


def make_adapter(target: Target, draft: Path, out: Path, method: str, seed: int = 9) -> Path:
    """An adapter with lively tensors, as training would have left it."""
    stored = read_draft(str(draft))
    network, how = stored.build(target), read_method(method)
    prepare(network, how, Setup(width=6, rank=3, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in declare(network, how):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    tensors = take(network, how)
    card = {
        "shared": str(draft),
        "shared_hash": stored.hash(),
        "adapter_hash": state_hash(tensors),
        "target": f"fine-tune-{seed}",
        "target_fingerprint": str(seed),
        "tokenizer_hash": target.tokenizer_hash(),
    }
    save_adapter(out, Adapter(method, tensors, card))
    return out


@pytest.fixture
def bank(target: Target, draft_folder: Path, tmp_path: Path) -> Path:
    """Four adapters, one of each method."""
    for seed, method in enumerate(METHODS):
        made = make_adapter(target, draft_folder, tmp_path / "made" / str(seed), method, seed)
        add(tmp_path / "bank", f"m{seed}", made, str(draft_folder))
    return tmp_path / "bank"


def states(draft: Any) -> torch.Tensor:
    """Logits of a chain on made-up features, the same for every draft of one shape."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(5, 60, (1, 12), generator=generator)
    features = torch.randn(1, 12, draft.feature_size, generator=generator).to(
        next(draft.parameters())
    )
    with torch.no_grad():
        return torch.cat([draft.logits(s)[0] for s in draft.rollout(tokens, features, 0, 3)])


def redraft(*words: object) -> Any:
    return CliRunner().invoke(app, ["bank", *map(str, words)])


@pytest.mark.parametrize("at", range(len(METHODS)))
def test_a_name_is_the_frozen_draft_with_its_adapter(
    bank: Path, target: Target, tmp_path: Path, at: int
) -> None:
    """Attached in memory, merged in memory and exported compute the same; another name computes something else."""
    found, name = read_bank(bank), f"m{at}"
    frozen = found.frozen.build(target)
    before = {key: tensor.clone() for key, tensor in frozen.state_dict().items()}
    attached = states(found.adapter(name).attached_to(frozen))
    merged = states(found.merged(name).build(target))
    assert redraft("export", bank, name, "--out", tmp_path / "out").exit_code == 0
    exported = states(read_draft(str(tmp_path / "out")).build(target))
    assert torch.allclose(attached, merged, atol=1e-4)
    assert torch.equal(merged, exported)
    other = states(found.merged(f"m{(at + 1) % len(METHODS)}").build(target))
    assert (other - merged).abs().max() > 0.01
    assert all(torch.equal(tensor, before[key]) for key, tensor in frozen.state_dict().items())


@pytest.mark.parametrize("at", range(len(METHODS)))
def test_shared_tensors_are_held_once(bank: Path, target: Target, at: int) -> None:
    """What an adapter does not replace is the frozen draft's own memory, in networks and in merged tensors."""
    found, name = read_bank(bank), f"m{at}"
    own = found.adapter(name).tensors
    frozen = found.frozen.build(target)
    theirs = {tensor.data_ptr() for tensor in frozen.parameters()}
    new = [
        p
        for p in found.adapter(name).attached_to(frozen).parameters()
        if p.data_ptr() not in theirs
    ]
    assert sum(p.numel() for p in new) == sum(t.numel() for t in own.values())
    shared = {tensor.data_ptr() for tensor in found.frozen.tensors.values()}
    merged = found.merged(name).tensors
    assert any(tensor.data_ptr() in shared for tensor in merged.values())


def test_a_low_rank_adapter_goes_to_peft(bank: Path, target: Target, tmp_path: Path) -> None:
    found = read_bank(bank)
    for name in ("m0", "m3"):
        done = redraft("export", bank, name, "--as", "peft", "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        network = PeftModel.from_pretrained(found.frozen.build(target), tmp_path / name)
        loaded = states(network.base_model.model)
        assert torch.allclose(loaded, states(found.merged(name).build(target)), atol=1e-4)
        assert (loaded - states(found.frozen.build(target))).abs().max() > 0.01
    refused = redraft("export", bank, "m1", "--as", "peft", "--out", tmp_path / "no")
    assert "expert+norms" in str(refused.exception)
    assert "--method lora" in str(refused.exception)
    assert not (tmp_path / "no").exists()


def test_list_verify_remove(bank: Path) -> None:
    listed = json.loads(redraft("list", bank, "--json").stdout)
    assert [row["name"] for row in listed["adapters"]] == ["m0", "m1", "m2", "m3"]
    assert [row["method"] for row in listed["adapters"]] == list(METHODS)
    assert all(row["bytes"] == 4 * row["parameters"] for row in listed["adapters"])
    assert "fine-tune-1" in redraft("list", bank).stdout
    assert redraft("verify", bank).exit_code == 0
    assert redraft("remove", bank, "m1").exit_code == 0
    assert not (bank / "adapters" / listed["adapters"][1]["object"]).exists()
    found = check_bank(bank)
    assert (found.adapters, found.problems, found.unnamed) == (3, {}, ())
    assert "known: m0, m2, m3" in str(redraft("remove", bank, "m11").exception)


def test_the_same_again_changes_nothing_and_another_needs_replace(
    bank: Path, target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    made, before = tmp_path / "made" / "0", (bank / "bank.json").read_text()
    add(bank, "m0", made)
    assert (bank / "bank.json").read_text() == before
    with pytest.raises(UserError, match="holds as m0 already"):
        add(bank, "twin", made)
    other = make_adapter(target, draft_folder, tmp_path / "other", "lora", 77)
    with pytest.raises(UserError, match="--replace"):
        add(bank, "m0", other)
    old = read_bank(bank).named("m0").object
    new = add(bank, "m0", other, replace=True).object
    assert read_bank(bank).named("m0").object == new != old
    assert not (bank / "adapters" / old).exists()


def test_equal_tensors_of_another_target_are_another_adapter(bank: Path, tmp_path: Path) -> None:
    """Its card names its own target, so that an export says whose it is."""
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "made" / "0", copy)
    card = json.loads((copy / "adapter.json").read_text()) | {
        "target": "another",
        "target_fingerprint": "another",
    }
    (copy / "adapter.json").write_text(json.dumps(card))
    add(bank, "copy", copy)
    found = read_bank(bank)
    assert found.adapter("copy").card["target"] == "another"
    assert found.adapter("m0").card["target"] == "fine-tune-0"


def test_what_was_changed_is_named(bank: Path, tmp_path: Path) -> None:
    row = read_bank(bank).named("m2")
    file = bank / "adapters" / row.object / "model.safetensors"
    tensors = read_file(file)
    name = next(iter(tensors))
    write_tensors(file, {**tensors, name: tensors[name] + 1})
    done = redraft("verify", bank, "--json")
    assert done.exit_code == 3
    assert list(json.loads(done.stdout)["problems"]) == ["m2"]
    # With a card that says so too: the folder's name still tells.
    card_file = file.with_name("adapter.json")
    card = json.loads(card_file.read_text()) | {"adapter_hash": state_hash(read_file(file))}
    card_file.write_text(json.dumps(card))
    with pytest.raises(UserError, match="not the adapter that was added as m2"):
        read_bank(bank).adapter("m2")
    draft = bank / "draft" / "model.safetensors"
    tensors = read_file(draft)
    write_tensors(draft, {n: t + 1 if t.is_floating_point() else t for n, t in tensors.items()})
    (bank / "draft" / "redraft.json").unlink()
    done = redraft("verify", bank)
    assert done.exit_code == 3
    assert "frozen draft was changed" in done.stdout
    with pytest.raises(UserError, match="frozen draft was changed"):
        add(bank, "m9", tmp_path / "made" / "0")


def test_a_run_says_what_training_brought(
    target: Target, draft_folder: Path, answers: list[Answer], tmp_path: Path
) -> None:
    config = TrainConfig(method="lora", rank=2, lr=0.01, epochs=20, rollout=2, precision="fp32")
    stored, some = read_draft(str(draft_folder)), answers[:4]
    adapter = train_adapter(target, stored, some, some, config, 3)
    save_adapter(tmp_path / "run" / "adapter", adapter)
    row = add(tmp_path / "bank", "m", tmp_path / "run", str(draft_folder))
    curve = adapter.card["train"]["heldout_tau"]
    assert row.heldout_tau == (curve[0][1], max(tau for _, tau in curve))
    assert row.heldout_tau[0] < row.heldout_tau[1]
    assert read_bank(tmp_path / "bank").named("m") == row
    assert "{:.2f} to {:.2f}".format(*row.heldout_tau) in redraft("list", tmp_path / "bank").stdout


def test_an_interrupted_change_leaves_a_whole_bank(bank: Path, tmp_path: Path) -> None:
    """An adapter that was written and has no name yet harms nothing, and goes with the next change."""
    shutil.copytree(
        bank / "adapters" / read_bank(bank).named("m0").object, bank / "adapters" / ("0" * 16)
    )
    found = check_bank(bank)
    assert (found.unnamed, found.problems) == (("0" * 16,), {})
    redraft("remove", bank, "m3")
    assert check_bank(bank).unnamed == ()


def test_bad_input_is_a_sentence(
    bank: Path, target: Target, draft_folder: Path, kind_folder: Any, tmp_path: Path
) -> None:
    made = tmp_path / "made" / "0"
    with pytest.raises(UserError, match="is no bank"):
        read_bank(tmp_path / "nowhere")
    with pytest.raises(UserError, match="name its frozen draft"):
        add(tmp_path / "new", "m", made)
    with pytest.raises(UserError, match="holds other files"):
        add(tmp_path / "made", "m", made, str(draft_folder))
    with pytest.raises(UserError, match="make a name"):
        add(bank, "../m", made)
    with pytest.raises(UserError, match="bank of their own"):
        add(bank, "m", made, str(kind_folder("eagle")))
    foreign = make_adapter(target, kind_folder("eagle"), tmp_path / "foreign", "lora")
    with pytest.raises(UserError, match="was trained next to the shared draft"):
        add(bank, "foreign", foreign)
    with held(bank), pytest.raises(UserError, match="another redraft process"):
        add(bank, "m", made)
    record = json.loads((bank / "bank.json").read_text())
    record["adapters"]["m0"]["object"] = "../../elsewhere"
    (bank / "bank.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="no record of a bank"):
        read_bank(bank)
    (bank / "bank.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(UserError, match="version 2"):
        read_bank(bank)
    (bank / "bank.json").write_text(
        json.dumps({"version": 1, "draft": "x", "adapters": {"a": {"object": "../../etc"}}})
    )
    with pytest.raises(UserError, match="no record of a bank"):
        read_bank(bank)


def test_the_bench_counts_what_is_there(draft_folder: Path) -> None:
    found = bench_bank(str(draft_folder), 3, 2)
    numbers = sum(t.numel() for t in read_draft(str(draft_folder)).tensors.values())
    assert found.adapters == 3
    assert found.apart >= 3 * numbers
    assert 0 < found.tensors < found.apart / 10
    assert found.tensors / 3 < found.adapter_bytes
    assert found.bank_bytes == pytest.approx(found.draft_bytes + 3 * found.adapter_bytes)


@pytest.mark.parametrize("done", [0, 1])
def test_an_interrupted_beginning_can_be_repeated(
    target: Target,
    draft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: int,
) -> None:
    """Stopped after the frozen draft was written, or after the adapter was, each time before bank.json says so."""
    made, bank = make_adapter(target, draft_folder, tmp_path / "made", "lora"), tmp_path / "bank"
    writes = []

    def stopped(found: Any) -> None:
        writes.append(found)
        if len(writes) > done:
            raise KeyboardInterrupt
        write(found)

    write = bank_module._write
    monkeypatch.setattr(bank_module, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        add(bank, "m", made, str(draft_folder))
    monkeypatch.undo()
    assert (bank / "bank.json").is_file() == bool(done)
    add(bank, "m", made, str(draft_folder))
    assert check_bank(bank) == replace(check_bank(bank), adapters=1, problems={}, unnamed=())


def test_a_draft_folder_of_somebody_is_not_written_over(
    target: Target, draft_folder: Path, kind_folder: Any, tmp_path: Path
) -> None:
    made = make_adapter(target, draft_folder, tmp_path / "made", "lora")
    shutil.copytree(kind_folder("eagle"), tmp_path / "mine" / "draft")
    before = read_draft(str(tmp_path / "mine" / "draft")).hash()
    with pytest.raises(UserError, match=r"holds other files \(draft\)"):
        add(tmp_path / "mine", "m", made, str(draft_folder))
    assert read_draft(str(tmp_path / "mine" / "draft")).hash() == before


def test_adapters_of_targets_with_more_tokens_have_a_bank(
    draft_folder: Path, target_folder: Path, tmp_path: Path
) -> None:
    """Their draft has as many rows as they, and the bank keeps that one."""
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(tmp_path / "grown")
    make_tokenizer().save_pretrained(tmp_path / "grown")
    grown = load_target(str(tmp_path / "grown"))
    fitted = read_draft(str(draft_folder)).fitted(grown)
    fitted.save(tmp_path / "fitted")
    made = make_adapter(grown, tmp_path / "fitted", tmp_path / "made", "lora")
    with pytest.raises(UserError, match="vocabulary grew"):
        add(tmp_path / "wrong", "m", made, str(draft_folder))
    add(tmp_path / "bank", "m", made, str(draft_folder), target=grown)
    assert read_bank(tmp_path / "bank").frozen.hash() == fitted.hash()
    assert check_bank(tmp_path / "bank").problems == {}


@pytest.mark.parametrize(
    "row",
    ["x", {"object": "0" * 16}, {"heldout_tau": [1]}, {"bytes": "y"}, {"parameters": None}],
)
def test_a_damaged_record_is_a_sentence(bank: Path, row: Any) -> None:
    record = json.loads((bank / "bank.json").read_text())
    whole = record["adapters"]["m0"]
    alone = isinstance(row, str) or "object" in row
    record["adapters"]["m0"] = row if alone else {**whole, **row}
    (bank / "bank.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="no record of a bank"):
        read_bank(bank)


def test_what_cannot_be_merged_is_a_sentence(
    bank: Path, target: Target, draft_folder: Path, tmp_path: Path
) -> None:
    adapter = load_adapter(make_adapter(target, draft_folder, tmp_path / "whole", "lora", 5))
    first = next(name for name in adapter.tensors if name.endswith("lora_A.weight"))
    broken = {
        "no pair": {n: t for n, t in adapter.tensors.items() if n != first},
        "shape": {**adapter.tensors, first: adapter.tensors[first][:, :-1]},
        "no home": {"elsewhere.lora_A.weight": torch.ones(1, 1), **adapter.tensors},
    }
    for at, tensors in enumerate(broken.values()):
        card = {**adapter.card, "adapter_hash": state_hash(tensors)}
        save_adapter(tmp_path / str(at), Adapter("lora", tensors, card))
        with pytest.raises(UserError, match="cannot be merged"):
            add(bank, "broken", tmp_path / str(at))
    card = {key: value for key, value in adapter.card.items() if key != "shared_hash"}
    save_adapter(tmp_path / "whose", Adapter("lora", adapter.tensors, card))
    with pytest.raises(UserError, match="does not record the draft"):
        add(bank, "whose", tmp_path / "whose")
    assert check_bank(bank).adapters == len(METHODS)
    done = redraft("remove", tmp_path / "typo", "m")
    assert "is no bank" in str(done.exception)
    assert not list(tmp_path.glob(".typo*"))
    assert not (tmp_path / "typo").exists()
