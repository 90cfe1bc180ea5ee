"""Commands that other packages add: the entry points of the group `redraft.commands`.

An entry point names a function, which becomes a command, or a `typer.Typer`, which becomes a group of commands.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer

from ..core.errors import UserError

GROUP = "redraft.commands"
EXPERIMENTS = {
    "demo": "build a small model family, break its draft by a fine-tune, and adapt it",
    "bench": "build the toy suite and run benches on it",
}
"""Commands of the package redraft-experiments. They are listed where it is missing, too."""


def add_extensions(app: typer.Typer) -> None:
    """Add the commands of all installed packages."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    for name in sorted({*found, *EXPERIMENTS}):
        if name in found:
            _add(app, name, found[name].load())
        else:
            app.command(
                name,
                help=f"{EXPERIMENTS[name]} (not installed: pip install 'redraft[experiments]')",
                context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
            )(_missing)


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


def _missing(context: typer.Context) -> None:
    raise UserError(
        f"`redraft {context.info_name}` is in the package redraft-experiments, which is not installed; "
        "pip install 'redraft[experiments]'"
    )
