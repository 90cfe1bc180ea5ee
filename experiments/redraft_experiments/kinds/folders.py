"""Where in a toy suite its models lie, and how a member starts from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from redraft.models.loading import load_target

from ..members import BASE


def folder_of(out: Path, name: str) -> Path:
    """The folder of the base or of a member."""
    return out / BASE if name == BASE else out / "members" / name


def load_model(out: Path, name: str) -> Any:
    """The model of the base or of a member that has weights of its own, frozen."""
    return load_target(str(folder_of(out, name))).model
