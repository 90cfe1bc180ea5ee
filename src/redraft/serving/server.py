"""A server process: started in a group of its own, waited for, and stopped with all its children."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..core.console import Waiting
from ..core.errors import UserError
from .client import Client, connect
from .reply import Trouble

HOST = "127.0.0.1"
GRACE_SECONDS, HEALTH_SECONDS = 10.0, 5.0
"""How long a server may take to end, and to reply whether it is healthy."""
_PREFIX = re.compile(r"^\(\w+ pid=\d+\) (?:[A-Z]+ [^\]]*\] ?)?")
_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception)): (.+)")
_NOT_A_CAUSE = ("initialization failed", "See root cause", "See stack trace")


@dataclass(frozen=True)
class Server:
    """A server that answers on 127.0.0.1:`port`; `name` is what messages call it. `causes` as in
    `last_words`."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    causes: Sequence[str] = ()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def last_words(self) -> str:
        return last_words(self.log, self.causes)

    def check_alive(self) -> None:
        """Raise UserError, with the last line that explains it, if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise UserError(
                f"{self.name} died while answering ({_ended(code)}): {self.last_words()}\n"
                f"its log: {self.log}"
            )


@contextlib.contextmanager
def serving(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    port: int,
    log: Path,
    patience: float,
    health: str = "/health",
    causes: Sequence[str] = (),
) -> Iterator[Server]:
    """Run `command` as a server on `port` until the block ends, however it ends.

    Yields once the path `health` replies with HTTP 200. Output goes to `log`. Raises UserError when the port is taken, the
    process dies while starting, or it is not healthy within `patience` seconds.
    """
    check_port(port)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream, _termination_raises():
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            server = Server(name, process, port, log, causes)
            client = connect(server.url, HEALTH_SECONDS)
            with client.http:
                _wait_until_healthy(server, client, health, patience)
            yield server
        finally:
            _stop(process)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise UserError when something listens on `port` already."""
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as problem:
            raise UserError(
                f"--port {port} on {HOST} cannot be used ({problem.strerror}); name another, or "
                "leave --port out to have a free one picked"
            ) from None


def last_words(log: Path, causes: Sequence[str] = ()) -> str:
    """The line of a server's log that explains its end best: the first that matches one of the patterns
    `causes`, else the last exception that is a cause, else the last line that is not empty."""
    text = log.read_text(encoding="utf-8", errors="replace")
    for pattern in causes:
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            return found[0].strip()
    lines = [_PREFIX.sub("", line).rstrip() for line in text.splitlines() if line.strip()]
    for at in range(len(lines) - 1, -1, -1):
        raised = _RAISED.match(lines[at])
        if raised and not any(part in lines[at] for part in _NOT_A_CAUSE):
            cause = lines[at]
            if "validation error" in cause and at + 1 < len(lines):
                cause += " " + lines[at + 1].strip()
            return cause
    return lines[-1].strip() if lines else "it printed nothing"


def _wait_until_healthy(server: Server, client: Client, health: str, patience: float) -> None:
    began = time.monotonic()
    pause = 0.05
    with Waiting(f"starting {server.name}, log {server.log}") as waiting:
        while not _healthy(client, health):
            code = server.process.poll()
            if code is not None:
                raise UserError(
                    f"{server.name} died while starting ({_ended(code)}): "
                    f"{server.last_words()}\nits log: {server.log}"
                )
            if time.monotonic() - began > patience:
                raise UserError(
                    f"{server.name} was not ready within {patience:g} s; the last line of its log: "
                    f"{server.last_words()}\nits log: {server.log}; give it longer with "
                    "--start-timeout"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
            waiting.tick()


def _healthy(client: Client, path: str) -> bool:
    try:
        return client.reply(path).status == 200
    except Trouble:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: asked first, then killed, children that outlive it included."""
    try:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()
        _wait_for_group(process)


def _wait_for_group(process: subprocess.Popen[bytes]) -> None:
    """Killed children take a moment to give back memory and ports that the next server needs."""
    deadline = time.monotonic() + GRACE_SECONDS / 2
    with contextlib.suppress(ProcessLookupError):  # the group is gone
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended by itself
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that a terminated redraft stops its server as well."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
