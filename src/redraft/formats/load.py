"""`load_draft`: from a folder or Hub id to a draft, whatever kind and layout is stored there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drafts.base import Draft
from ..drafts.one_layer import LayerShape
from ..errors import UserError
from ..records import versions
from ..target import Target
from . import eagle, eagle3, speculators
from .card import model_card
from .exports import default_format, lay_out
from .folders import find_folder, read_json, read_tensors, state_hash, write_folder
from .padding import pad_ffn

PROVENANCE = "redraft.json"
BUILDERS: dict[str, Any] = {"eagle3": eagle3.build, "eagle": eagle.build}


@dataclass(frozen=True)
class StoredDraft:
    """A draft as it lies on disk: shape, tensors in their stored dtype, and where it came from."""

    folder: Path
    kind: str
    config: LayerShape
    tensors: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)

    def hash(self) -> str:
        return state_hash(self.tensors)

    def build(self, target: Target | None = None, dtype: torch.dtype | None = None) -> Draft:
        """A network computing in `dtype` (default: the target's, else as stored), bound to `target`."""
        if dtype is None:
            dtype = target.dtype if target is not None else self.tensors["fc.weight"].dtype
        draft: Draft = BUILDERS[self.kind](self.config, self.tensors, dtype)
        draft.source = str(self.folder)
        if target is not None:
            check_tokenizer(self, target)
            draft.bind(target)
        return draft

    def with_tensors(self, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> StoredDraft:
        """This draft with other tensors, whose FFN may be wider."""
        gate = next(t for name, t in tensors.items() if name.endswith("mlp.gate_proj.weight"))
        config = dataclasses.replace(self.config, intermediate_size=gate.shape[0])
        return dataclasses.replace(self, config=config, tensors=tensors, provenance=provenance)

    def save(self, folder: str | Path, format: str = "auto", tp: Sequence[int] = (1,)) -> None:
        """Write a stock checkpoint folder; `auto` is the kind's own layout for vLLM.

        `tp` are tensor-parallel sizes to be served with: the FFN is padded with exact zeros to a
        width that all of them divide. Raises UserError, before anything is written, for a format
        that the draft does not fit.
        """
        shape, padded = pad_ffn(self.config, self.tensors, tp)
        name = default_format(self.kind) if format == "auto" else format
        made_for = str(self.provenance.get("target", "not recorded"))
        config, tensors = lay_out(name, self.kind, shape, padded, made_for)
        config["torch_dtype"] = str(tensors["fc.weight"].dtype).removeprefix("torch.")
        record = {**self.provenance, "format": name, "tensors_hash": state_hash(padded)}
        neurons = shape.intermediate_size - self.config.intermediate_size
        if neurons:
            record["zero_neurons"] = neurons
        files = {
            "README.md": model_card(self.kind, name, shape, record),
            PROVENANCE: json.dumps(record, indent=2) + "\n",
            "config.json": json.dumps(config, indent=2) + "\n",
        }
        write_folder(Path(folder), tensors, files)


def stored(draft: Draft, target: Target) -> StoredDraft:
    """A draft made in memory, as it would be read back from a folder."""
    tensors = {name: t.cpu() for name, t in draft.stored_state().items()}
    return StoredDraft(Path("(memory)"), draft.kind, draft.config, tensors, made_for(target))


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
    kind, _, parse = recognise(raw, stored, folder)
    config, named = parse(raw, stored, folder)
    record = folder / PROVENANCE
    provenance = read_json(record) if record.is_file() else {}
    found = StoredDraft(folder, kind, config, named, provenance)
    recorded = provenance.get("tensors_hash")
    if recorded is not None and recorded != found.hash():
        raise UserError(
            f"{folder}: the weights hash to {found.hash()}, but {PROVENANCE} records {recorded}: a "
            f"damaged copy, or edited since redraft wrote it. Copy it again, or remove {PROVENANCE} "
            "to take it as it is"
        )
    return found


def recognise(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[str, str, Any]:
    """Kind, layout and parser of a checkpoint. Raises UserError naming what it is instead."""
    names = set(tensors)
    if speculators.recognises(raw):
        return "eagle3", "speculators", speculators.parse
    if any("block_sparse_moe" in name for name in names):
        raise UserError(
            f"{folder}: a draft of routed shared and private experts (block_sparse_moe), as EDA's "
            "reference code writes it; redraft reads plain EAGLE drafts and does not run its routers"
        )
    if eagle3.recognises(raw, names):
        return "eagle3", "eagle3", eagle3.parse
    if eagle.recognises(names):
        return "eagle", "eagle", eagle.parse
    what = "a whole language model" if "model.embed_tokens.weight" in names else "no draft"
    raise UserError(
        f"{folder}: architectures {raw.get('architectures')} with {len(names)} tensors is {what}; "
        "redraft reads EAGLE-1/2 and EAGLE-3 drafts as SafeAILab, SpecForge, speculators, vLLM and "
        "SGLang store them"
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
    recorded = stored.provenance.get("tokenizer_hash")
    if target.tokenizer is None:
        return  # a bare model, in whose `generate` the draft runs
    if recorded is not None and recorded != target.tokenizer_hash():
        raise UserError(
            f"tokenizers differ: {stored.folder} was made for tokenizer {recorded}, target "
            f"{target.name} has {target.tokenizer_hash()}; token ids would mean other words"
        )
