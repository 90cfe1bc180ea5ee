"""Memory that processes have in common, without other processes; with them: `test_together.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.core import ranks, shared_memory
from redraft.core.shared_memory import shared_tensor

SHAPE = (5, 3)


def told(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> list[Any]:
    """Two more ranks say what this one does, changed; each opens for itself. All that is said is noted."""
    heard: list[Any] = []

    def everyone(said: Any) -> list[Any]:
        heard.append(said)
        return [said, change(said), said] if isinstance(said, tuple) else [said] * 3

    monkeypatch.setattr(ranks, "everyone", everyone)
    return heard


def test_processes_that_open_the_same_file_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = set(Path("/proc/self/fd").iterdir())
    others = []

    def opened(said: Any) -> Any:
        path = Path(f"/proc/{said[1]}/fd/{said[2]}")
        others.append(shared_memory._opened(path, SHAPE, torch.bfloat16))
        return said

    told(monkeypatch, opened)
    tensor, machines = shared_tensor(SHAPE, torch.bfloat16)
    assert machines == [[0, 1, 2]]
    assert tensor is not None
    assert tensor.shape == SHAPE
    assert not tensor.any()
    tensor[3] = 2.0
    assert torch.equal(others[0], tensor)
    others[0][4] = 7.0
    assert tensor[4].tolist() == [7.0] * 3
    assert set(Path("/proc/self/fd").iterdir()) == numbers, "no file stays open"


def test_ranks_of_other_machines_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda said: ("elsewhere", *said[1:]))
    tensor, machines = shared_tensor((0, 3), torch.float32)
    assert tensor is not None
    assert tensor.shape == (0, 3)
    assert machines == [[0, 2], [1]]


@pytest.mark.parametrize("lacks", ["no such file", "one rank has none", "no Linux"])
def test_without_it_no_rank_has_any(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = told(
        monkeypatch, lambda said: (*said[:2], -1) if lacks == "one rank has none" else said
    )
    if lacks == "no such file":
        monkeypatch.setattr(os, "memfd_create", lambda _: os.open("/", os.O_RDONLY))
    if lacks == "no Linux":
        monkeypatch.delattr(os, "memfd_create")
        monkeypatch.setattr(shared_memory, "BOOT", Path("/no/such"))
    tensor, machines = shared_tensor(SHAPE, torch.float32)
    assert tensor is None
    assert sorted(rank for some in machines for rank in some) == [0, 1, 2]
    assert len(heard) == 2, "every rank exchanges the same"
