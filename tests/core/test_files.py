"""What is written stays written: names reach the device with their contents."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft.core import files

WRITES: dict[str, Callable[[Path], object]] = {
    "a whole file": lambda folder: files.write_text(folder / "a.txt", "x"),
    "the first line": lambda folder: files.append_lines(folder / "a.jsonl", ["x"]),
    "a removal": lambda folder: files.remove(folder / "old"),
    "another name": lambda folder: files.move(folder / "old", folder / "new"),
    "a damaged file": lambda folder: files.set_aside(folder / "old"),
}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was flushed to the device: 'file' or the folder's path."""
    found: list[str] = []
    real = os.fsync

    def spy(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        found.append(str(Path(f"/proc/self/fd/{handle}").readlink()) if is_folder else "file")
        real(handle)

    monkeypatch.setattr(os, "fsync", spy)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see what is flushed")
@pytest.mark.parametrize("write", WRITES)
def test_the_folder_is_flushed_after_the_file(
    write: str, tmp_path: Path, synced: list[str]
) -> None:
    (tmp_path / "old").write_text("x")
    WRITES[write](tmp_path)
    assert str(tmp_path) in synced
    if "file" in synced:
        assert synced.index("file") < synced.index(str(tmp_path))
    synced.clear()
    if write == "the first line":  # the name is there already
        files.append_lines(tmp_path / "a.jsonl", ["y"])
        assert synced == ["file"]


def test_damaged_files_never_take_each_others_name(tmp_path: Path) -> None:
    names = []
    for content in ("1", "2", "3"):
        (tmp_path / "a").write_text(content)
        names.append(files.set_aside(tmp_path / "a").name)
    assert names == ["a.damaged", "a.damaged-2", "a.damaged-3"]
    assert (tmp_path / "a.damaged-2").read_text() == "2"
