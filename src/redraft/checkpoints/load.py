"""`load_draft`: from a folder or Hub id to a draft, whatever kind and layout is stored there."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config_values import ConfigValues, architectures_of
from ..core.console import say
from ..core.errors import UserError
from ..core.folders import (
    find_folder,
    read_json,
    read_tensors,
    state_hash,
    write_folder,
)
from ..core.published import without_paths
from ..core.records import versions
from ..drafts import kinds
from ..drafts.base import Draft, token_count
from ..drafts.kind import DraftKind, Layout, Shape
from ..drafts.kinds import kind_named
from ..models.target import Target
from .exports import lay_out, layout_for
from .model_card import model_card
from .padding import pad_ffn
from .vocabulary_rows import grew, same_tokens

PROVENANCE = "redraft.json"
HASHES = ("tensors_hash", "tokenizer_hash", "template_hash", "target_fingerprint", "shared_hash")


@dataclass(frozen=True)
class StoredDraft:
    """A draft as it lies on disk: shape, tensors in their stored dtype, and where it came from.

    `companions` are files that its folder holds besides, by name; they are copied through.
    """

    folder: Path
    kind: str
    config: Shape
    tensors: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)
    companions: dict[str, bytes] = field(default_factory=dict)

    @property
    def row(self) -> DraftKind:
        """All that is special about its kind."""
        return kind_named(self.kind)

    def hash(self) -> str:
        return state_hash(self.tensors)

    def build(self, target: Target | None = None, dtype: torch.dtype | None = None) -> Draft:
        """A network computing in `dtype` (default: the target's, else as stored), bound to `target`."""
        if dtype is None:
            dtype = target.dtype if target is not None else _main_dtype(self.tensors)
        fitting = self if target is None else self.fitted(target)
        draft = self.row.build(fitting.config, fitting.tensors, dtype)
        draft.source = str(self.folder)
        if target is not None:
            check_tokenizer(self, target)
            draft.bind(target)
        return draft

    def fitted(self, target: Target) -> StoredDraft:
        """This draft with as many vocabulary rows as the target, where their tokens are the same ones
        (see `vocabulary_rows.py`); else unchanged, which `bind` refuses."""
        c, rows, with_rows_of = self.config, target.vocab_size, self.row.with_rows_of
        if with_rows_of is None or target.tokenizer is None or rows == c.vocab_size:
            return self
        recorded = self.tokenizer_hash
        if not same_tokens(target, c.vocab_size, recorded):
            return self
        config, tensors = with_rows_of(c, self.tensors, target)
        if recorded is None:
            say(
                f"{self.folder} records no tokenizer. It has {c.vocab_size} vocabulary rows, the target "
                f"{rows} for {token_count(target)} tokens: an id is taken to mean the same token in "
                f"both; {'surplus rows are cut' if c.vocab_size > rows else 'ids without a row are never proposed'}"
            )
        return dataclasses.replace(self, config=config, tensors=tensors)

    @property
    def tokenizer_hash(self) -> str | None:
        """The hash of the tokenizer that the draft was made for, where it is recorded."""
        found: str | None = self.provenance.get("tokenizer_hash")
        return found

    def with_tensors(self, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> StoredDraft:
        """This draft with other tensors, whose FFN may be wider."""
        gates = (t for name, t in tensors.items() if name.endswith("mlp.gate_proj.weight"))
        gate = next(gates, None)
        width = self.config.intermediate_size if gate is None else gate.shape[0]
        config = dataclasses.replace(self.config, intermediate_size=width)
        return dataclasses.replace(self, config=config, tensors=tensors, provenance=provenance)

    def with_vocabulary(self, rows: int) -> StoredDraft:
        """The draft with its own vocabulary padded with zeros to the target's `rows`, as engines want it.

        One without is returned unchanged. Raises UserError when it has more rows already.
        """
        if self.row.pad_vocabulary is None:
            return self
        config, tensors = self.row.pad_vocabulary(self.config, self.tensors, rows)
        return dataclasses.replace(self, config=config, tensors=tensors)

    def as_served(self, engine: str) -> StoredDraft:
        """This draft with the function that an engine computes from its files."""
        change = self.row.as_served.get(engine)
        return self if change is None else dataclasses.replace(self, config=change(self.config))

    def check_servable(self) -> None:
        """Raise UserError for a draft that no engine has a layer for."""
        if self.row.check_servable is not None:
            self.row.check_servable(self.config)

    def save(self, folder: str | Path, format: str = "auto", tp: Sequence[int] = (1,)) -> None:
        """Write a stock checkpoint folder; `auto` is the kind's own layout for vLLM.

        `tp` are tensor-parallel sizes to be served with: the FFN is padded with exact zeros to a
        width that all of them divide. The record names folders without their paths, as it may be
        published. Raises UserError, before anything is written, for a format that the draft does not fit.
        """
        self.check_servable()
        shape, padded = pad_ffn(self.config, self.tensors, tp)
        layout = layout_for(self.row, format)
        record: dict[str, Any] = without_paths(self.provenance)
        made_for = str(record.get("target", "not recorded"))
        config, tensors = lay_out(layout, self.row, shape, padded, made_for)
        config["torch_dtype"] = str(_main_dtype(tensors)).removeprefix("torch.")
        record |= {"format": layout.name, "tensors_hash": state_hash(padded)}
        neurons = shape.intermediate_size - self.config.intermediate_size
        if neurons:
            record["zero_neurons"] = neurons
        files: dict[str, str | bytes] = {
            **self.companions,
            "README.md": model_card(self.kind, layout, shape, record),
            PROVENANCE: json.dumps(record, indent=2) + "\n",
            "config.json": json.dumps(config, indent=2) + "\n",
        }
        write_folder(Path(folder), tensors, files)


def stored(draft: Draft, target: Target) -> StoredDraft:
    """A draft made in memory, as it would be read back from a folder."""
    tensors = {name: t.cpu() for name, t in draft.stored_state().items()}
    more_files: dict[str, bytes] = {}
    companions = kind_named(draft.kind).companions
    if companions is not None:
        with tempfile.TemporaryDirectory() as scratch:
            target.tokenizer.save_pretrained(scratch)
            more_files = companions(Path(scratch))
    return StoredDraft(
        Path("(memory)"), draft.kind, draft.config, tensors, made_for(target), more_files
    )


def made_for(target: Target) -> dict[str, Any]:
    """The part of a draft's provenance that names its target."""
    return {
        "target": target.name,
        "target_fingerprint": target.fingerprint(),
        "tokenizer_hash": target.tokenizer_hash(),
        "template_hash": target.template_hash(),
        "versions": versions(),
    }


def read_draft(source: str, *, unpickle: bool = False) -> StoredDraft:
    """A stored draft from a folder or Hub id.

    Raises UserError when it is none that redraft knows, computes a function that redraft does
    not, or is no longer what redraft once wrote. `unpickle` allows published `.bin` files.
    """
    folder = find_folder(source, unpickle=unpickle)
    raw = read_json(folder / "config.json")
    return interpret(folder, raw, read_tensors(folder, unpickle=unpickle))


def interpret(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredDraft:
    """The draft that config.json and tensors of a folder describe; raises as `read_draft` does."""
    stored = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")  # a buffer of old files; engines skip it too
    }
    kind, layout = recognise(raw, stored, folder)
    assert layout.parse is not None, "what is recognised is parsed"
    config, named = layout.parse(raw, stored, folder)
    record = folder / PROVENANCE
    provenance = _read_provenance(record) if record.is_file() else {}
    if layout.describe is not None:
        provenance["read_from"] = layout.describe(raw, stored, folder)
    more_files = {} if kind.companions is None else kind.companions(folder)
    found = StoredDraft(folder, kind.name, config, named, provenance, more_files)
    recorded = provenance.get("tensors_hash")
    if recorded is not None and recorded != found.hash():
        raise UserError(
            f"{folder}: the weights hash to {found.hash()}, but {PROVENANCE} records {recorded}: a "
            f"damaged copy, or edited since redraft wrote it. Copy it again, or remove {PROVENANCE} "
            "to read it unchanged"
        )
    return found


def _read_provenance(path: Path) -> dict[str, Any]:
    """redraft's own record of a folder. Raises UserError for one that it did not write so."""
    record = read_json(path)
    values = ConfigValues(record, str(path))
    for key in HASHES:
        values.text(key, "")
    values.inside("config")
    return record


def recognise(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[DraftKind, Layout]:
    """Kind and layout of a checkpoint. Raises UserError naming what it is instead."""
    for kind in kinds.KINDS:
        for layout in kind.layouts:
            if layout.recognise is not None and layout.recognise(raw, tensors, folder):
                return kind, layout
    raise UserError(
        f"{folder}: architectures {list(architectures_of(raw))} with {len(tensors)} tensors is no draft; "
        f"redraft reads {', '.join(kind.stored_as for kind in kinds.KINDS)}"
    )


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
    recorded = stored.tokenizer_hash
    if target.tokenizer is None:
        return  # a bare model, in whose `generate` the draft runs
    known = recorded in (None, target.tokenizer_hash())
    if not known and not grew(target, str(recorded)):
        raise UserError(
            f"tokenizers differ: {stored.folder} was made for tokenizer {recorded}, target "
            f"{target.name} has {target.tokenizer_hash()}; token ids would mean other words"
        )
    if stored.row.check_vocabulary is not None:
        stored.row.check_vocabulary(stored.folder, target)


def _main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that most of a draft's numbers are stored in."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    return counts.most_common(1)[0][0]
