"""The bench of a fleet: every kind of draft on every member, on the same answers; a second run only reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from redraft.adapters.adapter import Adapter
from redraft.checkpoints.load import read_draft
from redraft.cli.app import app
from redraft.core.errors import UserError
from redraft_experiments.fleet import mean_tensors
from tests.fleet.test_adapt import QUICK, SMALL, wide  # noqa: F401


def test_every_draft_is_measured_on_every_member(
    wide: Path,  # noqa: F811
    target_folder: Path,
    draft_folder: Path,
    tmp_path: Path,
) -> None:
    words = ["--target", str(target_folder), "--draft", str(draft_folder), "--fleet", str(wide)]
    sets = [word for each in (*SMALL, *QUICK) for word in ("--set", each)]
    out = tmp_path / "out"
    command = ["bench", "fleet", *words, *sets, "--budget", "0.5", "--out", str(out), "--json"]

    def run() -> Any:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["cells"]

    cells = run()
    found = {(cell["draft"], cell["member"]): cell for cell in cells}
    names = {"loud", "still", "base"}
    assert {key for key in found if key[0] != "own"} == {
        (draft, name) for draft in ("unadapted", "shared", "union", "average") for name in names
    }
    assert {name for draft, name in found if draft == "own"} == {"loud", "still"}
    assert all(found["unadapted", name]["change"] == 0 for name in names)
    shared = json.loads((out / "shared" / "fleet.json").read_text())["members"]
    for row in shared:
        cell = found["shared", row["name"]]
        assert (cell["tau"], cell["change"]) == pytest.approx((row["after"][0], row["change"][0]))
    assert {found["union", name]["trained_on"] for name in ("loud", "still")} == {11}
    assert any(cell["change"] for cell in cells), "nothing was trained"
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run() == cells
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_mean_counts_what_was_left_unchanged(draft_folder: Path) -> None:
    stored = read_draft(str(draft_folder))
    name = next(n for n, tensor in stored.tensors.items() if tensor.is_floating_point())
    home = stored.tensors[name]
    one, other = Adapter("body", {name: home + 3}, {}), Adapter("body", {}, {})
    assert torch.allclose(mean_tensors(stored, [one, one, other])[name], home + 2)
    with pytest.raises(UserError, match="more is added"):
        mean_tensors(stored, [Adapter("expert", {"more": home}, {}), one])
