"""Hidden states as speculators keeps them, and as vLLM captures them for it.

    FOLDER/hidden_states/hs_{row}.safetensors   token_ids int64 [S], hidden_states [S, L+1, H]
    FOLDER/data-00000-of-00001.arrow            input_ids, loss_mask, seq_len: one line per row
           dataset_info.json, state.json        (a dataset of the `datasets` library)

The states are those of the layers that were asked for, then the one before the final norm. Layer ids
are vLLM's, of which id k is hs[k] for k < n, and id n the state before the final norm. The files do
not say which layers they hold, so whoever reads them has to. What a running vLLM captures (method
extract_hidden_states, ExampleHiddenStatesConnector) are the same files, under names of requests and
without a dataset.

Facts from speculators c05b95b3 (train/data.py, data_generation/offline.py) and vLLM 0.32.0
(example_hidden_states_connector.py); the layer ids measured against a capture.

Shapes: S tokens of a row, L aux layers, H target hidden size.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import UserError
from ..core.files import write_bytes, write_tensors, write_text
from ..core.records import Answer
from .rows import (
    STATES,
    TOKENS,
    FeatureRows,
    answer_of,
    loss_mask,
    row_tokens,
)
from .writer import FeatureAbout, FeatureWriter

ARROW = "data-00000-of-00001.arrow"
CACHE = "hidden_states"
PREFIX = "hs_"
HEADER = 200
"""Bytes of a file that are no tensors, about."""


def recognises(folder: Path) -> bool:
    return bool(_files(folder))


class SpeculatorsRows(FeatureRows):
    """The rows of a speculators folder, of its hidden_states folder, or of a vLLM capture."""

    layout = "speculators"
    pre_norm = True

    def __init__(self, folder: Path, aux_layers: Sequence[int]):
        """`aux_layers` are the hs[] indices (equal to vLLM's layer ids) that the files hold, ascending.

        Raises UserError for files of another shape, and for damaged ones.
        """
        self.folder, self.aux_layers = folder, tuple(aux_layers)
        self._paths = _files(folder)
        with _opened(self._paths[0]) as stream:
            shape = stream.get_slice(STATES).get_shape()
            self.dtype = stream.get_slice(STATES)[:0].dtype
        if len(shape) != 3 or shape[1] != len(self.aux_layers) + 1:
            raise UserError(
                f"{self._paths[0]}: {STATES} of shape {shape}; expected [tokens, {len(self.aux_layers) + 1}, "
                f"hidden size] for the layers {', '.join(map(str, self.aux_layers)) or '(none)'} and the last "
                "state. The files do not say which layers they hold: name them with --aux-layers, in vLLM's "
                "numbers and without the last"
            )
        self.hidden_size = shape[2]

    @cached_property
    def tokens(self) -> list[np.ndarray[Any, Any]]:  # type: ignore[override]
        return [self._read(path, TOKENS).numpy() for path in self._paths]

    def states(self, row: int, stop: int | None = None) -> Tensor:
        return self._read(self._paths[row], STATES, stop)

    def answers(self) -> list[Answer]:
        path = next((p for p in _arrow_files(self.folder)), None)
        if path is None:
            raise UserError(
                f"{self.folder} has no dataset ({ARROW}) whose loss masks say where the answers are; "
                "name the answers that were captured with --answers"
            )
        masks = [mask for file in _arrow_files(self.folder) for mask in _read_masks(file)]
        found = []
        for path, tokens in zip(self._paths, self.tokens, strict=True):
            row = int(path.stem.removeprefix(PREFIX))
            if row >= len(masks):
                raise UserError(f"{path}: the dataset next to it has {len(masks)} rows only")
            found.append(answer_of(f"row-{row}", tokens.tolist(), masks[row]))
        return found

    @staticmethod
    def _read(path: Path, name: str, stop: int | None = None) -> Tensor:
        with _opened(path) as stream:
            try:
                found: Tensor = stream.get_slice(name)[:stop]
            except SafetensorError as problem:
                raise UserError(f"{path} is damaged or has no {name}: {problem}") from None
        return found


class SpeculatorsWriter(FeatureWriter):
    """Writes a folder that speculators trains on. Needs pyarrow, for the dataset."""

    def __init__(self, folder: Path, about: FeatureAbout, answers: Sequence[Answer]):
        _arrow()  # refused before anything is read
        super().__init__(folder, about, answers)

    def size(self) -> int:
        tokens = sum(self.lengths)
        files = HEADER * len(self.answers)
        return tokens * (self.about.token_bytes + 16) + files

    def present(self) -> int:
        return sum(p.stat().st_size for p in (self.folder / CACHE).glob(f"{PREFIX}*.safetensors"))

    def has(self, group: int) -> bool:
        return all(self._path(row).is_file() for batch in self.groups[group] for row in batch)

    def write(self, group: int, states: dict[int, Tensor]) -> None:
        import torch

        for row, one in states.items():
            tokens = torch.from_numpy(row_tokens(self.answers[row]))
            write_tensors(self._path(row), {STATES: one, TOKENS: tokens}, {})

    def finish(self, witness: Callable[[], Mapping[str, Tensor]]) -> None:
        pa: Any = _arrow()
        columns = {
            "input_ids": [row_tokens(a).tolist() for a in self.answers],
            "loss_mask": [loss_mask(a) for a in self.answers],
            "seq_len": self.lengths,
        }
        long = pa.list_(pa.int64())
        schema = pa.schema([("input_ids", long), ("loss_mask", long), ("seq_len", pa.int64())])
        table, sink = pa.table(columns, schema=schema), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as stream:
            stream.write_table(table)
        write_bytes(self.folder / ARROW, sink.getvalue().to_pybytes())
        write_text(self.folder / "dataset_info.json", "{}\n")
        state: dict[str, Any] = {
            "_data_files": [{"filename": ARROW}],
            "_fingerprint": "redraft",
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": "torch",
            "_output_all_columns": False,
            "_split": None,
        }
        write_text(self.folder / "state.json", json.dumps(state, indent=2) + "\n")

    def _path(self, row: int) -> Path:
        return self.folder / CACHE / f"{PREFIX}{row}.safetensors"


def _files(folder: Path) -> list[Path]:
    """The files of states: hs_{row} in the order of rows, or those of a capture by name."""
    for place in (folder / CACHE, folder):
        cached = [p for p in place.glob(f"{PREFIX}*.safetensors") if p.stem[3:].isdigit()]
        if cached:
            return sorted(cached, key=lambda p: int(p.stem[3:]))
    return sorted(p for p in folder.glob("*.safetensors") if _captured(p))


def _captured(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as stream:
            return (
                set(stream.keys()) == {TOKENS, STATES}
                and len(stream.get_slice(STATES).get_shape()) == 3
            )
    except (OSError, SafetensorError):
        return False


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as problem:
        raise UserError(
            f"{path} is not a whole safetensors file ({problem}); capture it again"
        ) from None


def _arrow_files(folder: Path) -> list[Path]:
    for place in (folder, folder.parent):
        if found := sorted(place.glob("data-*.arrow")):
            return found
    return []


def _read_masks(path: Path) -> list[list[int]]:
    pa: Any = _arrow()
    try:
        with pa.OSFile(str(path), "rb") as file:
            table = pa.ipc.open_stream(file).read_all()
        masks: list[list[int]] = table.column("loss_mask").to_pylist()
    except (pa.ArrowInvalid, KeyError, OSError) as problem:
        raise UserError(f"{path}: expected a dataset with a column loss_mask ({problem})") from None
    return masks


def _arrow() -> Any:
    try:
        pa: Any = importlib.import_module("pyarrow")
        importlib.import_module("pyarrow.ipc")
    except ImportError:
        raise UserError(
            "the dataset of loss masks in speculators' layout needs pyarrow: pip install 'redraft[parquet]'"
        ) from None
    return pa
