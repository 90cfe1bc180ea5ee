"""Capturing from several servers: every row once, from whichever is there, and never from another target."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.core.errors import UserError
from redraft.core.records import Answer
from redraft.features.extract import Plan, capture_features
from redraft.features.layouts import open_features
from redraft.features.stored_target import load_stored_target
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.serving import capture_fleet
from redraft.serving.capture import Capture
from redraft.serving.capture_fleet import CaptureFleet
from tests.conftest import FAMILIES, make_tokenizer, save_target
from tests.serving.test_capture import AUX_LAYERS, asking, server


def rows_of(answers: list[Answer], count: int) -> list[tuple[int, ...]]:
    return [(*answer.prompt, *answer.tokens) for answer in answers[:count]]


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The rows asked of each server from here on, by address."""
    asked: Counter[str] = Counter()
    states = Capture._states

    def counted(self: Capture, model: str, tokens: Any) -> Any:
        asked[self.address] += 1
        return states(self, model, tokens)

    monkeypatch.setattr(Capture, "_states", counted)
    return asked


def test_two_servers_share_the_rows(
    target: Target, target_folder: Path, answers: list[Answer], tmp_path: Path, monkeypatch: Any
) -> None:
    asked = counting(monkeypatch)
    bare = load_stored_target(str(target_folder), [])
    with (
        server(target, tmp_path / "a", delay=0.03) as one,
        server(target, tmp_path / "b", delay=0.03) as other,
    ):
        fleet = CaptureFleet([asking(one), asking(other)])
        plan = Plan(tmp_path / "f", batch_tokens=2048)
        capture_features(bare, fleet, answers[:12], AUX_LAYERS, plan, bare.normed)
    assert sum(asked.values()) == 12 + 2, "each row once, and the first row of both"
    assert min(asked.values()) > 2
    assert not [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]
    rows = open_features(tmp_path / "f")
    own = load_stored_target(str(target_folder), [rows])
    assert own.check_says(answers[:12]) == 1.0


def test_fewer_rows_than_places_go_to_all_servers(
    target: Target, answers: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        server(target, tmp_path / "a", delay=0.2) as one,
        server(target, tmp_path / "b", delay=0.2) as other,
    ):
        fleet = CaptureFleet([replace(asking(address), concurrency=32) for address in (one, other)])
        fleet(rows_of(answers, 1))
        asked = counting(monkeypatch)
        fleet(rows_of(answers, 8))
    assert asked == {one: 4, other: 4}


def test_rows_of_a_server_that_dies_go_to_the_others(
    target: Target, answers: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(capture_fleet, "say", said.append)
    rows = rows_of(answers, 10)
    with (
        server(target, tmp_path / "a") as one,
        server(target, tmp_path / "b") as other,
    ):
        fleet = CaptureFleet([asking(one), asking(other)])
        alone = asking(one)(rows)
        fleet(rows[:1])
        dying = fleet.servers[1]
        object.__setattr__(dying, "_states", lambda *_: (_ for _ in ()).throw(UserError("it died")))
        found = fleet(rows)
        assert [server.address for server in fleet.servers] == [one]
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
        assert said == [f"{other} is asked no more: it died"]
        object.__setattr__(fleet.servers[0], "_states", dying._states)
        with pytest.raises(UserError, match="it died"):
            fleet(rows)


def test_servers_of_other_targets_are_told_apart(
    target: Target, answers: list[Answer], tmp_path: Path
) -> None:
    config = FAMILIES["llama"](len(make_tokenizer()))
    other = load_target(str(save_target(tmp_path / "other", config, seed=9)))
    with server(target, tmp_path / "a") as one, server(other, tmp_path / "b") as two:
        fleet = CaptureFleet([asking(one), asking(two)])
        with pytest.raises(UserError, match=r"give other states of the same tokens .* one target"):
            fleet(rows_of(answers, 2))
