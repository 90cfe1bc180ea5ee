"""Rows of a prompts file, one after the other: memory does not grow with the file.

JSONL, a JSON array, Parquet, the first two also gzipped; a data set on the Hugging Face Hub is
read from the Parquet files that the Hub keeps of it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, cast

from ..errors import UserError
from ..formats.hub import dataset_files, looks_like_hub

Read = Iterator[tuple[int, Any]]
"""Rows and their numbers, from 1; in place of a row that cannot be read, the ValueError that says why."""
PARQUET_ROWS = 256
BOM = b"\xef\xbb\xbf"


def read_rows(source: str) -> Read:
    """The rows of a file, or of a data set on the Hub (`owner/name`, `owner/name:config/split`).

    Raises UserError when there is no such file, or when it cannot be read to its end.
    """
    if looks_like_hub(source):
        files = (_of_file(path) for path in dataset_files(source))
        yield from enumerate((row for rows in files for _, row in rows), 1)
        return
    if not Path(source).is_file():
        raise UserError(
            f"prompts {source}: no such file; expected JSONL, JSON (both optionally .gz), Parquet, "
            "or a data set on the Hub as owner/name[:config/split]"
        )
    yield from _of_file(Path(source))


def _of_file(path: Path) -> Read:
    with closing(_reader(path)(path)) as rows:  # type: ignore[type-var]
        try:
            yield from rows
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as problem:
            raise UserError(f"prompts {path} could not be read to the end: {problem}") from None


def _reader(path: Path) -> Callable[[Path], Read]:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet
    if name.endswith(".json") and _begins_with(path, b"["):
        return _json_array
    return _json_lines


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _begins_with(path: Path, sign: bytes) -> bool:
    try:
        with _open(path) as stream:
            return stream.read(4096).removeprefix(BOM).lstrip(b" \t\r\n").startswith(sign)
    except (OSError, EOFError, zlib.error):
        return False  # reading it whole will say what is wrong


def _json_lines(path: Path) -> Read:
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            try:
                yield number, json.loads(text)
            except json.JSONDecodeError as problem:
                empty = not text.strip()
                reason = "the line is empty" if empty else f"not valid JSON: {problem.msg}"
                yield number, ValueError(reason)


def _json_array(path: Path) -> Read:
    import ijson

    with _open(path) as stream:
        if stream.read(len(BOM)) != BOM:
            stream.seek(0)
        try:
            yield from enumerate(ijson.items(stream, "item", use_float=True), 1)
        except ijson.JSONError as problem:
            raise UserError(f"prompts {path} could not be read to the end: {problem}") from None


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
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as problem:
        raise UserError(f"prompts {path} could not be read to the end: {problem}") from None
