"""What TRL leaves of a model with an MTP head, and the head given back: examples/after_training_trl.py on a tiny Qwen3.5."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from redraft.checkpoints.load import stored
from redraft.checkpoints.own_head import inspect_head, stitch
from redraft.cli.app import app
from redraft.core.folders import read_tensors
from redraft.models.loading import load_target
from tests.conftest import fresh_draft
from tests.drafts.mtp_targets import SIZES, save_qwen3_5
from tests.pipeline.test_own_head import SETTINGS

SCRIPT = Path(__file__).parents[2] / "examples" / "after_training_trl.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its head, and chats next to it."""
    folder = tmp_path_factory.mktemp("base")
    target = load_target(str(save_qwen3_5(folder / "trunk")))
    head = stored(fresh_draft(target, kind="mtp", width=SIZES["intermediate_size"]), target)
    stitch(str(folder / "trunk"), head, folder / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"{i} {i}"},
            ]
        }
        for i in range(24)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "base"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trl_drops_the_head_and_one_command_gives_it_back(
    base: Path, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[tuple[int, str]] = []

    started = subprocess.run

    def here(words: list[str], **how: Any) -> Any:
        """The command in this process: the script's own would import everything again."""
        if words[:3] != [sys.executable, "-m", "redraft"]:
            return started(words, **how)
        ended = CliRunner().invoke(app, words[3:])
        outputs.append((ended.exit_code, ended.stdout))
        return subprocess.CompletedProcess(words, ended.exit_code)

    sets = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    words = ["--base", base, "--chats", base.with_name("chats.jsonl"), "--out", tmp_path]
    words += ["--steps", 3, "--lr", 1e-3, *["--lora"] * lora, *sets]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", here)
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    assert [code for code, _ in outputs] == [3, 0, 0]
    assert "MTP head    missing" in outputs[0][1]
    assert "its values  not the base's" in outputs[2][1]
    tuned, checkpoint = tmp_path / ("merged" if lora else "tuned"), tmp_path / "mtp" / "checkpoint"
    lost, given = (inspect_head(str(where), str(base)) for where in (tuned, checkpoint))
    assert lost is not None
    assert (lost.state, lost.declared, lost.trunk_changed) == ("missing", 1, True)
    assert given is not None
    assert (given.state, given.same_as_base, given.trunk_changed) == ("whole", False, True)
    was, now, published = (read_tensors(where) for where in (tuned, checkpoint, base))
    assert now.keys() == published.keys()
    assert {name for name in now if name not in was} == {n for n in now if n.startswith("mtp.")}
    assert all(torch.equal(now[name], was[name]) for name in was)
    frozen = "model.embed_tokens.weight"
    assert torch.equal(was[frozen], published[frozen]) == lora
