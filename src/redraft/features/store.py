"""The feature store: shards of safetensors, an index of their rows, and a manifest that comes last.

    STORE/  about.json              what the store is of, written first: another job is not continued
            answers.jsonl           the rows, an ordinary answers file
            shard-00000.safetensors token_ids [N], hidden_states [N, L+1, H], rows one after another
            shards.jsonl            a line for each whole shard: size, SHA-256, and its rows
            witness.safetensors     some of the target's own logits, for readers to check theirs by
            manifest.json           about.json again, counts, and hashes of the files above

Whoever is interrupted continues after the last whole shard. A reader checks the small files and the
shards' sizes when it opens a store, and each row's CRC-32 when it first reads it: a store of
terabytes is never read for its checksums alone, unless `check` is asked to.

Shapes: N tokens of a shard, S of a row, L aux layers, H target hidden size.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.errors import UserError
from ..core.failpoints import point
from ..core.files import (
    append_lines,
    remove,
    write_bytes,
    write_tensors,
    write_text,
)
from ..core.folders import read_file, read_json
from ..core.records import Answer, versions
from ..core.renamed import with_today_keys
from .rows import STATES, TOKENS, FeatureRows, row_tokens
from .writer import FeatureAbout, FeatureWriter, lines_of

FORMAT = 1
ABOUT, ANSWERS, SHARDS, WITNESS = (
    "about.json",
    "answers.jsonl",
    "shards.jsonl",
    "witness.safetensors",
)
MANIFEST = "manifest.json"
HEADER, ROW = 400, 35
"""Bytes of a shard, and of a row in the index, that are no tensors, about."""


class StoreWriter(FeatureWriter):
    """Writes a store, or continues one."""

    claim = ABOUT

    def __init__(self, folder: Path, about: FeatureAbout, answers: Sequence[Answer]):
        super().__init__(folder, about, answers)
        most = max(int(about.shard_mb * 1e6) // about.token_bytes, 1)
        self.groups = []
        filled = most
        for batch in self.batches:
            tokens = sum(self.lengths[row] for row in batch)
            if filled + tokens > most:
                self.groups.append([])
                filled = 0
            self.groups[-1].append(batch)
            filled += tokens
        self._done = self._read_done()

    def begin(self) -> None:
        super().begin()
        if all(map(self.has, range(len(self.groups)))) and (self.folder / MANIFEST).is_file():
            return
        remove(self.folder / MANIFEST)  # of a finished store that lost a shard
        write_text(self.folder / ANSWERS, lines_of(self.answers))
        lines = "".join(f"{json.dumps(line)}\n" for line in self._done.values())
        write_text(self.folder / SHARDS, lines)

    def size(self) -> int:
        listed = len(lines_of(self.answers)) + ROW * len(self.answers)
        return sum(self.lengths) * self.about.token_bytes + listed + HEADER * len(self.groups)

    def present(self) -> int:
        return sum(line["bytes"] for line in self._done.values())

    def has(self, group: int) -> bool:
        return _shard(group) in self._done

    def write(self, group: int, states: dict[int, Tensor]) -> dict[str, Any]:
        tokens = [torch.from_numpy(row_tokens(self.answers[row])) for row in states]
        about = self.about
        shape = (sum(map(len, tokens)), len(about.aux_layers) + 1, about.hidden_size)
        whole = torch.empty(shape, dtype=about.torch_dtype)
        rows, at = [], 0
        for row in list(states):
            one = states.pop(row)
            whole[at : at + len(one)] = one
            rows.append([row, at, len(one), _crc(one)])
            at += len(one)
        content = save(
            {TOKENS: torch.cat(tokens), STATES: whole}, {"aux_layers": json.dumps(about.aux_layers)}
        )
        name = _shard(group)
        write_bytes(self.folder / name, content)
        point("features: shard written")
        return {"file": name, "bytes": len(content), "sha256": _sha256(content), "rows": rows}

    def note(self, written: dict[str, Any]) -> None:
        append_lines(self.folder / SHARDS, [json.dumps(written)])
        self._done[written["file"]] = written
        point("features: shard listed")

    def finish(self, witness: Callable[[], Mapping[str, Tensor]]) -> None:
        if (self.folder / MANIFEST).is_file():
            return
        logits = witness()
        if logits:
            write_tensors(self.folder / WITNESS, logits)
        companions = [name for name in (ANSWERS, SHARDS, WITNESS) if (self.folder / name).is_file()]
        manifest = {
            "format": FORMAT,
            **asdict(self.about),
            "samples": len(self.answers),
            "tokens": sum(self.lengths),
            "bytes": self.present(),
            "files": {name: _sha256((self.folder / name).read_bytes()) for name in companions},
            "versions": versions(),
        }
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")

    def _read_done(self) -> dict[str, dict[str, Any]]:
        """The lines of the shards that are whole."""
        path = self.folder / SHARDS
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        done = {}
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue  # a line cut short by an interruption: its shard is written again
            if _size(self.folder / found["file"]) == found["bytes"]:
                done[found["file"]] = found
        return done


class FeatureStore(FeatureRows):
    """A finished store, open for reading."""

    layout = "redraft"

    def __init__(self, folder: Path):
        """Raises UserError for a store that is unfinished, damaged, or of a newer redraft."""
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder}: no {MANIFEST}, which is written last: the store is unfinished. Run the same "
                "redraft features command again, it continues"
            )
        manifest = with_today_keys(read_json(folder / MANIFEST))
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder / MANIFEST}: format {manifest.get('format')}, this redraft reads {FORMAT}"
            )
        try:
            fields = {name: manifest[name] for name in FeatureAbout.__dataclass_fields__}
            self.about = FeatureAbout(**{**fields, "aux_layers": tuple(fields["aux_layers"])})
            self._files = dict(manifest["files"])
        except (KeyError, TypeError) as problem:
            raise UserError(f"{folder / MANIFEST} is damaged: no usable {problem}") from None
        self.aux_layers, self.pre_norm = self.about.aux_layers, self.about.pre_norm
        self.dtype, self.hidden_size = self.about.torch_dtype, self.about.hidden_size
        self._check_small_files()
        with (folder / ANSWERS).open(encoding="utf-8") as lines:
            self.tokens = [row_tokens(Answer.from_line(line)).astype(np.int32) for line in lines]
        self._checked: set[int] = set()

    def answers(self) -> list[Answer]:
        with (self.folder / ANSWERS).open(encoding="utf-8") as lines:
            return [Answer.from_line(line) for line in lines]

    def states(self, row: int, stop: int | None = None) -> Tensor:
        file, begin, length, crc = self._rows[row]
        fresh = row not in self._checked  # then all of it is read, once
        end = begin + (length if fresh or stop is None else stop)
        try:
            with safe_open(self.folder / file, framework="pt") as stream:
                found: Tensor = stream.get_slice(STATES)[begin:end]
        except (OSError, SafetensorError) as problem:
            raise UserError(_damaged(self.folder / file, str(problem))) from None
        if fresh and _crc(found) != crc:
            raise UserError(
                _damaged(self.folder / file, f"row {row} has another checksum than listed")
            )
        self._checked.add(row)
        return found[:stop]

    def witness(self) -> dict[str, Tensor]:
        """What the target itself logits at some positions (see `StoredTarget`); empty where not known."""
        path = self.folder / WITNESS
        return read_file(path) if path.is_file() else {}

    def shards(self) -> int:
        return len(self._lines)

    def check(self) -> Iterator[str]:
        """Read every shard whole and compare its hash; yields the name of each that agrees."""
        for line in self._lines:
            digest = hashlib.sha256()
            with (self.folder / line["file"]).open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
            if digest.hexdigest() != line["sha256"]:
                raise UserError(_damaged(self.folder / line["file"], "its SHA-256 differs"))
            yield line["file"]

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        text = (self.folder / SHARDS).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @cached_property
    def _rows(self) -> dict[int, tuple[str, int, int, int]]:
        return {
            row: (line["file"], begin, length, crc)
            for line in self._lines
            for row, begin, length, crc in line["rows"]
        }

    def _check_small_files(self) -> None:
        for name, known in self._files.items():
            path = self.folder / name
            if not path.is_file() or _sha256(path.read_bytes()) != known:
                raise UserError(
                    f"{path} is {'not as the manifest says' if path.is_file() else 'missing'}: a damaged "
                    "copy of the store; copy it again"
                )
        for line in self._lines:
            size = _size(self.folder / line["file"])
            if size != line["bytes"]:
                got = "missing" if size is None else f"{size:,} bytes"
                raise UserError(
                    _damaged(self.folder / line["file"], f"expected {line['bytes']:,} bytes, {got}")
                )


def _shard(group: int) -> str:
    return f"shard-{group:05d}.safetensors"


def _damaged(path: Path, how: str) -> str:
    return (
        f"{path} is damaged ({how}); copy it again, or remove it and run the same redraft "
        "features command again, which writes only what is missing"
    )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _crc(states: Tensor) -> int:
    raw = states.detach().cpu().contiguous().view(-1)
    content: Any = raw.view(torch.uint8).numpy()
    return zlib.crc32(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
