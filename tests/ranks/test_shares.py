"""How work is shared out, without other processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.core import ranks
from redraft.core.errors import UserError
from redraft.core.files import append_lines, move, remove, write_text
from redraft.core.ranks import Place
from redraft.models.batching import shares


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_every_row_is_computed_once(size: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in range(10):
        found = []
        for rank in range(size):
            monkeypatch.setattr(ranks, "_here", Place(rank, size))
            own = shares(rows, parts)
            assert all(len(part) for part in own)
            assert len(own) <= parts
            found += [place for part in own for place in part]
        assert sorted(found) == list(range(rows))


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    write_text(kept, "as before")
    monkeypatch.setattr(ranks, "_here", Place(1, 2))
    write_text(kept, "other")
    append_lines(kept, ["more"])
    move(kept, tmp_path / "moved")
    remove(kept)
    assert kept.read_text() == "as before"
    with ranks.alone():
        assert (ranks.rank(), ranks.size(), ranks.is_first()) == (0, 1, True)
        write_text(kept, "other")
    assert kept.read_text() == "other"
    assert (ranks.rank(), ranks.size(), ranks.is_first()) == (1, 2, False)


def test_one_process_needs_no_others() -> None:
    assert ranks.first(lambda: 3) == 3
    assert ranks.everyone("a") == ["a"]
    assert ranks.merged({1: "a"}) == {1: "a"}
    assert list(ranks.mine([1, 2, 3])) == [1, 2, 3]
    with pytest.raises(UserError, match="no"):
        ranks.first(lambda: (_ for _ in ()).throw(UserError("no")))


def test_what_differs_is_named_with_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "everyone", lambda about: [about, {**about, "k": 5}])
    with pytest.raises(UserError, match="this job: k is 4 on rank 0 and 5 on rank 1; all ranks"):
        ranks.check_same("this job", {"seed": 0, "k": 4})
    ranks.check_same("this job", {"seed": 0})
