"""Samples of a selection as text."""

from __future__ import annotations

from typing import Any

import typer

from ..core.visible import visible


def print_examples(examples: Any) -> None:
    """On stderr, as the result proper goes to stdout."""
    for example in examples:
        sample = example.sample
        fate = "kept" if sample.kept else "left out"
        if sample.duplicate_of:
            fate += f", like {sample.duplicate_of}"
        answer = f"\n  -> {_shortened(example.answer)}" if example.answer else ""
        text = (
            f"{example.where}, rank {example.rank}: {sample.score:.4g} ({fate}) {sample.id}\n"
            f"  {_shortened(example.prompt)}{answer}"
        )
        typer.echo(visible(text), err=True)


def _shortened(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"
