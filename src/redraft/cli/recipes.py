"""Recipes: settings by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import read_yaml, recipe_names, recipe_path
from ..core.errors import UserError
from ..core.files import write_text
from .bundles import print_json
from .command import Group
from .flag_table import FLAGS

app = typer.Typer(
    cls=Group, invoke_without_command=True, help="List the named recipes, or copy one."
)


@app.callback()
def recipes_list(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help=FLAGS["as_json"].help)] = False,
) -> None:
    """Recipes are YAML files of settings: redraft adapt --config NAME. Example: redraft recipes"""
    if ctx.invoked_subcommand is not None:
        return
    if as_json:
        print_json({name: read_yaml(recipe_path(name)) for name in recipe_names()})
        return
    for name in recipe_names():
        first = recipe_path(name).read_text(encoding="utf-8").splitlines()[0]
        typer.echo(f"{name:14} {first.lstrip('# ')}")


@app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="name of a recipe")],
    to: Annotated[
        str | None, typer.Argument(help="file to write (default: NAME.yaml here)")
    ] = None,
) -> None:
    """Copy a recipe here, to edit it. Example: redraft recipes copy default"""
    destination = Path(to or f"{name}.yaml")
    if destination.exists():
        raise UserError(f"{destination} exists already; name another file")
    write_text(destination, recipe_path(name).read_text(encoding="utf-8"))
    typer.echo(f"wrote {destination}; use it with: redraft adapt --config {destination} ...")
