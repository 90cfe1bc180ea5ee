"""Starting and stopping a server: every way it can end, and what is reported."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from redraft.core.errors import UserError
from redraft.serving.engine import Serving
from redraft.serving.server import check_port, last_words
from redraft.serving.vllm import VLLM
from tests.serving.conftest import FakeEngine

WHAT = Serving(target="nowhere/at-all", dtype="float32", max_model_len=64)


def alive(process: int) -> bool:
    """Whether a process runs (one that has ended and waits to be collected does not)."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(process: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(process)


def test_it_is_stopped_when_the_block_ends(fake: FakeEngine, tmp_path: Path) -> None:
    with VLLM.serve(fake.environment, WHAT, tmp_path / "log"):
        process = fake.started["pid"]
        assert alive(process)
    assert gone(process)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_it_is_stopped_when_the_block_fails(
    fake: FakeEngine, tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        with VLLM.serve(fake.environment, WHAT, tmp_path / "log"):
            process = fake.started["pid"]
            raise error
    assert gone(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_is_stopped_with_redraft(fake: FakeEngine, tmp_path: Path, number: int) -> None:
    """A process that serves and waits is interrupted: the engine must not outlive it."""
    code = f"""
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
from redraft.serving.environment import Environment
from redraft.serving.server import free_port, serving
port = free_port()
with serving("fake", [{str(fake.python)!r}, "-m", "vllm.entrypoints.openai.api_server", "--port",
             str(port)], dict(__import__("os").environ), port=port, patience=30.0,
             log=Path({str(tmp_path / "log")!r})):
    print("serving", flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "serving\n"
    process = fake.started["pid"]
    assert alive(process)
    os.kill(parent.pid, number)
    assert parent.wait(15) != 0
    assert gone(process)


def test_children_that_do_not_listen_are_killed(fake: FakeEngine, tmp_path: Path) -> None:
    """A child of the server that ignores SIGTERM ends with it all the same."""
    stubborn = tmp_path / "stubborn"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    fake.python.write_text(
        fake.python.read_text().replace(
            "exec ", f"{sys.executable} -c '{child}' & echo $! > {stubborn}\nexec "
        )
    )
    with VLLM.serve(fake.environment, WHAT, tmp_path / "log"):
        process = int(stubborn.read_text())
        assert alive(process)
    assert gone(process)


def test_a_port_that_is_taken(fake: FakeEngine, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        what = Serving(target="t", dtype="float32", max_model_len=64, port=port)
        with pytest.raises(UserError, match=rf"--port {port} on 127\.0\.0\.1 cannot be used"):
            with VLLM.serve(fake.environment, what, tmp_path / "log"):
                pytest.fail("must not start")
    assert not (fake.folder / "started.json").exists()
    check_port(port)


def test_death_at_the_start_quotes_the_cause(fake: FakeEngine, tmp_path: Path) -> None:
    fake.plan(
        die_at_start="(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] RuntimeError: Cannot find "
        "any model weights with `d`\nRuntimeError: Engine core initialization failed. See root "
        "cause above."
    )
    with pytest.raises(UserError) as caught:
        with VLLM.serve(fake.environment, WHAT, tmp_path / "log"):
            pytest.fail("must not start")
    assert str(caught.value) == (
        "vLLM 0.32.0 died while starting (exit code 1): RuntimeError: Cannot find any model weights "
        f"with `d`\nits log: {tmp_path / 'log'}"
    )


def test_an_engine_that_never_gets_ready(fake: FakeEngine, tmp_path: Path) -> None:
    fake.plan(never_healthy=True)
    what = Serving(target="t", dtype="float32", max_model_len=64, patience=1.0)
    with pytest.raises(
        UserError, match=r"was not ready within 1 s; .*it printed nothing(.|\n)*log"
    ):
        with VLLM.serve(fake.environment, what, tmp_path / "log"):
            pytest.fail("must not start")
    assert gone(fake.started["pid"])


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "it printed nothing"),
        ("starting\nstill starting\n\n", "still starting"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, max_model_len (9) is too great\n    For further information visit x\n",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig "
            "Value error, max_model_len (9) is too great",
        ),
        (
            "(APIServer pid=1) WARNING 01-01 [a.py:1] limits like `OSError: too many open files`\n"
            "(Worker pid=2) ERROR 01-01 00:00:01 [b.py:2] AssertionError: shapes differ\n"
            "Exception: WorkerProc initialization failed due to an exception in a process.\n"
            "(APIServer pid=1) RuntimeError: Engine core initialization failed.\n",
            "AssertionError: shapes differ",
        ),
    ],
)
def test_last_words(tmp_path: Path, log: str, words: str) -> None:
    path = tmp_path / "log"
    path.write_text(log)
    assert last_words(path) == words
