"""A model trained together with its MTP head: the loss against a second reading, and the bench on a small base."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.checkpoints.load import read_draft, stored
from redraft.checkpoints.own_head import inspect_head
from redraft.core.errors import UserError
from redraft.core.records import to_json
from redraft.drafts.mtp.second_reading import MtpReference
from redraft.models.target import Target
from redraft_experiments import mtp_families, recovery
from redraft_experiments.corpus import SIZES
from redraft_experiments.language_model import IGNORE, Shape
from redraft_experiments.mtp_families import FamilyCell, Joint, bench_mtp_families, steps_of
from tests.conftest import fresh_draft, in_double
from tests.drafts.mtp_targets import SIZES as WIDTHS
from tests.drafts.mtp_targets import save_qwen3_5

TOKENS = [7, 41, 3, 99, 120, 41, 5, 77, 200, 18, 64, 31]
LEARNED = 5
"""The first token that is learned."""


@pytest.fixture
def joint(tmp_path: Path) -> tuple[Joint, Target, Any, Path]:
    """In float64, the head in a folder too."""
    loaded = in_double(save_qwen3_5(tmp_path / "target"))
    target = Target(loaded.model.requires_grad_(True), None, ["target"], freeze=False)
    head = fresh_draft(target, kind="mtp", width=WIDTHS["intermediate_size"])
    stored(head, loaded).save(tmp_path / "head")
    return Joint(target, head), target, head, tmp_path / "head"


def loss_of(joint: Joint) -> torch.Tensor:
    ids = torch.tensor([TOKENS])
    labels = torch.tensor([[IGNORE] * LEARNED + TOKENS[LEARNED:]])
    found: torch.Tensor = joint(ids, labels, False).loss
    return found


@torch.no_grad()
def test_the_loss_is_the_models_and_a_share_of_the_heads(joint: Any) -> None:
    """The head's pair i, of state i and token i+1, is to know token i+2."""
    both, target, _, folder = joint
    out = target.model(torch.tensor([TOKENS]), output_hidden_states=True)
    own = out.logits[0].log_softmax(-1)
    reference = MtpReference(folder, target.embedding_VH, target.head_VH, torch.ones(128).double())
    ahead = [
        reference.chain_logits(TOKENS, out.hidden_states[-1][0], i, 1)[0].log_softmax(-1)
        for i in range(len(TOKENS) - 2)
    ]

    def mean(rows: Any, shift: int, first: int = LEARNED) -> float:
        costs = [-float(rows[t - shift][TOKENS[t]]) for t in range(first, len(TOKENS))]
        return sum(costs) / len(costs)

    loss = float(loss_of(both))
    assert loss == pytest.approx(mean(own, 1) + 0.3 * mean(ahead, 2), rel=1e-9)
    late, all_of_it = mean(ahead, 3), mean(ahead, 2, 2)
    for wrong in (mean(own, 1) + 0.3 * late, mean(own, 1) + 0.3 * all_of_it, mean(own, 1)):
        assert not math.isclose(loss, wrong, rel_tol=1e-4)


def test_the_heads_loss_reaches_the_embedding(joint: Any) -> None:
    """By central differences, as the model computes its norms in float32; a head that is bound as for adapting leaves out its part."""
    both, target, head, _ = joint
    table = target.model.get_input_embeddings().weight
    at, by = (TOKENS[7], 3), 2e-3

    def gradient() -> float:
        table.grad = None
        loss_of(both).backward()
        return float(table.grad[at])

    found = gradient()
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            table[at] += sign * by
            ends.append(float(loss_of(both)))
        table[at] += by
    assert found == pytest.approx((ends[0] - ends[1]) / (2 * by), rel=2e-3)
    head.bind(target)
    assert not math.isclose(gradient(), found, rel_tol=1e-2)


def test_sizes_of_real_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size micro: .*nano"):
        bench_mtp_families(tmp_path, "micro", [1])


@pytest.mark.bench
def test_what_fine_tuning_leaves_of_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(
        SIZES["tiny"],
        shape=Shape(layers=2, hidden=64, width=128, vocab=512, context=256),
        base_steps=400,
        tune_steps=120,
        answer_tokens=24,
    )
    monkeypatch.setitem(SIZES, "tiny", small)
    monkeypatch.setattr(mtp_families, "LIMIT", 48)
    monkeypatch.setattr(mtp_families, "PROMPTS", 24)
    settings = {
        "train.epochs": 2.0,
        "train.rollout": 3,
        "train.evaluations": 2,
        "general.guard": "off",
    }
    monkeypatch.setattr(mtp_families, "SETTINGS", {**mtp_families.SETTINGS, **settings})
    cells = bench_mtp_families(tmp_path, "tiny", [1])
    tau = {
        row: recovery.tau(steps).value
        for row in mtp_families.ROWS
        if (steps := steps_of(cells, row, "own"))
    }
    assert mtp_families.ROWS.keys() - tau.keys() == {"alone", "dropped"}
    assert tau["along"] > tau["frozen"] > 1
    assert tau["adapted"] > tau["frozen"]
    folder = tmp_path / "1"
    base, lost = (
        inspect_head(str(folder / name), str(folder / "base")) for name in ("base", "apart")
    )
    assert base is not None
    assert lost is not None
    assert (base.state, lost.state, lost.trunk_changed) == ("whole", "missing", True)
    given = inspect_head(str(folder / "mtp" / "checkpoint"), str(folder / "base"))
    assert given is not None
    assert (given.state, given.same_as_base) == ("whole", False)
    assert read_draft(str(folder / "along-head")).hash() not in (base.hash, given.hash)
    again = bench_mtp_families(tmp_path, "tiny", [1])
    assert again == cells
    assert [FamilyCell.from_json(json.loads(json.dumps(to_json(cell)))) for cell in cells] == cells
