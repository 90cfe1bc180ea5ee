"""Rows of a prompts file, one after the other: memory does not grow with the file.

JSON lines, a JSON list (also under a key of an object), Parquet, the first two also gzipped and in
UTF-16 or UTF-32; a data set on the Hugging Face Hub is read from the Parquet files that the Hub keeps of
it. What a file holds is told by its first bytes. A row that cannot be read costs itself alone.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from ..core.encodings import encoding_of
from ..core.errors import UserError
from ..core.hub import OTHER_FILES, dataset_files, looks_like_hub
from .json_items import BLOCK, items

Read = Iterator[tuple[int, Any]]
"""Rows and their numbers, from 1; in place of a row that cannot be read, the ValueError that says why."""
PARQUET_ROWS = 256
GZIP, PARQUET, BOM = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
PACKED = {
    b"\x28\xb5\x2f\xfd": "packed with Zstandard",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"ARROW1": "an Arrow file",
}
UNDER_A_KEY = re.compile(
    rb'\s*\{\s*(?:"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[-+.\w]+)\s*,\s*)*'
    rb'"(?:data|rows|train|dataset|examples|instances|samples|items|records|prompts|questions)"\s*:\s*\[(?=\s*\{)'
)
"""An object that holds the rows as a list of objects under one of its keys."""


def read_rows(source: str) -> Read:
    """The rows of a file, or of a data set on the Hub (`owner/name`, `owner/name:config/split`).

    Raises UserError when there is no such file, when it is of another kind, or when it cannot be read to
    its end.
    """
    if looks_like_hub(source):
        files = (_of_file(path) for path in dataset_files(source))
        yield from enumerate((row for rows in files for _, row in rows), 1)
        return
    if not Path(source).is_file():
        found = "a folder; name a file in it" if Path(source).is_dir() else "no such file"
        raise UserError(
            f"prompts {source}: {found}; expected JSONL, JSON (both optionally .gz), Parquet, "
            "or a data set on the Hub as owner/name[:config/split]"
        )
    yield from _of_file(Path(source))


def _of_file(path: Path) -> Read:
    try:
        yield from _rows(path)
    except (OSError, EOFError, zlib.error) as problem:
        raise UserError(f"prompts {path} could not be read to the end: {problem}") from None


def _rows(path: Path) -> Read:
    with path.open("rb") as stream:
        magic = stream.read(8)
    if magic.startswith(PARQUET) or path.suffix.lower() == ".parquet":
        return _parquet(path)
    for sign, what in PACKED.items():
        if magic.startswith(sign):
            raise UserError(f"prompts {path} is {what}; unpack or convert it to JSONL or Parquet")
    head = _head(path)
    begin = head.lstrip()
    kind = next((s for s in path.suffixes[-2:] if s.lower() in OTHER_FILES), None)
    if kind and begin[:1] not in (b"{", b"["):
        raise UserError(
            f"prompts {path}: {kind} files are not read; convert it to JSONL (one JSON object a line) or "
            "Parquet, for a table for example with pandas: read_csv(...).to_json('prompts.jsonl', "
            "orient='records', lines=True)"
        )
    lines = [line.rstrip() for line in begin.split(b"\n")[:2]]
    whole = [not isinstance(_row(line), ValueError) for line in lines]
    if (found := UNDER_A_KEY.match(head)) and not (whole[0] and any(lines[1:])):
        return _json_items(path, found.end())
    if re.match(rb"\[\s*[{\]]", begin) or (begin.startswith(b"[") and not whole[0]):
        return _json_items(path, head.index(b"[") + 1)
    spread = begin.startswith(b"{") and lines[0].endswith((b"{", b"[", b",", b":"))
    if spread and len(lines) == 2 and not any(whole):
        return _json_items(path, None)
    return _json_lines(path)


def _head(path: Path) -> bytes:
    """The begin of the text, as far as it can be read: reading the rows says what is wrong."""
    head = b""
    with _open(path) as stream, contextlib.suppress(OSError, EOFError, zlib.error):
        while len(head) < BLOCK and (more := stream.read1(BLOCK)):
            head += more
    return head


def _open(path: Path) -> io.BufferedReader:
    """The text of a file in UTF-8 without a byte order mark, whatever it is stored in."""
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
    stream = cast("io.BufferedReader", gzip.open(path) if packed else path.open("rb"))  # noqa: SIM115
    head = stream.read(4)
    stream.seek(len(BOM) if head.startswith(BOM) else 0)
    encoding = encoding_of(head)
    return stream if encoding == "utf-8-sig" else io.BufferedReader(_Utf8(stream, encoding))


codecs.register_error("redraft.no_character", lambda problem: ("\udcff", problem.end))  # type: ignore[attr-defined]


class _Utf8(io.RawIOBase):
    """A stream in another encoding, as UTF-8. What is no character is no UTF-8 either, and its row fails."""

    def __init__(self, stream: IO[bytes], encoding: str):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("redraft.no_character")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self._ready:
            block = self._stream.read(BLOCK)
            text = self._decoder.decode(block, final=not block)
            self._ready = text.encode("utf-8", "surrogatepass")
            if not block:
                break
        taken = self._ready[: len(into)]
        into[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _json_lines(path: Path) -> Read:
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            yield number, _row(line)


def _json_items(path: Path, begin: int | None) -> Read:
    """The values of a list that begins after so many bytes, or (None) the objects of the whole file."""
    with _open(path) as stream:
        stream.read(begin or 0)
        number = 0
        try:
            for number, value in enumerate(items(stream, in_list=begin is not None), 1):
                yield number, _row(value)
        except ValueError as problem:  # of what follows the list
            yield number + 1, problem


def _row(raw: bytes) -> Any:
    try:
        return _parsed(raw)
    except ValueError as problem:
        return problem


def _parsed(raw: bytes) -> Any:
    """A JSON value. Raises ValueError in words for a person."""
    try:
        return DECODER.decode(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"byte {problem.start + 1} of the row is not valid in UTF-8, or in the file's own encoding"
        ) from None
    except json.JSONDecodeError as problem:
        empty = not raw.strip()
        raise ValueError(
            "the line is empty" if empty else f"not valid JSON: {problem.msg}"
        ) from None
    except RecursionError:
        raise ValueError("not readable: nested too deeply") from None
    except ValueError as problem:  # a number too long, a key twice
        raise ValueError(f"not readable: {str(problem).split(';')[0]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{max(names, key=names.count)}' is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _parquet(path: Path) -> Read:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"prompts {path}: reading Parquet needs pyarrow; pip install 'redraft[parquet]'"
        ) from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS)
        yield from enumerate((row for batch in batches for row in _of_batch(batch)), 1)
    except pyarrow.ArrowException as problem:
        raise UserError(f"prompts {path} could not be read to the end: {problem}") from None


def _of_batch(batch: Any) -> list[Any]:
    """The rows of an Arrow batch; where a value cannot be had (a text that is no UTF-8), each by itself."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as problem:
        if batch.num_rows == 1:
            return [ValueError(f"not readable: {problem}")]
        return [row for at in range(batch.num_rows) for row in _of_batch(batch.slice(at, 1))]
