"""A bank: one frozen draft, and the small adapters of it that many fine-tunes have.

    BANK/bank.json            the hash of the frozen draft, and what each name stands for
    BANK/draft/               the frozen draft, once, as a stock checkpoint
    BANK/adapters/HASH/       an adapter, as `redraft adapt` writes it, under the hash of its tensors and its target

An adapter is on the disk before its name is in bank.json, and its name is gone from there before its files are, so that
a bank is whole whenever it is read. What no name stands for any more is removed with the next change.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..checkpoints.adapter_folder import CARD, check_belongs, load_adapter, save_adapter
from ..checkpoints.load import StoredDraft, read_draft
from ..core.config_values import ConfigValues
from ..core.errors import UserError, nearest
from ..core.files import remove, write_text, writing
from ..core.folders import read_json, state_hash
from ..core.lock import held
from ..core.published import without_paths
from ..core.records import TrainRecord, to_json
from ..models.target import Target
from ..pipeline.stages import merge_draft
from .member import NAME

MANIFEST, DRAFT, ADAPTERS = "bank.json", "draft", "adapters"
VERSION = 1
OBJECT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Banked:
    """An adapter in a bank. `heldout_tau` is that at the start of its training and the best one; `target` the fine-tune's name."""

    name: str
    object: str
    method: str
    target: str
    target_fingerprint: str
    parameters: int
    bytes: int
    heldout_tau: tuple[float, float] | None = None


@dataclass(frozen=True)
class BankCheck:
    """What was found of a bank: by name what is wrong, and folders that no name stands for (which harm nothing)."""

    path: str
    adapters: int
    bytes: int
    problems: dict[str, str] = field(default_factory=dict)
    unnamed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bank:
    """A bank as bank.json describes it. Tensors are read when they are asked for."""

    path: Path
    draft_hash: str
    adapters: dict[str, Banked]

    @cached_property
    def frozen(self) -> StoredDraft:
        """The frozen draft. Raises UserError where it is no longer the one that the bank began with."""
        found = read_draft(str(self.path / DRAFT))
        if found.hash() != self.draft_hash:
            raise UserError(
                f"{self.path / DRAFT} hashes to {found.hash()}, and the bank's adapters were trained next to {self.draft_hash}: "
                "the frozen draft was changed; copy it there again from where it came"
            )
        return found

    def named(self, name: str) -> Banked:
        if name not in self.adapters:
            raise UserError(
                f"{self.path} holds no adapter '{name}'; {nearest(name, self.adapters) if self.adapters else 'it is empty'}"
            )
        return self.adapters[name]

    def adapter(self, name: str) -> Adapter:
        """The adapter of a name, whose `attached_to` takes a draft built from `frozen`.

        Raises UserError for an unknown name, and for files that are not what was put in.
        """
        row = self.named(name)
        found = load_adapter(self.path / ADAPTERS / row.object)
        if _object(found) != row.object:
            raise UserError(
                f"{self.path / ADAPTERS / row.object} is not the adapter that was added as {name}; remove it, and add it "
                "again from where it came"
            )
        check_belongs(found, self.frozen)
        return found

    def merged(self, name: str) -> StoredDraft:
        """The draft of a name, for serving. It shares every tensor with the frozen draft that the adapter leaves unchanged."""
        return merge_draft(self.frozen, self.adapter(name))


def read_bank(path: Path) -> Bank:
    """The bank in a folder. Raises UserError for no bank, one of a later version, and a damaged record."""
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path} is no bank: expected {MANIFEST} in it; redraft bank add --draft makes one"
        )
    values = ConfigValues(read_json(path / MANIFEST), str(path / MANIFEST))
    version = values.positive("version")
    if version != VERSION:
        raise UserError(f"{path / MANIFEST} is of version {version}; this redraft reads {VERSION}")
    rows = values.inside("adapters").raw
    try:
        adapters = {name: _banked(name, row) for name, row in rows.items()}
    except (TypeError, ValueError, LookupError, AttributeError) as problem:
        raise UserError(f"{path / MANIFEST}: no record of a bank ({problem!r})") from None
    return Bank(path, values.text("draft", ""), adapters)


def _banked(name: str, row: dict[str, Any]) -> Banked:
    """A row of bank.json. Raises TypeError, ValueError, LookupError or AttributeError for what is none."""
    tau = row.pop("heldout_tau", None)
    found = Banked(name, heldout_tau=None if tau is None else (float(tau[0]), float(tau[1])), **row)
    sizes, texts = (found.parameters, found.bytes), (found.method, found.target, found.object)
    if not NAME.fullmatch(name) or not OBJECT.fullmatch(found.object):
        raise ValueError(f"{name}: {found.object}")
    if not all(type(size) is int for size in sizes) or not all(type(t) is str for t in texts):
        raise TypeError(name)
    return found


