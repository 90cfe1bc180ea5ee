"""The engines that redraft runs: one row each."""

from __future__ import annotations

from ..core.errors import UserError, nearest
from .engine import Engine
from .llamacpp import LLAMACPP
from .vllm import VLLM

ENGINES: tuple[Engine, ...] = (VLLM, LLAMACPP)
NOT_RUN = {
    "sglang": "redraft does not run SGLang; exports are checked against its loaders' names and shapes "
    "only, which `redraft inspect DRAFT` shows"
}
"""Engines that redraft writes exports for and does not start."""


def engine_named(name: str) -> Engine:
    """The row of `name`. Raises UserError for an engine that redraft does not run."""
    rows = {row.name: row for row in ENGINES}
    if name in NOT_RUN:
        raise UserError(f"--engine {name}: {NOT_RUN[name]}")
    if name not in rows:
        raise UserError(f"unknown --engine '{name}'; {nearest(name, [*rows, *NOT_RUN])}")
    return rows[name]
