"""The commands put together, and what becomes of an exception."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..core.console import console
from ..core.errors import UserError
from ..core.visible import visible
from . import (
    check,
    drafts,
    engine,
    env,
    features,
    generate,
    job,
    prompts,
    recipes,
    stages,
)
from .command import Group, add_command
from .extensions import add_extensions

app = typer.Typer(
    name="redraft",
    cls=Group,
    help="Re-align a speculative-decoding draft model with a fine-tuned LLM, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    check.check,
    job.adapt,
    stages.regenerate,
    stages.select,
    features.features,
    stages.train,
    stages.measure,
    drafts.inspect,
    drafts.export,
    engine.verify,
    job.report,
    env.env,
):
    app.command()(command)
add_command(app, generate.generate)
app.add_typer(prompts.app, name="prompts")
app.add_typer(recipes.app, name="recipes")
add_extensions(app)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        typer.echo(f"redraft {__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point: exceptions become exit codes."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _calm_libraries()
        app(standalone_mode=True)
    except UserError as mistake:
        text = visible(f"redraft: {mistake}")
        console.print(text, style="red", soft_wrap=True, markup=False)
        if os.environ.get("REDRAFT_TRACEBACK"):
            raise
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # Ctrl-C, which Typer turns into this code
            console.print("redraft: interrupted; run the same command again to continue")
        raise


def _calm_libraries() -> None:
    """Loading bars and advice of the libraries would drown our own progress."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
