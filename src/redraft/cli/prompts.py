"""Prompts: looking at a file before anything is generated, and collecting one from logs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.visible import visible
from .bundles import OutputFlags, TargetFlags
from .command import Group, add_command

if TYPE_CHECKING:
    from ..prompts.inspection import Inspection, Span

app = typer.Typer(
    help="Look at a prompts file before anything is generated; collect one from logs.", cls=Group
)


@app.callback()
def root() -> None:
    """Look at a prompts file before anything is generated; collect one from logs."""


def inspect(
    file: str,
    models: TargetFlags,
    output: OutputFlags,
    rows: int = 3,
    turns: str = "all",
    limit: int | None = None,
) -> None:
    """Show what is understood of a prompts file: rendered rows, special tokens, and mistakes.

    Example: redraft prompts inspect prompts.jsonl --target ./my-model
    """
    from ..config import check_value, stage_fields
    from ..core.errors import UserError
    from ..prompts.inspection import inspect_prompts
    from ..prompts.prompts import read_prompts

    try:
        check_value(stage_fields()["regenerate.turns"][1], turns)
    except ValueError as problem:
        raise UserError(f"--turns {problem}") from None
    loaded = models.load()
    found = inspect_prompts(read_prompts(file, loaded, limit, turns), loaded, rows)
    output.show(asdict(found), lambda: _print(found))


def collect(
    log: str,
    out: str,
    output: OutputFlags,
    consent: str | None = None,
    everyone_agreed: bool = False,
    logged_model: str | None = None,
    most: int | None = None,
) -> None:
    """Prompts for the next adaptation from a service's logs: rows of people who agreed, without secrets; more are added each time.

    A row is a chat, or a request with its response as OpenAI-style gateways log them. Rows with credentials, e-mail addresses, telephone
    or card numbers are left out whole.

    Example: redraft prompts collect log.jsonl --consent metadata.training=true --out prompts.jsonl
    """
    from ..prompts.collect import collect as run

    found = run(
        log,
        Path(out),
        consent=consent,
        everyone_agreed=everyone_agreed,
        model=logged_model,
        most=most,
    )
    lines = [f"{found.added} added, {found.held} rows in {out}"]
    lines += [f"left out: {count} ({visible(why)})" for why, count in found.left_out.items()]
    output.finish("\n".join(lines), asdict(found))


add_command(app, inspect)
add_command(
    app,
    collect,
    help={
        "out": "JSONL file of prompts to add to",
        "most": "rows in the file at most [default: all]",
    },
)


def _print(found: Inspection) -> None:
    from rich.console import Console
    from rich.text import Text

    out = Console(highlight=False)
    for row in found.rows:
        text = Text(f"{visible(row.id)}: {row.prompt_tokens} tokens", style="bold")
        text.append(f", answer in the file {row.answer_tokens}" if row.answer_tokens else "")
        text.append(f", {row.turns} turns to answer" if row.turns > 1 else "")
        out.print(text)
        body = Text()
        for span in row.spans:
            body.append(_marked(span), style=_style(span))
        out.print(body, soft_wrap=True)
        out.print()
    legend = Text("special tokens ⟨so⟩", style="magenta")
    legend.append("  supervised «so»", style="green")
    out.print(legend)
    low, middle, high = found.prompt_lengths
    kinds = ", ".join(f"{count} {shape}" for shape, count in found.shapes.items())
    out.print(f"{found.kept} prompts ({kinds}) of {low} to {high} tokens, median {middle}")
    if found.answer_lengths:
        low, middle, high = found.answer_lengths
        out.print(f"answers in the file: {low} to {high} tokens, median {middle}")
    if found.conversations:
        out.print(f"{found.conversations} conversations of several turns")
    if found.left_out:
        out.print(f"{found.left_out} rows left out:")
        for reason, count in found.reasons.items():
            rows = "rows" if count > 1 else "row"
            at = f"line {found.lines[reason]}"
            out.print(
                f"  {count} {rows} ({at if count == 1 else f'first: {at}'}): {visible(reason)}",
                markup=False,
                soft_wrap=True,
            )
    for warning in found.warnings:
        out.print(f"warning: {visible(warning)}", style="yellow", markup=False, soft_wrap=True)


def _marked(span: Span) -> str:
    """Marked by signs as well as by colour, for a log file and for a colour-blind eye."""
    text = visible(span.text)
    text = f"⟨{text}⟩" if span.special else text
    return f"«{text}»" if span.supervised else text


def _style(span: Span) -> str:
    return "magenta" if span.special else "green" if span.supervised else ""
