"""The members of a fleet: the adapters of one base that share a draft, and the base itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..config import read_yaml
from ..core.config_values import ConfigValues
from ..core.errors import UserError
from ..models.target import Target, weights_hash
from ..models.target_adapters import BASE, adapter_on, note_unused

NAME = re.compile(r"\w[\w.-]*")
PER = 1000
"""Tokens that passes of the target are counted for."""


@dataclass(frozen=True)
class Member:
    """An adapter of the fleet: its folder (None: the base itself), its prompts, and its share of the traffic (of the sum
    of all shares)."""

    name: str
    adapter: str | None
    prompts: str
    share: float = 1.0

    def on(self, base: Target) -> contextlib.AbstractContextManager[Target]:
        """In the block, the base with this adapter; the base must not be used meanwhile."""
        return (
            contextlib.nullcontext(base) if self.adapter is None else adapter_on(base, self.adapter)
        )


def note_unused_files(base: Target, members: Sequence[Member]) -> None:
    """Say which adapters' folders hold a chat template or tokens of their own: a fleet is asked and read with the base's."""
    for member in members:
        if member.adapter is not None:
            note_unused(Path(member.adapter), base.tokenizer, None)


def read_fleet(path: Path, *, served: bool = False) -> list[Member]:
    """The members that a YAML file names: NAME: {adapter: FOLDER, prompts: FILE, share: 2}; paths are relative to the file.

    The row `base` has no adapter: it is the traffic of the base itself. Of adapters that a server has loaded (`served`) no folder
    is wanted, their names are those that it knows. Raises UserError for anything else, and for two members with the same weights.
    """
    members: list[Member] = []
    rows = list(read_yaml(path).values())
    names = _names(path)
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}, {name}: there are {names.count(name)} rows of this name")
    for name, row in zip(names, rows, strict=True):
        where = f"{path}, {name}"
        if not isinstance(row, dict) or not set(row) <= {"adapter", "prompts", "share"}:
            raise UserError(f"{where}: expected adapter, prompts and perhaps share, got {row}")
        values = ConfigValues(row, where)
        share = values.number("share", 1.0)
        needed = ("prompts",) if name == BASE or served else ("adapter", "prompts")
        missing = [key for key in needed if not values.given(key)]
        if missing:
            raise UserError(f"{where}: {missing[0]} is missing, a path")
        if name == BASE and values.given("adapter"):
            raise UserError(
                f"{where}: this row is the traffic of the base without an adapter; give the adapter another name"
            )
        if not served and not NAME.fullmatch(name):
            raise UserError(
                f"{where}: a name of letters, digits, dots, dashes and underscores is expected"
            )
        adapter = None if name == BASE else str(path.parent / values.text("adapter", ""))
        prompts = str(path.parent / values.text("prompts", ""))
        members.append(Member(name, adapter, prompts, share))
    if all(member.adapter is None for member in members):
        raise UserError(f"{path} names no adapters")
    if not served:
        _check_different(members)
    return members


def _names(path: Path) -> list[str]:
    """The rows' names, letter by letter: YAML would read `no` as false, and pass over the first of two rows of a name."""
    whole = yaml.compose(path.read_text(encoding="utf-8"))
    if not isinstance(whole, yaml.MappingNode):
        return []
    return [str(key.value) for key, _ in whole.value]


def _check_different(members: Sequence[Member]) -> None:
    seen: dict[str, str] = {}
    for member in members:
        if member.adapter is None:
            continue
        if not Path(member.adapter).is_dir():
            raise UserError(
                f"adapter {member.name}: {member.adapter} is no folder; one on the Hub has to be downloaded first"
            )
        settings = Path(member.adapter) / "adapter_config.json"
        scaled = settings.read_text(encoding="utf-8") if settings.is_file() else ""
        key = f"{weights_hash(member.adapter)} {scaled} {member.prompts}"
        first = seen.setdefault(key, member.name)
        if first != member.name:
            raise UserError(
                f"{first} and {member.name} are the same adapter, with the same prompts; leave one out"
            )
