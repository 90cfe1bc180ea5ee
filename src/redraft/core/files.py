"""The one way to the disk: whatever redraft writes or removes, it does here.

A whole file is written to a temporary neighbour, flushed to the device, and takes its name in one
step: a reader sees the old file or the new one, also after a power loss. Lines are appended in batches, each
flushed; a kill can cut the last line short, which readers of such files drop.

Of several ranks that work on one job (see `ranks.py`) only rank 0 writes; elsewhere these functions do nothing.

An error of the system becomes a UserError of one sentence. Reading goes its own ways.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from safetensors import SafetensorError

from . import ranks
from .errors import UserError
from .failpoints import point

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16
"""Bytes read at a time, from the end, to find a file's last line."""
REMEDIES = {
    errno.ENOSPC: "free space on the disk",
    errno.EDQUOT: "free space in the disk quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make the folder writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
}


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8; its folder is made if need be."""
    _write_whole(path, text.encode("utf-8"), "text")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole and unchanged; its folder is made if need be."""
    _write_whole(path, content, "text")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole. Takes as much memory again as the tensors do."""
    from safetensors.torch import save  # here, because torch is slow to import

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write_whole(path, save(whole, dict(metadata or {"format": "pt"})), "tensors")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines (without their line ends) to a file; on the device when this returns."""
    if not ranks.is_first():
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        point("lines: before")
        with path.open("ab") as stream:
            _put(stream, "".join(f"{line}\n" for line in lines).encode("utf-8"), "lines")
        if new:
            _sync_names(path.parent)
        point("lines: written")


def finish_lines(path: Path, is_whole: Callable[[bytes], bool]) -> None:
    """Make a file of lines end with a whole line, so that lines can be appended. For its writer alone:
    next to another writer it could cut the line that this one is in the middle of.

    A last line without its end gets one if `is_whole` says so, and is cut off otherwise.
    """
    if not ranks.is_first():
        return
    with writing(path), path.open("r+b") as stream:
        begin = _last_line(stream)
        stream.seek(begin)
        rest = stream.read()
        if not rest:
            return
        if is_whole(rest):
            stream.write(b"\n")
        else:
            stream.truncate(begin)
        stream.flush()
        os.fsync(stream.fileno())


def remove(path: Path) -> None:
    """Remove a file or folder if it is there; a folder loses its name before its files."""
    if not ranks.is_first():
        return
    gone = path.with_name(f".{path.name}.gone")
    with writing(path, "removed"):
        point("remove: before")
        _delete(gone)  # of a removal that was interrupted
        if path.exists():
            path.replace(gone)
            _sync_names(path.parent)
            point("remove: half")
            _delete(gone)
        point("remove: done")


def set_aside(path: Path) -> Path:
    """Give a damaged file another name, which is returned, so that a new one can be written."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    move(path, aside)
    return aside


def move(path: Path, to: Path) -> None:
    """Give a file another name on the same disk, in one step."""
    if not ranks.is_first():
        return
    with writing(path, "renamed"):
        to.parent.mkdir(parents=True, exist_ok=True)
        path.replace(to)
        for folder in {path.parent, to.parent}:
            _sync_names(folder)


@contextlib.contextmanager
def writing(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn the system's error of a failed write of `path` into a UserError."""
    try:
        yield
    except OSError as problem:
        remedy = REMEDIES.get(problem.errno or 0, "fix that")
        raise _refused(path, verb, problem.strerror or str(problem), remedy) from None
    except SafetensorError as problem:
        raise _refused(path, verb, str(problem), "free space on the disk") from None


def _refused(path: Path, verb: str, problem: str, remedy: str) -> UserError:
    return UserError(
        f"{path} cannot be {verb}: {problem}; everything finished so far is kept, so {remedy} and run "
        "the same command again"
    )


def _write_whole(path: Path, content: bytes, kind: str) -> None:
    if not ranks.is_first():
        return
    scratch = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        point(f"{kind}: before")
        try:
            with scratch.open("wb") as stream:
                _put(stream, content, kind)
            point(f"{kind}: before rename")
            scratch.replace(path)
            _sync_names(path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                scratch.unlink()  # a full disk needs the space
            raise
        point(f"{kind}: renamed")


def _sync_names(folder: Path) -> None:
    """Put a folder's names on the device: a file's own flush does not say under which name it lies.

    Where the system cannot flush a folder (Windows, some network disks), names are as safe as it makes them.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _put(stream: BinaryIO, content: bytes, kind: str) -> None:
    """Write and flush to the device, with a fault point at the half."""
    view, half = memoryview(content), len(content) // 2
    stream.write(view[:half])
    stream.flush()
    point(f"{kind}: half")
    stream.write(view[half:])
    stream.flush()
    os.fsync(stream.fileno())


def _last_line(stream: BinaryIO) -> int:
    """Where the line without an end begins; the file's length when there is none."""
    end = stream.seek(0, os.SEEK_END)
    while end:
        begin = max(end - BLOCK, 0)
        stream.seek(begin)
        at = stream.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
