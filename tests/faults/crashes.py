"""Breaking a run on purpose: where, how, and whether what it leaves leads to the same bytes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIG_IGN, SIGINT, SIGXFSZ, default_int_handler
from signal import signal as handle
from typing import Any

import torch

from redraft import cli
from redraft.config import resolve
from redraft.core import failpoints
from redraft.core.console import set_quiet
from redraft.core.records import CLOCKED
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline import adapt as pipeline
from redraft.training import train as train_module
from redraft.training.checkpoint import TrainState, load_checkpoint

SETTINGS: dict[str, Any] = {
    "general.guard": "off",
    "regenerate.max_new_tokens": 12,
    "regenerate.batch_size": 3,
    "train.width": 4,
    "train.lr": 2e-2,
    "train.epochs": 2,
    "train.batch_tokens": 64,
    "train.rollout": 2,
    "train.evaluations": 3,
    "train.precision": "fp32",
    "measure.k": 2,
    "measure.eval_limit": 3,
    "measure.heldout": 3,
    "measure.eval_new_tokens": 10,
    "select.budget": "0.9",
}
PROMPTS = 12
CLOCKED_FILES = ("state.json", "report.json", "adapter/training.json", "selection.cost.json")
WRITES = ("text:", "tensors:", "lines:", "remove:")


class Crash(BaseException):
    """Stands for the end of the process: no handler of the package may swallow it."""


@dataclass
class Bomb:
    """Goes off at the `after`-th point that `counts`, and at every later one.

    A process that is gone writes nothing more, and a disk that is full stays full.
    """

    after: int
    error: Callable[[], BaseException] = Crash
    counts: Callable[[str], bool] = lambda name: True
    hit: str = ""

    def __call__(self, name: str) -> None:
        if not self.counts(name):
            return
        self.after -= 1
        if self.after < 0:
            self.hit = self.hit or name
            raise self.error()


@contextlib.contextmanager
def armed(bomb: Callable[[str], None]) -> Iterator[None]:
    failpoints.armed = bomb
    try:
        yield
    finally:
        failpoints.armed = None


@dataclass(frozen=True)
class Job:
    """The tiny pipeline, to be run in any folder."""

    target_folder: Path
    draft_folder: Path
    prompts: Path
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))

    def run(self, target: Target, out: Path) -> pipeline.AdaptResult:
        return pipeline.adapt(
            target,
            str(self.draft_folder),
            str(self.prompts),
            out=out,
            config=resolve([("test", self.settings)]),
        )

    def argv(self, out: Path) -> list[str]:
        """The same job as a command line."""
        sets = [f"--set={key}={value}" for key, value in self.settings.items()]
        return [
            *("redraft", "adapt", "--target", str(self.target_folder), "--draft"),
            *(str(self.draft_folder), "--prompts", str(self.prompts), "--out", str(out), *sets),
        ]


def artefacts(run: Path) -> dict[str, Any]:
    """Every file of a run folder as what has to be equal, hidden and left-over ones included, but for answers
    of another run that was in the folder before.

    Bytes as they are, but: the run's own path in report.json; the fields of clock and memory in
    CLOCKED_FILES, measure/ and the checkpoint's header; report.html, which shows them, has to be there.
    """
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = path.relative_to(run).as_posix()
        if name.startswith("answers/set-aside/"):
            continue
        if name in (".lock", "report.html"):
            found[name] = "there"
        else:
            found[name] = path.read_bytes()
            with contextlib.suppress(ValueError, KeyError):  # a damaged file is compared as it is
                if name in CLOCKED_FILES or name.startswith("measure/"):
                    found[name] = timeless(json.loads(path.read_text().replace(str(run), "RUN")))
                elif name == "checkpoints/log.jsonl":
                    found[name] = [timeless(json.loads(row)) for row in path.open()]
                elif name == "checkpoints/checkpoint.safetensors":
                    found[name] = _checkpoint(found[name])
    return found


def timeless(content: Any) -> Any:
    """JSON without the fields that hold the clock or the memory in use, and hashes of such files."""
    if isinstance(content, dict):
        return {
            key: "a hash of seconds too" if key.startswith("measure/") else timeless(value)
            for key, value in content.items()
            if key not in CLOCKED
        }
    return content


def _checkpoint(content: bytes) -> Any:
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    about = header.pop("__metadata__")
    return header, timeless(json.loads(about["about"])), content[end:]


def differences(run: Path, whole: dict[str, Any]) -> list[str]:
    """Names of the files in which a run folder differs from an uninterrupted run's."""
    found = artefacts(run)
    return sorted(n for n in {*found, *whole} if found.get(n) != whole.get(n))


def until_done(
    run: Callable[[], object], bombs: Iterator[Bomb], expected: type[BaseException]
) -> list[str]:
    """Run again and again, one bomb each time, until none goes off; the points that were hit."""
    hits = []
    for bomb in bombs:
        try:
            with armed(bomb):
                run()
        except expected:
            if not bomb.hit:
                raise  # an error of our own making, not the one that was injected
            hits.append(bomb.hit)
            continue
        assert not bomb.hit, f"the run went on after a fault at {bomb.hit}"
        return hits
    raise AssertionError("the bombs ran out")


# -- wrong variants, which the comparison has to catch ------------------------------------------


def careless_write(path: Path, content: bytes, kind: str) -> None:
    """A writer without a temporary neighbour: the file has its name before it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    failpoints.point(f"{kind}: before")
    with path.open("wb") as stream:
        stream.write(content[: len(content) // 2])
        stream.flush()
        failpoints.point(f"{kind}: half")
        stream.write(content[len(content) // 2 :])
    failpoints.point(f"{kind}: renamed")


def forgetful_load(
    folder: Path, trainable: Any, optimizers: list[torch.optim.Optimizer], key: str
) -> TrainState | None:
    """A checkpoint without the optimizer's moments."""
    state = load_checkpoint(folder, trainable, optimizers, key)
    for optimizer in optimizers:
        optimizer.state.clear()
    return state


# -- bodies of child processes ------------------------------------------------------------------


@dataclass(frozen=True)
class Signal:
    """Has a child say so at the `after`-th point of this name (any, without one), and wait or not."""

    name: str
    after: int
    waits: bool = True
    forgetful: bool = False


def child_adapt(job: Job, out: Path, say: Connection, signal: Signal) -> None:
    """The job in a process of its own; says when it begins, and when its signal is due."""
    _calm()
    left = signal.after

    def tell(name: str) -> None:
        nonlocal left
        due = left == 1
        left -= signal.name in ("", name)
        if due and left == 0:
            say.send(name)
            time.sleep(600 if signal.waits else 0)

    failpoints.armed = tell
    if signal.forgetful:
        train_module.load_checkpoint = forgetful_load
    target = load_target(str(job.target_folder))
    say.send("begins")
    job.run(target, out)


def child_command(argv: list[str], limit: int, say: Connection, interrupt: str) -> None:
    """A command line in a process of its own; sends its exit code and what it printed on stderr.

    `limit` is the largest file it may write, in bytes (0: any). With `interrupt` a Ctrl-C arrives
    at the first point of that name.
    """
    _calm()
    if limit:
        handle(SIGXFSZ, SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if interrupt:
        handle(SIGINT, default_int_handler)
        failpoints.armed = lambda name: os.kill(os.getpid(), SIGINT) if name == interrupt else None
    sys.argv = argv
    code, printed = 0, io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    say.send((code, printed.getvalue()))


def _calm() -> None:
    torch.set_num_threads(1)
    set_quiet(True)
