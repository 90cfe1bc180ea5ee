"""`load_draft`: from a folder or Hub id to a draft, whatever kind is stored there."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drafts.base import Draft
from ..drafts.eagle3 import Eagle3Config, Eagle3Draft
from ..errors import UserError
from ..records import versions
from ..target import Target
from . import eagle3
from .folders import find_folder, read_json, state_hash

PROVENANCE = "redraft.json"


@dataclass(frozen=True)
class StoredDraft:
    """A draft as it lies on disk: shape, tensors in their stored dtype, and where it came from."""

    folder: Path
    config: Eagle3Config
    tensors: dict[str, Tensor]
    provenance: dict[str, Any]

    def hash(self) -> str:
        return state_hash(self.tensors)

    def build(self, target: Target | None = None, dtype: torch.dtype | None = None) -> Draft:
        """A network computing in `dtype` (default: the target's, else as stored), bound to `target`."""
        if dtype is None:
            dtype = target.dtype if target is not None else self.tensors["fc.weight"].dtype
        draft = eagle3.build(self.config, self.tensors, dtype)
        draft.source = str(self.folder)
        if target is not None:
            check_tokenizer(self, target)
            draft.bind(target)
        return draft

    def with_tensors(self, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> StoredDraft:
        """This draft with other tensors, whose FFN may be wider."""
        width = tensors["midlayer.mlp.gate_proj.weight"].shape[0]
        config = dataclasses.replace(self.config, intermediate_size=width)
        return StoredDraft(self.folder, config, tensors, provenance)

    def save(self, folder: str | Path, format: str = "eagle3") -> None:
        """Write a stock checkpoint folder. Raises UserError for a format that is not known."""
        if format != eagle3.FORMAT:
            raise UserError(f"unknown export format '{format}'; known: {eagle3.FORMAT}")
        record = json.dumps(self.provenance, indent=2) + "\n"
        eagle3.write(Path(folder), self.config, self.tensors, {PROVENANCE: record})


def stored(draft: Draft, target: Target) -> StoredDraft:
    """A draft made in memory, as it would be read back from a folder."""
    assert isinstance(draft, Eagle3Draft), "the only kind there is"
    tensors = {name: t.cpu() for name, t in draft.stored_state().items()}
    return StoredDraft(Path("(memory)"), draft.config, tensors, made_for(target))


def made_for(target: Target) -> dict[str, Any]:
    """The part of a draft's provenance that names its target."""
    return {
        "target": target.name,
        "target_fingerprint": target.fingerprint(),
        "tokenizer_hash": target.tokenizer_hash(),
        "template_hash": target.template_hash(),
        "versions": versions(),
    }


def read_draft(source: str) -> StoredDraft:
    """A stored draft from a folder or Hub id. Raises UserError when it is none that redraft knows."""
    folder = find_folder(source)
    raw = read_json(folder / "config.json")
    if not eagle3.recognises(raw):
        raise UserError(
            f"{folder}: architectures {raw.get('architectures')} is no draft layout that redraft "
            f"reads; expected {eagle3.ARCHITECTURE}"
        )
    config, tensors = eagle3.read(folder)
    record = folder / PROVENANCE
    return StoredDraft(folder, config, tensors, read_json(record) if record.is_file() else {})


def load_draft(
    source: str, target: Target | None = None, dtype: torch.dtype | None = None
) -> Draft:
    """Load a draft and bind it to its target.

    `dtype` defaults to the target's, as engines do. Raises UserError when the folder is not a
    draft, or when draft and target do not belong together.
    """
    return read_draft(source).build(target, dtype)


def check_tokenizer(stored: StoredDraft, target: Target) -> None:
    """Refuse a draft that records another tokenizer than the target's."""
    recorded = stored.provenance.get("tokenizer_hash")
    if recorded is not None and recorded != target.tokenizer_hash():
        raise UserError(
            f"tokenizers differ: {stored.folder} was made for tokenizer {recorded}, target "
            f"{target.name} has {target.tokenizer_hash()}; token ids would mean other words"
        )
