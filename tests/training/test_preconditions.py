"""What is refused before a target answers anything: one sentence each, and nothing is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.checkpoints.load import stored
from redraft.config import TrainConfig, resolve
from redraft.core.errors import UserError
from redraft.core.folders import state_hash
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.training.preconditions import check_fits
from tests.conftest import FAMILIES, SHAPE, fresh_draft, make_tokenizer, save_target, write_prompts

FITS = {
    "a method": {"method": "expert+fc+norms"},
    "a rank": {"method": "lora", "rank": 16},
    "a share of a part it trains": {"method": "expert+fc", "lr_parts": "expert=2"},
    "no passes after a start": {"method": "feature-map", "epochs": 0.0},
}
REFUSED = {
    "a part it lacks": ("eagle", {"method": "head"}, "eagle draft has no head .* it can carry"),
    "too large a rank": (
        "eagle3",
        {"method": "lora", "rank": 17},
        "train.rank 17 .* choose 1 to 16",
    ),
    "a whole vocabulary": ("eagle3", {"vocab": "remap"}, "nothing to remap"),
    "exchanged and renewed": (
        "eagle3 reduced",
        {"method": "weight-sync+expert", "vocab": "remap"},
        "leave one of the two out",
    ),
    "states that are no features": ("eagle3", {"loss": "paper"}, "kind eagle3 does not have"),
    "no passes": ("eagle3", {"method": "expert", "epochs": 0.0}, "train.epochs 0 trains nothing"),
    "a share of another part": (
        "eagle3",
        {"method": "lora", "lr_parts": "expert=2"},
        "names expert, which method lora does not train; it trains lora",
    ),
    "a share of a start": (
        "eagle3",
        {"method": "feature-map+fc", "lr_parts": "feature-map=2"},
        "names feature-map, which .* it trains fc",
    ),
    "feature-map where fc takes more": (
        "eagle",
        {"method": "feature-map"},
        "only features enter fc",
    ),
}


def of(target: Target, kind: str) -> Any:
    kind, _, reduced = kind.partition(" ")
    return fresh_draft(target, kind=kind, vocab=60 if reduced else None)


@pytest.mark.parametrize("name", FITS)
def test_what_fits_is_taken(target: Target, name: str) -> None:
    check_fits(of(target, "eagle3"), TrainConfig(**FITS[name]), target, target)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_a_way_out(target: Target, name: str) -> None:
    kind, settings, message = REFUSED[name]
    draft = of(target, kind)
    before = state_hash(draft.state_dict())
    with pytest.raises(UserError, match=message):
        check_fits(draft, TrainConfig(**settings), target, target)  # type: ignore[arg-type]
    assert state_hash(draft.state_dict()) == before


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("hidden_size", {"hidden_size": 64}),
        ("num_layers", {"num_hidden_layers": 9}),
        ("vocab_size", {}),
    ],
)
def test_a_base_of_another_shape_is_no_base(
    target: Target, tmp_path: Path, what: str, change: dict[str, int], monkeypatch: Any
) -> None:
    for key, value in change.items():
        monkeypatch.setitem(SHAPE, key, value)
    size = len(make_tokenizer()) + (8 if what == "vocab_size" else 0)
    other = load_target(str(save_target(tmp_path / "other", FAMILIES["llama"](size))))
    draft = fresh_draft(target)
    check_fits(draft, TrainConfig(method="expert"), target, other)  # nobody looks at it
    with pytest.raises(
        UserError, match=rf"--base .* has {what} .* feature-map compares layer by layer"
    ):
        check_fits(draft, TrainConfig(method="feature-map"), target, other)


def test_the_flow_asks_before_anything_is_answered(target: Target, tmp_path: Path) -> None:
    stored(fresh_draft(target).to(torch.float32), target).save(tmp_path / "draft")
    prompts = write_prompts(tmp_path / "p.jsonl", 20)
    config = resolve([("test", {"train.method": "lora", "train.rank": 17})])
    with pytest.raises(UserError, match="train.rank 17"):
        pipeline.adapt(
            target, str(tmp_path / "draft"), str(prompts), out=tmp_path / "run", config=config
        )
    assert not (tmp_path / "run").exists()


def test_muon_needs_a_pytorch_that_has_it(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(optimizer="muon")
    check_fits(of(target, "eagle3"), config, target, None)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="muon needs PyTorch 2.9 or later, this is .*; take adamw"):
        check_fits(of(target, "eagle3"), config, target, None)
    check_fits(of(target, "eagle3"), TrainConfig(), target, None)
