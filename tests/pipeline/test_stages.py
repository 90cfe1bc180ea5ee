"""From training to the stock checkpoint: every kind times every method that trains, read back apart."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.adapters.adapter import Adapter, put
from redraft.adapters.expert import MARK as EXPERT
from redraft.adapters.lora import MARK as LORA
from redraft.adapters.merge import extract, home_of
from redraft.adapters.table import read_method
from redraft.checkpoints.adapter_folder import load_adapter, save_adapter
from redraft.checkpoints.load import StoredDraft, load_draft, read_draft, stored
from redraft.checkpoints.reload_check import check_export
from redraft.config import SelectConfig, TrainConfig
from redraft.core.errors import UserError
from redraft.core.folders import tensor_hash
from redraft.core.records import Answer, to_json
from redraft.drafts.base import Draft
from redraft.metrics.acceptance import pooled_tau
from redraft.metrics.replay import replay
from redraft.models.target import Target
from redraft.pipeline.stages import (
    Shape,
    as_adapter,
    measure_file,
    merge_draft,
    train_adapter,
    train_files,
)
from redraft.selection.select import select, write_selection
from redraft.training import train as train_module
from redraft.training.adapter_run import AdapterRun
from redraft.training.train import Trained, train
from tests.adapters.test_matrix import CARRIED
from tests.conftest import fresh_draft

pytestmark = pytest.mark.usefixtures("toy_adapter")
CONFIG = TrainConfig(
    width="6",
    rank=4,
    lr=2e-2,
    epochs=2,
    batch_tokens=4096,
    rollout=2,
    evaluations=1,
    precision="fp32",
)
"""Two steps: one batch, twice."""
EVERY = pytest.mark.parametrize(("kind", "method"), CARRIED)
Make = Callable[[str, str], "Made"]


@dataclass(frozen=True)
class Made:
    shared: StoredDraft
    trained: Trained
    draft: Draft
    part: Adapter
    merged: StoredDraft
    folder: Path


def rising(target: Target, runs: Sequence[AdapterRun], *rest: object) -> None:
    """An evaluation that finds each step better than the one before: the last one is kept."""
    for run in runs:
        run.note_tau(float(run.state.step))


@pytest.fixture(scope="module")
def made(target: Target, answers: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A shared draft in bf16, a part trained two steps next to it, and the exported merged draft."""

    @functools.cache
    def shared_of(kind: str) -> StoredDraft:
        folder = tmp_path_factory.mktemp(kind)
        draft = fresh_draft(target, kind=kind).to(torch.bfloat16)
        stored(draft, target).save(folder)
        return read_draft(str(folder))

    @functools.cache
    def make(kind: str, method: str) -> Made:
        shared = shared_of(kind)
        draft = shared.build(target, torch.float32)
        config = replace(CONFIG, method=method)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_module, "_evaluate", rising)
            trained = train(target, draft, answers[:6], answers[:2], config, k=3)
        assert trained.record.steps == trained.record.best_step == 2
        part = as_adapter(target, shared, trained, answers[:6], config)
        merged = merge_draft(shared, part, target)
        folder = tmp_path_factory.mktemp("export") / "draft"
        merged.save(folder)
        return Made(shared, trained, draft, part, merged, folder)

    return make


def outputs(target: Target, draft: Draft) -> Tensor:
    tokens = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    features = target.read(tokens, draft.aux_layers).features_BTF
    with torch.no_grad():
        states = [s.flatten(0, 1) for s in draft.rollout(tokens, features, 1, 2)]
        return torch.cat([draft.logits(s) for s in states]).double()


@EVERY
def test_the_exported_folder_computes_what_was_trained(
    target: Target, made: Make, kind: str, method: str
) -> None:
    """The second reader agrees with the merged draft, and both with the draft that has the part."""
    m = made(kind, method)
    assert check_export(m.merged, m.folder) < 1e-5
    back = outputs(target, load_draft(str(m.folder), target, torch.float32))
    beside = m.shared.build(target, torch.float32)
    put(beside, m.part.tensors)
    scale = float(back.abs().max())
    # A low-rank sum is rounded to bf16 once more, in every layer; a concatenation is not.
    parts = method.split("+")
    tolerance = 0.05 if "lora" in parts else 0.01 if "head-lora" in parts else 1e-5
    assert float((outputs(target, beside) - back).abs().max()) < tolerance * scale
    without = outputs(target, m.shared.build(target, torch.float32))
    assert float((without - back).abs().max()) > 4 * tolerance * scale, "two steps moved nothing"


