"""The draft inside a target's own checkpoint, an MTP head: found and judged, taken out, and stitched in.

Training tools lose it: Transformers drops its tensors on load and never writes them, while config.json goes on
declaring them. It is read from the safetensors files, without loading the model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.config_values import architectures_of
from ..core.errors import UserError
from ..core.files import move, remove, write_tensors, write_text, writing
from ..core.folders import (
    WEIGHTS,
    find_folder,
    read_json,
    read_some,
    tensor_files,
    tensor_hash,
)
from ..core.records import versions
from ..drafts import kinds
from ..drafts.kind import DraftKind, Inside
from ..models.target import Target
from .load import StoredDraft
from .load import stored as stored_draft

INDEX = f"{WEIGHTS}.index.json"
HEAD_FILE = "model-mtp.safetensors"
TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
"""The weight files of a target that had one."""
WRAPPER = "base_model."
"""What names of tensors begin with that were saved from inside a PEFT wrapper."""
BEFORE = re.compile(r"^(?:base_model\.|model\.|language_model\.)+")
"""Beginnings of names that training tools add or leave out."""
WHOLE, MISSING, BROKEN = "whole", "missing", "broken"
UNKNOWN, UNREAD = "unknown", "there, not read"


@dataclass(frozen=True)
class OwnHead:
    """What a checkpoint says of its own head, and what is there.

    `state` is `whole`, `missing` (declared, and no tensors), `broken` (`problem` says how), `unknown` (declared by a family whose
    names redraft does not know) or `there, not read` (of a function that redraft does not compute). `same_as_base` is whether
    its tensors are the base's to the last bit; None without a base, or where one of them has no whole head.
    `trunk_changed` is whether the rest is another model than the base.
    """

    folder: str
    family: str
    declared_by: str
    declared: int | None
    state: str
    problem: str | None
    tensors: int
    parameters: int
    hash: str | None
    same_as_base: bool | None = None
    trunk_changed: bool | None = None

    @property
    def stale(self) -> bool:
        """Whether the base's head stands in a model that was tuned."""
        return bool(self.same_as_base and self.trunk_changed)


def inspect_head(source: str, base: str | None = None) -> OwnHead | None:
    """What is there of the head of a target: a folder or Hub id. None where there is no target, or it is to have none.

    Raises UserError where the files cannot be read at all.
    """
    folder = find_folder(source)
    raw = _config(folder)
    if not any(folder.glob("*.safetensors")):
        return None
    row, inside = _row()
    declared = inside.declared(raw)
    try:
        files = tensor_files(folder)
    except UserError:
        if declared is None:
            return None  # a draft, whose reader says what is wrong
        raise
    found = inside.find(raw, files)
    layers = any(".layers." in f".{name}" for name in _trunk(raw, files))
    if (found is None and declared is None) or not layers:
        return None
    names = found[1] if found else []
    family = found[0] if found else declared[0] if declared else ""
    stored: StoredDraft | None = None
    problem = unread = None
    if not family:
        problem = f"config.json declares MTP layers of {architectures_of(raw)[:1]}, whose names redraft does not know"
    elif not found:
        problem = f"no tensors of a head of family {family}, which config.json declares"
    elif unread := inside.not_computed(raw, names):
        problem = unread
    else:
        try:
            stored = _taken(folder, row, raw, read_some(folder, {n: files[n] for n in names}))
            _check_found(folder, raw, stored, files, names, declared)
        except UserError as refusal:
            problem = str(refusal)
    if found:
        state = WHOLE if problem is None else UNREAD if unread else BROKEN
    else:
        state = MISSING if family else UNKNOWN
    sizes = _sizes(folder, files, names)
    theirs = inspect_head(base) if base else None
    both = theirs is not None and theirs.hash is not None and stored is not None
    return OwnHead(
        folder=str(folder),
        family=family,
        declared_by=declared[1] if declared else "",
        declared=declared[2] if declared else None,
        state=state,
        problem=problem,
        tensors=len(names),
        parameters=sum(sizes.values()),
        hash=stored.hash() if stored else None,
        same_as_base=theirs.hash == stored.hash() if both and theirs and stored else None,
        trunk_changed=_trunk_differs(folder, find_folder(base)) if base else None,
    )


