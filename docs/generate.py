"""Docs that can drift are generated: `python docs/generate.py` writes them, `--check` compares.

docs/cli.md      the command reference, from each command's own --help
docs/engines.md  which engine serves what, from docs/results/engines.json and the rules of `inspect`
docs/config.md   every setting with its default, from the dataclasses in config/settings.py
README.md        the end of a run, the race and the measured table, from the records in docs/results/
docs/architecture.md  every file with the first line of its docstring
docs/results/drafts.md    the same records in full
docs/results/decode.md    decoding speed, from its record there
docs/results/positions.md  recovery by position and temperature, from the cells there; with a figure
docs/results/methods.md   adapters on matched data, from the cells there; with figures
docs/results/real-methods.md  the race on real models, from the cells there
docs/guides/*.md          tables between marks, from single records there
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decode_page import decode_page
from drafts_page import measured_table, results_page, run_output
from engines_page import engines_page
from methods_page import draw_figures, methods_page
from positions_page import draw_positions, positions_page
from real_page import draw_real, race_table, real_page
from record_tables import (
    bank_table,
    certificates_table,
    check_table,
    families_table,
    fleet_table,
    losses_table,
    mtp_table,
    plan_table,
    quantised_table,
    scale_table,
    versions_table,
    watch_table,
)
from selection_page import draw_selection, selection_page
from triage_page import draw_triage, triage_page
from typer.main import get_command

from redraft.adapters.table import ADAPTERS
from redraft.cli.app import app
from redraft.config import recipe_names, stage_fields

ROOT = Path(__file__).parents[1]


def generated() -> dict[Path, str]:
    """Each generated file with the text it should have."""
    parts = {
        "run": f"```\n{run_output()}```",
        "measured": measured_table(),
        "race": race_table(),
        "tree": f"```\n{tree()}```",
        "mtp": mtp_table(),
        "mtp-families": families_table(),
        "watch": watch_table(),
        "fleet": fleet_table(),
        "bank": bank_table(),
        "versions": versions_table(),
        "quantised": quantised_table(),
        "certificates": certificates_table(),
        "losses": losses_table(),
        "check-real": check_table(),
        "scale": scale_table(),
        "plan": plan_table(),
    }
    guides = sorted((ROOT / "docs" / "guides").glob("*.md"))
    pages = (
        *(ROOT / "README.md", ROOT / "docs/getting-started.md", ROOT / "docs/architecture.md"),
        *(ROOT / "docs/certificate.md", ROOT / "docs/check.md"),
        *guides,
    )
    return {page: between(page.read_text(encoding="utf-8"), parts) for page in pages} | {
        ROOT / "docs" / "results" / "drafts.md": results_page(),
        ROOT / "docs" / "results" / "decode.md": decode_page(),
        ROOT / "docs" / "results" / "methods.md": methods_page(),
        ROOT / "docs" / "results" / "real-methods.md": real_page(),
        ROOT / "docs" / "results" / "selection.md": selection_page(),
        ROOT / "docs" / "results" / "triage.md": triage_page(),
        ROOT / "docs" / "results" / "positions.md": positions_page(),
        ROOT / "docs" / "cli.md": cli_reference(),
        ROOT / "docs" / "engines.md": engines_page(),
        ROOT / "docs" / "config.md": config_reference(),
    }


def between(text: str, parts: dict[str, str]) -> str:
    """`text` with the parts between named marks replaced, where it has these marks."""
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            _, _, after = rest.partition(end)
            text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def cli_reference() -> str:
    parts = ["# Command line\n\nGenerated from `--help` by `make docs`.\n"]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    for command in ([], *_commands(get_command(app))):
        help_text = subprocess.run(
            [sys.executable, "-m", "redraft", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout
        name = " ".join(["redraft", *command])
        usage = help_text.replace("python -m redraft", "redraft").strip()
        lines = "\n".join(line.rstrip() for line in usage.splitlines())
        parts.append(f"## {name}\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """The words of every command, in the order that `--help` lists them."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from [[*path, name]] if command.invoke_without_command else []
            yield from _commands(command, (*path, name))
        else:
            yield [*path, name]


def config_reference() -> str:
    lines = [
        "# Settings\n",
        "Generated from `config/settings.py` by `make docs`. Set one with `--set stage.name=value`, several in",
        "a YAML file (`--config FILE`), or start from a recipe: "
        + ", ".join(f"`{name}`" for name in recipe_names())
        + ".\n",
        "| setting | default | what it does |",
        "|---|---|---|",
    ]
    for key, (_, field) in stage_fields().items():
        choices = field.metadata.get("choices")
        text = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        lines.append(f"| `{key}` | `{field.default}` | {text} |")
    lines += [
        "\n## Adapters\n",
        "`--method` joins them with +: `expert+fc+norms`. `feature-map` and `weight-sync` need `--base`. What no adapter",
        "trains is shared and stays bit for bit what it was. docs/results/methods.md compares them.\n",
        "| adapter | what is trained |",
        "|---|---|",
        *(f"| `{name}` | {row.help} |" for name, row in ADAPTERS.items()),
    ]
    return "\n".join(lines) + "\n"


def tree() -> str:
    """Both packages, one line per file: its name and the first sentence of its docstring."""
    lines = []
    for package in (ROOT / "src" / "redraft", ROOT / "experiments" / "redraft_experiments"):
        lines.append(f"{package.relative_to(ROOT)}/")
        files = sorted(p for p in package.rglob("*.py") if p.name != "__main__.py")
        for path in (p for p in files if p.parent == package and p.name != "__init__.py"):
            lines.append(f"  {path.name:24} {_says(path)}")
        for folder in sorted({p.parent for p in files} - {package}):
            lines.append(f"  {folder.name + '/':24} {_says(folder / '__init__.py')}")
            for path in files:
                if path.parent == folder and path.name != "__init__.py":
                    lines.append(f"    {path.name:22} {_says(path)}")
    return "\n".join(lines) + "\n"


def _says(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def main() -> int:
    stale = []
    for path, text in generated().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if "--check" not in sys.argv:
        draw_figures()
        draw_selection()
        draw_triage()
        draw_positions()
        draw_real()
    elif stale:
        print(f"generated docs are stale: {', '.join(map(str, stale))}; run `make docs`")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
