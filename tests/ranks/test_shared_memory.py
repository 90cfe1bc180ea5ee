"""Memory that processes have in common, without other processes; with them: `test_together.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redraft.core import ranks, shared_memory
from redraft.core.shared_memory import shared_tensor

SHAPE = (5, 3)


class Others:
    """Another rank, which opens what this one says, or says that it cannot."""

    def __init__(self) -> None:
        self.can = True
        self.tensors: list[Tensor | None] = []
        self.heard = 0

    def __call__(self, said: Any) -> list[Any]:
        self.heard += 1
        if isinstance(said, bool):
            return [said, self.can]
        process, number, name = said
        if number is not None:
            path = Path(f"/proc/{process}/fd/{number}")
            self.tensors.append(shared_memory._opened(path, name, SHAPE, torch.bfloat16))
        return [said, (1, None, "")]


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[Others]:
    found = Others()
    monkeypatch.setattr(ranks, "everyone", found)
    yield found
    assert found.heard == 2, "every rank exchanges the same"


def open_files() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def test_processes_that_open_the_same_file_see_the_same(others: Others) -> None:
    before = open_files()
    tensor = shared_tensor(SHAPE, torch.bfloat16)
    (other,) = others.tensors
    assert tensor is not None
    assert other is not None
    assert tensor.shape == SHAPE
    assert not tensor.any()
    tensor[3] = 2.0
    assert torch.equal(other, tensor)
    other[4] = 7.0
    assert tensor[4].tolist() == [7.0] * 3
    assert open_files() == before, "no file stays open"


def test_it_may_be_empty(others: Others) -> None:
    tensor = shared_tensor((0, 3), torch.float32)
    assert tensor is not None
    assert tensor.shape == (0, 3)


def test_where_one_rank_has_none_no_rank_has(others: Others) -> None:
    others.can = False
    before = open_files()
    assert shared_tensor(SHAPE, torch.float32) is None
    assert open_files() == before


@pytest.mark.parametrize("system", ["without", "full"])
def test_a_system_that_gives_none(
    system: str, others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system == "without":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", lambda _: os.open("/no/such", os.O_RDWR))
    assert shared_tensor(SHAPE, torch.float32) is None


def test_another_file_of_that_number_is_left_alone(tmp_path: Path) -> None:
    """As on another machine, where the process of that number is another."""
    (tmp_path / "file").write_text("five!")
    with (tmp_path / "file").open("r+") as file:
        path = Path(f"/proc/self/fd/{file.fileno()}")
        assert shared_memory._opened(path, "redraft-0", SHAPE, torch.float32) is None
        assert shared_memory._opened(path, str(tmp_path), (1,), torch.uint8) is not None
    assert (tmp_path / "file").read_text() == "five!"
    gone = Path("/proc/self/fd/99999")
    assert shared_memory._opened(gone, "redraft-0", SHAPE, torch.float32) is None