def take_head(source: str) -> StoredDraft:
    """The head of a target's checkpoint as a draft, also one that engines would not find. Raises UserError for none, and for
    one that is not whole.
    """
    folder = find_folder(source)
    found = inspect_head(source)
    if found is None or found.hash is None:
        why = "it declares none, and holds none" if found is None else found.problem
        raise UserError(
            f"{source} has no MTP head to take ({why}); a head is taken from the model as it was published (--base), or a new one "
            "trained (--from-layer)"
        )
    row, inside = _row()
    raw, files = read_json(folder / "config.json"), tensor_files(folder)
    _, names = inside.find(raw, files) or ("", [])
    return _taken(folder, row, raw, read_some(folder, {n: files[n] for n in names}))


def new_head(target: Target) -> StoredDraft:
    """A head to begin with for a target that has none and whose base has none, made of the target's last layer.

    Raises UserError where it has no such layer.
    """
    _, inside = _row()
    draft = inside.from_target(target)
    draft.bind(target)
    return stored_draft(draft.to(target.dtype), target)


def check_stitch(target: str, draft: StoredDraft) -> None:
    """Raise UserError for a head that the target cannot hold, or that engines would not serve from there."""
    _fitting(find_folder(target), draft)


def _fitting(folder: Path, draft: StoredDraft) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the head's tensors in the form that is written next to the target's."""
    inside = draft.row.inside
    if inside is None:
        raise UserError(
            f"a draft of kind {draft.kind} is no part of a target's checkpoint; only MTP heads are stitched in"
        )
    raw, files = _config(folder), tensor_files(folder)
    if wrapped := next((n for n in _trunk(raw, files) if n.startswith(WRAPPER)), None):
        raise UserError(
            f"{folder}: {wrapped} was saved from inside a PEFT wrapper, and engines do not find it; merge the adapter "
            "(merge_and_unload), and save the model that this returns"
        )
    config = dict(inside.declaring(raw, draft.config))
    tensors = inside.rename(raw, draft.config, draft.tensors, files)
    parse = draft.row.layouts[0].parse
    assert parse is not None
    parse(config, tensors, folder)  # the shapes that engines will make of this config.json
    return config, tensors


def stitch(target: str, draft: StoredDraft, out: Path) -> dict[str, Any]:
    """Write `target` again with `draft` as its head, into the new folder `out`; its weights are linked, not copied, where the
    disk allows it. Returns what was written. The folder appears whole or not at all.

    Raises UserError, before anything is written, for a head that the target cannot hold.
    """
    folder = find_folder(target)
    config, tensors = _fitting(folder, draft)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; name a new one")
    part = out.with_name(f".{out.name}.part")
    remove(part)  # of an earlier try
    part.mkdir(parents=True)
    told = _write(folder, config, tensors, part)
    found = inspect_head(str(part))
    if found is None or (found.state, found.hash) != (WHOLE, draft.hash()):
        raise UserError(f"{part}: the head reads back as {found}, expected hash {draft.hash()}")
    if out.is_dir():
        out.rmdir()
    move(part, out)
    return {"out": str(out), "head": draft.hash(), **told}


def _write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], out: Path
) -> dict[str, Any]:
    """The files of a stitched checkpoint in the empty folder `out`, and what was done with them."""
    _, inside = _row()
    files = tensor_files(folder)
    _, stale = inside.find(config, files) or ("", [])
    names = _weight_files(files)
    weight_map = {name: names[file] for name, file in files.items() if name not in stale}
    linked, rewritten = [], []
    for file, new in names.items():
        kept = {n: f for n, f in files.items() if f == file and n not in stale}
        if len(kept) == sum(f == file for f in files.values()):
            _link(folder / file, out / new)
            linked.append(new)
        elif kept:
            write_tensors(out / new, read_some(folder, kept))
            rewritten.append(new)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            shutil.copytree(path, out / path.name)
        elif path.is_file() and path.name not in {"config.json", INDEX, *files.values()}:
            shutil.copyfile(path, out / path.name)
    head = TWO[1] if TWO[0] in names.values() else HEAD_FILE
    while (out / head).exists():
        head = f"{Path(head).stem}-head.safetensors"
    write_tensors(out / head, tensors)
    weight_map |= dict.fromkeys(tensors, head)
    total = sum((out / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(out / INDEX, json.dumps(index, indent=2) + "\n")
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    return {"file": head, "replaced": len(stale), "linked": linked, "rewritten": rewritten}


def _config(folder: Path) -> dict[str, Any]:
    """config.json of a target. Raises UserError for an adapter of one."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is an adapter, and an MTP head lies in the model's own checkpoint; merge the adapter into the model "
            "first (PEFT: merge_and_unload), save that, and name its folder"
        )
    return read_json(folder / "config.json")


