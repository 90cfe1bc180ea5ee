"""Commands that other packages add: the entry points of the group `redraft.commands`.

An entry point names a function, which becomes a command, or a `typer.Typer`, which becomes a group of commands.
Its module is imported whenever redraft starts, so it should import little. One that is missing or broken
becomes a command that reports why. redraft's own commands cannot be replaced.
"""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.main import get_command, get_command_name

from ..core.errors import UserError, as_sentence

GROUP = "redraft.commands"
EXPERIMENTS = ("bench", "demo")
"""Commands of the package redraft-experiments. They are listed where it is missing, too."""


def add_extensions(app: typer.Typer) -> None:
    """Add the commands of all installed packages to `app`, which has redraft's own already."""
    found: dict[str, list[EntryPoint]] = {name: [] for name in EXPERIMENTS}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    for name in sorted(found.keys() - _names(app)):
        try:
            _add(app, name, _load(name, found[name]))
        except UserError as problem:
            _add_refusal(app, name, str(problem))


def _names(app: typer.Typer) -> set[str]:
    commands = {
        c.name or get_command_name(c.callback.__name__)
        for c in app.registered_commands
        if c.callback
    }
    return commands | {str(group.name) for group in app.registered_groups}


def _load(name: str, points: list[EntryPoint]) -> Any:
    """The command that an entry point names. Raises UserError for one that cannot work."""
    if not points:
        raise UserError(
            f"`redraft {name}` is in the package redraft-experiments, which is not installed; "
            "pip install 'redraft[experiments]'"
        )
    packages = " and ".join(sorted(point.dist.name for point in points if point.dist))
    if len(points) > 1:
        raise UserError(f"`redraft {name}` is in the packages {packages}; uninstall all but one")
    what = f"`redraft {name}` of the package {packages} (entry point {points[0].value})"
    with as_sentence(f"{what} cannot be loaded; update or uninstall that package"):
        command = points[0].load()
        if not (inspect.isfunction(command) or isinstance(command, typer.Typer)):
            raise TypeError(f"expected a function or a typer.Typer, found {command!r}")
        trial = typer.Typer()
        _add(trial, name, command)
        get_command(trial)  # parameters that Typer cannot read fail here
    return command


def _add(app: typer.Typer, name: str, command: Any) -> None:
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name)(command)


def _add_refusal(app: typer.Typer, name: str, why: str) -> None:
    def refuse() -> None:
        raise UserError(why)

    app.command(
        name,
        help="Not available; run it to see why.",
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "help_option_names": [],
        },
    )(refuse)