def add(
    path: Path,
    name: str,
    source: Path,
    draft: str | None = None,
    *,
    target: Target | None = None,
    replace: bool = False,
) -> Banked:
    """Put the adapter in the folder `source` (or in a run of `redraft adapt`) into a bank, which `draft` begins.

    For fine-tunes with more tokens than the draft, whose adapters go with a draft of as many rows, a new bank needs one of
    them as `target`. Adding the same adapter under the same name again changes nothing. Raises UserError for an adapter of
    another draft, for a name that stands for another adapter (unless `replace`), for an adapter that has another name
    already, and while another process changes the bank.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"'{name}': letters, digits, dots, dashes and underscores make a name")
    if not (source / CARD).is_file() and (source / "adapter" / CARD).is_file():
        source = source / "adapter"
    adapter = load_adapter(source)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with held(path):
        bank = _begun(path, draft, target)
        check_belongs(adapter, bank.frozen)
        row = _row(name, adapter)
        for other in bank.adapters.values():
            if other.object == row.object and other.name != name:
                raise UserError(
                    f"{source} is the adapter that {path} holds as {other.name} already; use that name"
                )
        before = bank.adapters.get(name)
        if before is not None and before.object != row.object and not replace:
            raise UserError(
                f"{path} holds another adapter as {name}; add it under another name, or with --replace in its place"
            )
        _check_merges(bank.frozen, adapter, source)
        save_adapter(path / ADAPTERS / row.object, adapter)
        _write(Bank(path, bank.draft_hash, {**bank.adapters, name: row}))
    return row


def drop(path: Path, name: str) -> None:
    """Take a name out of a bank, and its adapter from the disk."""
    read_bank(path)  # before a lock is laid into what is no bank
    with held(path):
        bank = read_bank(path)
        bank.named(name)
        left = {other: row for other, row in bank.adapters.items() if other != name}
        _write(Bank(path, bank.draft_hash, left))


def check_bank(path: Path) -> BankCheck:
    """Read a whole bank: every hash, whose draft each adapter is of, and whether each can be merged."""
    bank, problems = read_bank(path), {}
    try:
        bank.frozen  # noqa: B018 - read for its checks
    except UserError as problem:
        problems[DRAFT] = str(problem)
    for name in bank.adapters if not problems else ():
        try:
            adapter = bank.adapter(name)
            _check_merges(bank.frozen, adapter, path / ADAPTERS / bank.named(name).object)
        except UserError as problem:
            problems[name] = str(problem)
    named = {row.object for row in bank.adapters.values()}
    unnamed = tuple(sorted(folder for folder in _objects(path) if folder not in named))
    return BankCheck(str(path), len(bank.adapters), size_of(path), problems, unnamed)


def size_of(path: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _check_merges(frozen: StoredDraft, adapter: Adapter, source: Path) -> None:
    """Raise UserError for an adapter that does not say whose it is, or cannot be folded into the frozen draft."""
    if "shared_hash" not in adapter.card:
        raise UserError(
            f"{source} does not record the draft that it was trained next to; train it again"
        )
    try:
        merge_draft(frozen, adapter)
    except (ValueError, LookupError, RuntimeError) as problem:
        raise UserError(f"{source} cannot be merged into the frozen draft: {problem}") from None


def _begun(path: Path, draft: str | None, target: Target | None) -> Bank:
    """The bank, or a new one of a draft. Raises UserError for another draft than the bank's."""
    stored = None if draft is None else read_draft(draft)
    if stored is not None and target is not None:
        stored = stored.fitted(target)
    if (path / MANIFEST).is_file():
        bank = read_bank(path)
        if stored is not None and stored.hash() != bank.draft_hash:
            raise UserError(
                f"{draft} is not the frozen draft of {path} ({bank.draft_hash}); its adapters need a bank of their own"
            )
        return bank
    others = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    if stored is not None and _is_copy(path / DRAFT, stored):
        others -= {DRAFT}  # of a beginning that was interrupted
    if others:
        raise UserError(f"{path} holds other files ({', '.join(sorted(others)[:3])}) and no bank")
    if stored is None:
        raise UserError(f"{path} is a new bank: name its frozen draft with --draft")
    stored.save(path / DRAFT)
    bank = Bank(path, stored.hash(), {})
    _write(bank)
    return bank


def _is_copy(folder: Path, stored: StoredDraft) -> bool:
    """Whether a folder holds this draft, or a part of it: its config.json is written last."""
    whole = (folder / "config.json").is_file()
    return not whole or read_draft(str(folder)).hash() == stored.hash()


def _row(name: str, adapter: Adapter) -> Banked:
    card, tensors = adapter.card, adapter.tensors
    tau = None
    if "train" in card:
        train = TrainRecord(**card["train"])
        tau = (train.heldout_tau[0][1], train.best_tau()) if train.heldout_tau else None
    return Banked(
        name,
        _object(adapter),
        adapter.method,
        str(without_paths(card.get("target", "not recorded"))),
        str(card.get("target_fingerprint", "")),
        adapter.parameter_count(),
        sum(tensor.nbytes for tensor in tensors.values()),
        tau,
    )


def _object(adapter: Adapter) -> str:
    """What an adapter lies under: equal tensors for another target are another adapter, whose card names that one."""
    whole = f"{state_hash(adapter.tensors)} {adapter.card.get('target_fingerprint', '')}"
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _write(bank: Bank) -> None:
    """bank.json whole, then away with what it does not name."""
    rows = {
        name: {key: value for key, value in to_json(row).items() if key != "name"}
        for name, row in bank.adapters.items()
    }
    record = {"version": VERSION, "draft": bank.draft_hash, "adapters": rows}
    write_text(bank.path / MANIFEST, json.dumps(record, indent=2) + "\n")
    named = {row.object for row in bank.adapters.values()}
    for folder in _objects(bank.path):
        if folder not in named:
            remove(bank.path / ADAPTERS / folder)


def _objects(path: Path) -> list[str]:
    folder = path / ADAPTERS
    found = folder.iterdir() if folder.is_dir() else ()
    return [each.name for each in found if OBJECT.fullmatch(each.name)]