def _row() -> tuple[DraftKind, Inside]:
    """The kind that checkpoints of targets hold."""
    return next((kind, kind.inside) for kind in kinds.KINDS if kind.inside is not None)


def _trunk(raw: dict[str, Any], files: dict[str, str]) -> list[str]:
    """The tensors that are not a head's."""
    found = _row()[1].find(raw, files)
    own = set(found[1]) if found else set()
    return [name for name in files if name not in own]


def _taken(
    folder: Path, row: DraftKind, raw: dict[str, Any], tensors: dict[str, Any]
) -> StoredDraft:
    parse = row.layouts[0].parse
    assert parse is not None
    config, named = parse(raw, tensors, folder)
    about = {"target": folder.name, "taken_from": folder.name, "versions": versions()}
    return StoredDraft(folder, row.name, config, named, about)


def _check_found(
    folder: Path,
    raw: dict[str, Any],
    stored: StoredDraft,
    files: dict[str, str],
    names: list[str],
    declared: tuple[str, str, int | None] | None,
) -> None:
    """Raise UserError where engines would not find the head that is there."""
    inside = stored.row.inside
    assert inside is not None
    usual = sorted(inside.rename(raw, stored.config, stored.tensors, files))
    strange = sorted(set(usual) - set(names))
    if strange:
        raise UserError(
            f"{folder}: engines look for {strange[0]}, which is here as {names[0].rpartition('.')[0]}...: the head was renamed; "
            "redraft stitch writes the usual names"
        )
    if declared is not None and declared[2] not in (None, 1):
        raise UserError(
            f"{folder}: config.json declares {declared[2]} MTP layers ({declared[1]}), the files hold one; redraft stitch "
            "sets it right"
        )
    if declared is None or declared[2] is None:
        raise UserError(
            f"{folder}: the tensors of a head are there, but config.json does not declare it; redraft stitch sets it right"
        )
    index = folder / INDEX
    if index.is_file() and not (folder / WEIGHTS).is_file():
        listed = read_json(index).get("weight_map", {})
        unlisted = [name for name in names if listed.get(name) != files[name]]
        if unlisted:
            raise UserError(
                f"{index} does not list {unlisted[0]} in {files[unlisted[0]]}, where it is, so engines pass over it; redraft "
                "stitch writes the index again"
            )


def _sizes(folder: Path, files: dict[str, str], names: list[str]) -> dict[str, int]:
    """The number of elements of tensors, from the files' headers."""
    from safetensors import safe_open

    sizes = {}
    for file in sorted({files[name] for name in names}):
        with safe_open(folder / file, framework="pt") as stream:
            for name in (name for name in names if files[name] == file):
                size = 1
                for length in stream.get_slice(name).get_shape():
                    size *= length
                sizes[name] = size
    return sizes


def _trunk_differs(folder: Path, base: Path) -> bool:
    """Whether any tensor that both hold, but for the head's, has other values; names without their prefix."""

    def trunk(where: Path) -> dict[str, tuple[str, str]]:
        files = tensor_files(where)
        names = _trunk(read_json(where / "config.json"), files)
        return {BEFORE.sub("", name): (name, files[name]) for name in names}

    ours, theirs = trunk(folder), trunk(base)
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = (
            tensor_hash(read_some(where, dict([names[name]]))[names[name][0]])
            for where, names in ((folder, ours), (base, theirs))
        )
        if one != other:
            return True
    return False


def _weight_files(files: dict[str, str]) -> dict[str, str]:
    """New names of the weight files: a single one becomes the first of two, as an index then lists both."""
    names = sorted(set(files.values()))
    return {names[0]: TWO[0]} if len(names) == 1 else {name: name for name in names}


def _link(path: Path, new: Path) -> None:
    """Another name for a file, or a copy where the disk has no such thing."""
    with writing(new):
        try:
            os.link(path.resolve(), new)
        except OSError:
            shutil.copyfile(path, new)
