"""Hidden states as SpecForge keeps them, which are pickles.

    FOLDER/rows_{a}-{b}/data_{row}.ckpt[.gz]    torch dict: input_ids [S], loss_mask [S],
                                                aux_hidden_state [1, S, L*H], hidden_state [1, S, H]

The last state is the one after the final norm. Its trainer's layer id k is the output of layer k,
hs[k+1] here; the files do not say which layers they hold. Opening a pickle can run code of whoever
made it, so it takes a flag, and then a loader that accepts nothing but tensors.

Facts from SpecForge a6b6b023 (scripts/prepare_hidden_states.py, algorithms/eagle3/data.py).

Shapes: S tokens of a row, L aux layers, H target hidden size.
"""

from __future__ import annotations

import gzip
import io
import pickle
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import write_bytes
from ..core.records import Answer
from .rows import FeatureRows, answer_of, loss_mask, row_tokens
from .writer import FeatureWriter

PER_FOLDER = 2000
KEYS = ("input_ids", "loss_mask", "aux_hidden_state", "hidden_state")
HEADER = 2600
"""Bytes of a file that are no tensors, about."""


def recognises(folder: Path) -> bool:
    return bool(_files(folder))


class SpecForgeRows(FeatureRows):
    """The rows of a SpecForge folder."""

    layout = "specforge"
    pre_norm = False

    def __init__(self, folder: Path, aux_layers: Sequence[int], *, unpickle: bool = False):
        """`aux_layers` are the hs[] indices that the files hold. Raises UserError without `unpickle`."""
        self.folder, self.aux_layers = folder, tuple(aux_layers)
        self._paths = _files(folder)
        if not unpickle:
            raise UserError(
                f"{folder} holds SpecForge's features, which are pickles ({self._paths[0].name}). Opening "
                "a pickle can run code of whoever made it; if you trust it, say so with --allow-pickle"
            )
        # A batch asks for a few rows, and for each of them once.
        self._load = lru_cache(4)(_load)
        first = self._load(self._paths[0])
        self.dtype, self.hidden_size = first["hidden_state"].dtype, first["hidden_state"].shape[-1]
        width = first["aux_hidden_state"].shape[-1]
        if width != len(self.aux_layers) * self.hidden_size:
            raise UserError(
                f"{self._paths[0]}: aux_hidden_state is {width} wide, {width / self.hidden_size:g} layers of "
                f"hidden size {self.hidden_size}; got {len(self.aux_layers)} aux layers ({', '.join(map(str, self.aux_layers))}). "
                "Name the layers with --aux-layers in hs[] numbers: SpecForge's layer id k is hs[k+1]"
            )

    @cached_property
    def tokens(self) -> list[np.ndarray[Any, Any]]:  # type: ignore[override]
        return [_load(path)["input_ids"].view(-1).numpy() for path in self._paths]

    def states(self, row: int, stop: int | None = None) -> Tensor:
        found = self._load(self._paths[row])
        aux, last = (found[key].reshape(len(self.tokens[row]), -1) for key in KEYS[2:])
        whole = torch.cat([aux, last], -1).view(
            len(aux), len(self.aux_layers) + 1, self.hidden_size
        )
        return whole[:stop]

    def answers(self) -> list[Answer]:
        rows = []
        for path in self._paths:
            found = _load(path)
            tokens, mask = (found[key].view(-1).tolist() for key in KEYS[:2])
            rows.append(answer_of(path.name.split(".")[0], tokens, mask))
        return rows


class SpecForgeWriter(FeatureWriter):
    """Writes a folder that SpecForge trains on offline."""

    def size(self) -> int:
        tokens = sum(self.lengths)
        return tokens * (self.about.token_bytes + 8) + HEADER * len(self.answers)

    def present(self) -> int:
        return sum(path.stat().st_size for path in _files(self.folder))

    def has(self, group: int) -> bool:
        return all(self._path(row).is_file() for batch in self.groups[group] for row in batch)

    def write(self, group: int, states: dict[int, Tensor]) -> None:
        for row, one in states.items():
            content = {
                "input_ids": torch.from_numpy(row_tokens(self.answers[row])),
                "loss_mask": torch.tensor(loss_mask(self.answers[row])),
                "aux_hidden_state": one[:, :-1].reshape(1, len(one), -1).clone(),
                "hidden_state": one[None, :, -1].clone(),
            }
            held = io.BytesIO()
            torch.save(content, held)
            write_bytes(self._path(row), held.getvalue())

    def finish(self, witness: Callable[[], Mapping[str, Tensor]]) -> None:
        """Each file is whole in itself, and this layout has no manifest."""

    def _path(self, row: int) -> Path:
        begin = row // PER_FOLDER * PER_FOLDER
        return self.folder / f"rows_{begin}-{begin + PER_FOLDER}" / f"data_{row}.ckpt"


def _files(folder: Path) -> list[Path]:
    found = [
        p for p in folder.glob("rows_*/data_*.ckpt*") if p.name.endswith((".ckpt", ".ckpt.gz"))
    ]
    return sorted(found, key=lambda p: int(re.findall(r"\d+", p.name)[0]))


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, through the loader that refuses everything else."""
    try:
        if path.suffix == ".gz":
            raw = io.BytesIO(gzip.decompress(path.read_bytes()))
            found = torch.load(raw, map_location="cpu", weights_only=True)
        else:  # mapped: what is not looked at is not read
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, zlib.error) as problem:
        raise UserError(f"{path} cannot be read: {problem}; copy it again") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError) as problem:
        reason = str(problem).strip().splitlines()[0][:200]
        raise UserError(
            f"{path}: refused, or not a whole file: a pickle may hold tensors and nothing else ({reason})"
        ) from None
    if not isinstance(found, dict) or any(not isinstance(found.get(k), Tensor) for k in KEYS):
        raise UserError(f"{path}: expected the tensors {', '.join(KEYS)}")
    return found
