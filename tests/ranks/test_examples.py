"""The job files of examples/, each run with stand-ins for its scheduler and a tiny job of two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from redraft.checkpoints.load import stored
from redraft.core.folders import read_json
from redraft.models.target import Target
from tests.conftest import fresh_draft, write_prompts

EXAMPLES = Path(__file__).parents[2] / "examples"
STANDINS = {
    "srun": 'exec "$@"',
    "scontrol": "echo 127.0.0.1",
    "ray": 'while [ "$1" != "--" ]; do shift; done; shift; exec "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}
AT_EXIT = """
import atexit, os, pathlib

@atexit.register
def tell_threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path(os.environ["THREADS"], str(os.getpid())).write_text("".join(names))
"""
CONFIG = """
regenerate: {max_new_tokens: 8}
general: {guard: "off"}
train: {epochs: 0.5, rollout: 2, evaluations: 1, precision: fp32}
measure: {eval_limit: 3, heldout: 2, k: 2, eval_new_tokens: 8}
"""


@pytest.fixture
def job(target: Target, target_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose `redraft adapt` reads the small settings."""
    stored(fresh_draft(target), target).save(tmp_path / "draft")
    (tmp_path / "small.yaml").write_text(CONFIG)
    (tmp_path / "bin").mkdir()
    small = f'set -- "$@" --config {tmp_path / "small.yaml"}\n'
    for name, body in STANDINS.items():
        script = f"#!/bin/bash\n{small if name == 'torchrun' else ''}{body}\n"
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "threads").mkdir()
    (tmp_path / "threads" / "sitecustomize.py").write_text(AT_EXIT)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "threads"),
        "THREADS": str(tmp_path / "threads"),
        "OMP_NUM_THREADS": "1",
        "TARGET": str(target_folder),
        "DRAFT": str(tmp_path / "draft"),
        "PROMPTS": str(write_prompts(tmp_path / "p.jsonl", 12)),
        "OUT": str(tmp_path / "run"),
    }


def command_of(name: str) -> tuple[list[str], dict[str, str]]:
    """What a scheduler would run on a node, and the variables that it would set."""
    if name == "skypilot.yaml":
        task = yaml.safe_load((EXAMPLES / name).read_text())
        assert set(task["envs"]) == {"TARGET", "DRAFT", "PROMPTS", "OUT", "PORT"}
        nodes = {"NUM_NODES": "1", "NODE_RANK": "0", "NODE_IPS": "127.0.0.1"}
        more = {f"SKYPILOT_{key}": value for key, value in nodes.items()}
        return ["bash", "-c", task["run"]], {**more, "SKYPILOT_NUM_GPUS_PER_NODE": "2"}
    more = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node"}
    return [str(EXAMPLES / name)], {**more, "PROCESSES_PER_NODE": "2", "GPUS": "2"}


@pytest.mark.bench
@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml", "ray_job.sh"])
def test_a_job_file_starts_a_job_of_two_processes(
    name: str, job: dict[str, str], tmp_path: Path, unused_port: str
) -> None:
    command, more = command_of(name)
    ended = subprocess.run(
        command,
        env={**job, **more, "PORT": unused_port},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    assert read_json(tmp_path / "run" / "report.json")["after"]["prompts"] == 3
    ends = [path.read_text() for path in (tmp_path / "threads").glob("[0-9]*")]
    assert len(ends) >= 2
    assert not any("gloo" in names for names in ends), "a thread of gloo may abort the process"


def test_every_job_file_is_tried() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix not in (".md", ".py")}
    assert files == {"slurm.sbatch", "skypilot.yaml", "ray_job.sh"}


@pytest.fixture
def unused_port() -> str:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