@EVERY
def test_training_moves_what_the_method_owns_and_nothing_shared(
    made: Make, kind: str, method: str
) -> None:
    m = made(kind, method)
    now = {n.replace(".base_layer.", "."): t for n, t in m.draft.state_dict().items()}
    owned = {n for n in m.trained.tensors if home_of(n) == n}
    for name, tensor in m.shared.tensors.items():
        if tensor.is_floating_point():
            same = torch.equal(now[name], tensor.float())
            assert same == (name not in owned), name
    count = sum(t.numel() for t in m.trained.tensors.values())
    assert m.trained.record.trained_parameters == count
    assert m.trained.record.draft_parameters == sum(
        t.numel() for t in m.merged.tensors.values() if t.is_floating_point()
    )
    for name, tensor in m.trained.tensors.items():
        if name.endswith(("down_proj.weight", "lora_B.weight")) and home_of(name) != name:
            assert tensor.any(), f"{name} is still zero"


@EVERY
def test_a_part_is_in_the_shared_dtype_and_its_card_says_what_it_is(
    made: Make, kind: str, method: str, tmp_path: Path
) -> None:
    m = made(kind, method)
    assert {t.dtype for t in m.part.tensors.values()} == {torch.bfloat16}
    assert set(m.part.tensors) <= set(m.trained.tensors)
    card = m.part.card
    assert card["shared_hash"] == m.shared.hash()
    assert card["config"]["method"] == m.part.method == method
    widened = {n.split(EXPERT)[0] for n in m.part.tensors if EXPERT in n}
    assert card["shared_widths"] == dict.fromkeys(sorted(widened), 24)
    assert bool(widened) == ("expert" in method)
    assert any(LORA in n for n in m.part.tensors) == ("lora" in method)
    save_adapter(tmp_path / "part", m.part)
    again = merge_draft(m.shared, load_adapter(tmp_path / "part"))
    assert {n: tensor_hash(t) for n, t in again.tensors.items()} == {
        n: tensor_hash(t) for n, t in m.merged.tensors.items()
    }


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "token_lm"])
def test_an_export_that_lost_its_part_is_caught(made: Make, kind: str, tmp_path: Path) -> None:
    for method in ("lora", "attention"):
        m = made(kind, method)
        m.shared.save(tmp_path / method)
        with pytest.raises(UserError, match="the folder computes another function than what was"):
            check_export(m.merged, tmp_path / method)


def test_a_part_of_another_draft_is_not_fused(target: Target, made: Make) -> None:
    with pytest.raises(UserError, match="trained next to the shared draft"):
        merge_draft(made("eagle", "fc").shared, made("eagle3", "fc").part, target)


def test_a_part_that_changed_nothing_is_saved_and_fused(
    target: Target, made: Make, answers: list[Answer], tmp_path: Path
) -> None:
    shared = made("eagle3", "fc").shared
    config = replace(CONFIG, method="weight-sync")
    part = train_adapter(target, shared, answers[:6], answers[:2], config, 3, base=target)
    assert part.tensors == {}
    save_adapter(tmp_path / "part", part)
    merged = merge_draft(shared, load_adapter(tmp_path / "part"), target)
    assert merged.hash() == shared.hash()


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "token_lm"])
@pytest.mark.parametrize("method", ["scratch", "scratch+expert"])
def test_a_draft_from_nothing_is_saved_as_a_stock_draft(
    target: Target, answers: list[Answer], tmp_path: Path, kind: str, method: str
) -> None:
    for name, count in (("a.jsonl", 8), ("h.jsonl", 2)):
        lines = [json.dumps(to_json(answer)) for answer in answers[:count]]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    config = replace(CONFIG, method=method)
    command: dict[str, Any] = {
        "answers": tmp_path / "a.jsonl",
        "heldout": tmp_path / "h.jsonl",
        "selection": None,
        "config": config,
        "k": 3,
        "shape": Shape(kind, width=24),
    }
    record = train_files(target, out=tmp_path / "out", **command)
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == record.steps
    back = read_draft(str(tmp_path / "out"))
    assert not any(EXPERT in name for name in back.tensors)
    assert back.config.intermediate_size == 24, "an expert is its target's; the draft is shared"
    assert check_export(back, tmp_path / "out") < 1e-5
    replayed = replay(target, back.build(target, torch.float32), answers[:2], 3)
    tau = pooled_tau([t for t in replayed if t.accepted])
    if method == "scratch":
        assert tau == record.best_tau()
    for changes, message in (
        ({"method": "fc"}, "adapts a draft: name it with --draft"),
        (
            {"method": "scratch+expert", "width": "auto"},
            "train.width auto compares several experts",
        ),
    ):
        command["config"] = replace(CONFIG, **changes)
        with pytest.raises(UserError, match=message):
            train_files(target, out=tmp_path / "no", **command)


