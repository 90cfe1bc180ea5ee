"""One draft for many LoRA adapters of one base."""

from __future__ import annotations

from pathlib import Path

import typer

from ..config import MeasureConfig, RegenerateConfig
from .bundles import OutputFlags, TargetFlags
from .command import Group, add_command

app = typer.Typer(help="One draft for many LoRA adapters of one base.", cls=Group)


@app.callback()
def root() -> None:
    """One draft for many LoRA adapters of one base."""


def check(
    models: TargetFlags,
    draft: str,
    fleet: str,
    out: str,
    output: OutputFlags,
    k: int = MeasureConfig.k,
    most: int = 16,
    max_new_tokens: int = 128,
) -> None:
    """Which adapters lost acceptance, how much of the fleet's time that costs, and which to adapt to first.

    Each adapter's prompts are answered by the base and by the adapter; nothing is trained.

    Example: redraft fleet check --target org/base --draft org/EAGLE3-base --fleet fleet.yaml --out fleet
    """
    from ..check.fleet import check_fleet, read_fleet
    from ..check.fleet_table import print_fleet
    from ..checkpoints.load import read_draft
    from ..core.errors import UserError
    from ..core.files import writing
    from ..core.lock import held
    from ..core.records import to_json

    if models.target_adapter:
        raise UserError("--target-adapter: name every adapter in the file of --fleet")
    members, stored = read_fleet(Path(fleet)), read_draft(draft)
    folder = Path(out)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        found = check_fleet(
            models.load(),
            stored,
            members,
            folder,
            k=k,
            most=most,
            answering=RegenerateConfig(max_new_tokens=max_new_tokens),
        )
    output.show(to_json(found), lambda: print_fleet(found))


add_command(
    app,
    check,
    help={
        "target": "the base: folder or Hub id",
        "out": "folder that keeps the answers; run again to resume",
        "most": "most prompts of each adapter",
    },
)
