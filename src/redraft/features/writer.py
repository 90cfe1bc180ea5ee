"""Writing features, in whatever layout: what they are of, whose folder it is, and what is there already."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import write_text
from ..core.folders import read_json
from ..core.records import Answer
from ..models.batching import plan_once

CLAIM = "redraft-features.json"
"""Written first into a folder of a foreign layout, whose own files do not say what they hold."""


@dataclass(frozen=True)
class FeatureAbout:
    """What features are of. `target_hash` is `Target.weights_hash`, the same wherever the target lies."""

    target: str
    target_hash: str
    tokenizer_hash: str
    layers: int
    hidden_size: int
    dtype: str
    aux_layers: tuple[int, ...]
    pre_norm: bool
    answers_hash: str
    shard_mb: float
    batch_tokens: int

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes, its id included."""
        return token_bytes(self.aux_layers, self.hidden_size, self.torch_dtype)


def token_bytes(aux_layers: Sequence[int], hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes that the features of one token take, its id included."""
    return (len(aux_layers) + 1) * hidden_size * dtype.itemsize + 8


class FeatureWriter(ABC):
    """Writes rows group by group; a group that is there already is left unchanged."""

    claim: ClassVar[str] = CLAIM
    groups: list[list[list[int]]]
    """Rows to hand over together, as batches to read one after another."""

    def __init__(self, folder: Path, about: FeatureAbout, answers: Sequence[Answer]):
        """Writes nothing yet. Raises UserError for a folder that holds something else."""
        self.folder, self.about, self.answers = folder, about, answers
        self._check_claim()
        self.lengths = [len(answer.prompt) + len(answer.tokens) for answer in answers]
        self.batches = plan_once(self.lengths, about.batch_tokens)
        self.groups = [[batch] for batch in self.batches]

    def begin(self) -> None:
        """Make the folder this job's: what it is of is written first."""
        text = json.dumps(asdict(self.about), indent=2) + "\n"
        if not (self.folder / self.claim).is_file():
            write_text(self.folder / self.claim, text)

    @abstractmethod
    def size(self) -> int:
        """Bytes that the finished folder will take, predicted."""

    @abstractmethod
    def present(self) -> int:
        """Bytes of what is there already and will be kept."""

    @abstractmethod
    def has(self, group: int) -> bool:
        """Whether a group is there already."""

    @abstractmethod
    def write(self, group: int, states: dict[int, Tensor]) -> dict[str, Any] | None:
        """Write the files of a group: the states [S, L+1, H] of its rows, by row; the mapping is used up.

        Returns what `note` is to note of it, if this layout keeps a list.
        """

    def note(self, written: dict[str, Any]) -> None:  # noqa: B027  most layouts keep no list
        """Note a group whose files are there, in the list of what is."""

    @abstractmethod
    def finish(self, witness: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write what makes the folder whole, last. `witness` gives what readers check their logits by,
        or nothing."""

    def _check_claim(self) -> None:
        path = self.folder / self.claim
        about = json.loads(json.dumps(asdict(self.about)))
        about.pop("target")  # by whatever path; `target_hash` identifies it
        if path.is_file():
            known = read_json(path)
            changed = sorted(key for key in about if known.get(key) != about[key])
            if changed:
                raise UserError(
                    f"{self.folder} holds features made with other {', '.join(changed)}; name another "
                    "folder, or remove it to write them again"
                )
            return
        others = [p.name for p in self.folder.glob("[!.]*")] if self.folder.is_dir() else ["a file"]
        if self.folder.exists() and others:
            raise UserError(
                f"--out {self.folder} holds other files ({', '.join(sorted(others)[:3])}); name an "
                "empty folder"
            )


def lines_of(answers: Sequence[Answer]) -> str:
    """An answers file as text."""
    return "".join(f"{answer.to_line()}\n" for answer in answers)


def answers_hash(answers: Sequence[Answer]) -> str:
    digest = hashlib.sha256()
    for answer in answers:
        digest.update(f"{answer.to_line()}\n".encode())
    return digest.hexdigest()[:16]