def write(path: Path, answers: Sequence[Answer]) -> Path:
    path.write_text("".join(answer.to_line() + "\n" for answer in answers))
    return path


def test_answers_of_one_token_are_counted_as_excluded(
    target: Target, made: Make, answers: list[Answer], tmp_path: Path
) -> None:
    draft = made("eagle3", "fc").shared.build(target)
    plain = measure_file(target, draft, write(tmp_path / "a.jsonl", answers[:4]), 3).acceptance
    short = [*answers[:4], replace(answers[4], length=1)]
    found = measure_file(target, draft, write(tmp_path / "b.jsonl", short), 3).acceptance
    assert (found.tau, found.prompts, found.excluded) == (plain.tau, 4, 1)
    assert plain.excluded == 0


def test_a_selection_of_other_answers_is_refused(
    target: Target, made: Make, answers: list[Answer], tmp_path: Path
) -> None:
    selection = tmp_path / "selection.jsonl"
    write_selection(selection, select(answers[:8], SelectConfig()))
    files = write(tmp_path / "a.jsonl", answers[2:12]), write(tmp_path / "h.jsonl", answers[:2])
    with pytest.raises(UserError, match="keeps 8 samples, of which 6 are here; name the file"):
        train_files(target, *files, tmp_path / "out", CONFIG, 3, selection=selection)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["expert", "full", "expert+head", "expert+head-lora"])
def test_a_retargeted_vocabulary_goes_all_the_way(
    target: Target, answers: list[Answer], tmp_path: Path, method: str
) -> None:
    """Trained, resumed by its card, merged, exported, read back: new tokens with their own rows."""
    draft = fresh_draft(target, vocab=60)
    said = {token for answer in answers for token in answer.answer[1:]}
    missing = torch.tensor(sorted(set(range(target.vocab_size)) - said)[:60])
    draft.draft_vocab = missing  # a vocabulary made for other text
    stored(draft, target).save(tmp_path / "shared")
    shared = read_draft(str(tmp_path / "shared"))
    config = replace(CONFIG, method=method, vocab="remap", epochs=4)
    part = train_adapter(target, shared, answers, answers[:4], config, 3)
    before, after = part.card["train"]["miss_rate"]
    assert before == 1.0
    assert after < 0.3
    save_adapter(tmp_path / "adapter", part)
    merged = merge_draft(shared, load_adapter(tmp_path / "adapter"), target)
    if "lora" not in method:
        taken = extract(merged.tensors, shared.tensors, read_method(method))
        assert {n: tensor_hash(t) for n, t in taken.items()} == {
            n: tensor_hash(t) for n, t in part.tensors.items()
        }
    merged.save(tmp_path / "fused")
    assert check_export(merged, tmp_path / "fused") < 1e-5
    back = load_draft(str(tmp_path / "fused"), target, torch.float32)
    beside = shared.build(target, torch.float32)
    put(beside, part.tensors)
    assert back.draft_vocab is not None
    assert torch.equal(back.draft_vocab, beside.draft_vocab)
    new = set(back.draft_vocab.tolist()) - set(missing.tolist())
    assert new <= said
    for one, other in zip(
        (outputs(target, back), back.draft_vocab),
        (outputs(target, beside), beside.draft_vocab),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-5)
    taus = [pooled_tau(replay(target, d, answers, 3)) for d in (back, shared.build(target))]
    assert taus[1] == 1.0, "what a draft cannot say is never accepted"
    assert taus[0] > 1.02
    if method == "expert":  # kept rows are shared, bit for bit
        kept = [i for i, t in enumerate(back.draft_vocab.tolist()) if t not in new]
        old = [missing.tolist().index(t) for t in back.draft_vocab.tolist() if t not in new]
        rows = merged.tensors["lm_head.weight"][kept]
        assert tensor_hash(rows) == tensor_hash(shared.tensors["lm_head.weight"][old])
