"""One frozen draft, and the small adapters of it that many fine-tunes have."""

from __future__ import annotations

from pathlib import Path

import typer

from ..core.errors import UserError
from .bundles import OutputFlags, TargetFlags
from .command import Group, add_command
from .engine import NOT_GOOD

FORMS = ("draft", "peft")

app = typer.Typer(help="One frozen draft and many small adapters of it.", cls=Group)


@app.callback()
def root() -> None:
    """One frozen draft and many small adapters of it."""


def add(
    bank: str,
    name: str,
    adapter: str,
    output: OutputFlags,
    draft: str | None = None,
    target: str | None = None,
    replace: bool = False,
) -> None:
    """Put an adapter into a bank; the first one needs --draft, the frozen draft, of which the bank keeps a copy.

    Example: redraft bank add bank medical --adapter runs/medical --draft org/EAGLE3-base
    """
    from ..core.records import to_json
    from ..fleet.bank import add as put

    tuned = TargetFlags(target).load() if target else None
    row = put(Path(bank), name, Path(adapter), draft, target=tuned, replace=replace)
    output.finish(f"{bank}: {name}, {row.bytes / 1e6:.2f} MB", to_json(row))


def list_(bank: str, output: OutputFlags) -> None:
    """The adapters of a bank.

    Example: redraft bank list bank
    """
    from ..core.records import to_json
    from ..fleet.bank import read_bank
    from ..fleet.table import print_bank

    found = read_bank(Path(bank))
    rows = [to_json(row) for row in found.adapters.values()]
    output.show({"draft": found.draft_hash, "adapters": rows}, lambda: print_bank(found))


def export(
    bank: str,
    name: str,
    out: str,
    output: OutputFlags,
    form: str = "draft",
    format: str = "auto",
) -> None:
    """Write the stock draft of a name, adapter merged in; or the adapter alone as PEFT reads it.

    Example: redraft bank export bank medical --out draft-medical
    """
    from ..checkpoints.peft_folder import save_peft
    from ..core.errors import check_known
    from ..fleet.bank import read_bank, size_of

    check_known("form", [form], FORMS)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {out} is not an empty folder; name a new one")
    found = read_bank(Path(bank))
    if form == "peft":
        save_peft(folder, found.adapter(name))
    else:
        found.merged(name).save(folder, format)
    size = size_of(folder)
    output.finish(f"{name} written to {out}, {size / 1e6:.2f} MB", {"out": out, "bytes": size})


def remove(bank: str, name: str, output: OutputFlags) -> None:
    """Take an adapter out of a bank, and its files from the disk.

    Example: redraft bank remove bank medical
    """
    from ..fleet.bank import drop

    drop(Path(bank), name)
    output.finish(f"{bank}: {name} removed", {"removed": name})


def verify(bank: str, output: OutputFlags) -> None:
    """Read a whole bank: every hash, and whether each adapter is of the frozen draft and can be merged into it.

    Exit codes: 0 all is well, 3 something is not, 2 a mistake in the command, 1 our fault.

    Example: redraft bank verify bank
    """
    from ..core.records import to_json
    from ..fleet.bank import check_bank
    from ..fleet.table import print_bank_check

    found = check_bank(Path(bank))
    output.show(to_json(found), lambda: print_bank_check(found))
    if found.problems:
        raise typer.Exit(NOT_GOOD)


add_command(
    app,
    add,
    help={
        "adapter": "run folder of `redraft adapt`, or an adapter's own folder",
        "draft": "the frozen draft, for a new bank: folder or Hub id",
        "target": "for a new bank: one of the fine-tunes, where they have more tokens than the draft",
    },
)
add_command(app, list_, name="list")
add_command(app, export, help={"out": "folder to write"})
add_command(app, remove)
add_command(app, verify)
