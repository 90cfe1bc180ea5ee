"""The layouts that features are stored in: written by name, and read as their files tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UserError
from ..core.folders import read_json
from ..core.renamed import with_today_keys
from . import (
    specforge,
    speculators,
)
from .rows import FeatureRows
from .specforge import SpecForgeWriter
from .speculators import SpeculatorsWriter
from .store import ABOUT, MANIFEST, FeatureStore, StoreWriter
from .writer import CLAIM, FeatureWriter

WRITERS: dict[str, type[FeatureWriter]] = {
    "redraft": StoreWriter,
    "speculators": SpeculatorsWriter,
    "specforge": SpecForgeWriter,
}


def open_features(
    folder: Path, aux_layers: Sequence[int] | None = None, *, unpickle: bool = False
) -> FeatureRows:
    """The rows of a folder, whatever layout they are in.

    `aux_layers` are the hs[] indices that a foreign layout holds, which its files do not say; a store of
    redraft's own records it. `unpickle` allows SpecForge's files, which are pickles. Raises
    UserError for a folder without features, or with damaged ones.
    """
    if (folder / MANIFEST).is_file() or (folder / ABOUT).is_file():
        return FeatureStore(folder)
    for layout, known in (("speculators", speculators), ("specforge", specforge)):
        if known.recognises(folder):
            if aux_layers is None and (folder / CLAIM).is_file():
                aux_layers = with_today_keys(read_json(folder / CLAIM)).get("aux_layers")
            if aux_layers is None:
                raise UserError(
                    f"{folder} is in the {layout} layout, whose files do not say which layers they hold; name "
                    "them with --aux-layers in hs[] numbers (vLLM's layer ids, SpecForge's plus one), without the "
                    "last state"
                )
            if layout == "specforge":
                return specforge.SpecForgeRows(folder, aux_layers, unpickle=unpickle)
            return speculators.SpeculatorsRows(folder, aux_layers)
    found = (
        ", ".join(sorted(p.name for p in folder.iterdir())[:5])
        if folder.is_dir()
        else "no such folder"
    )
    raise UserError(
        f"{folder}: expected features: a store ({MANIFEST}), speculators' hidden_states/hs_0.safetensors, "
        f"files that vLLM captured, or SpecForge's rows_0-2000/data_0.ckpt; found {found or 'nothing'}"
    )
