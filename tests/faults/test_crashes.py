"""Run folders survive: whatever breaks, running again ends with the bytes of an unbroken run.

With REDRAFT_RECORD_FAULTS=FILE the table of injected faults is written there.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from redraft import cli
from redraft.core import files
from redraft.core.errors import UserError
from redraft.core.lock import held
from redraft.models.target import Target
from redraft.pipeline.run_folder import RunFolder
from redraft.training import train as train_module
from tests.faults.crashes import (
    WRITES,
    Bomb,
    Crash,
    Job,
    Signal,
    armed,
    careless_write,
    child_adapt,
    child_command,
    differences,
    forgetful_load,
    until_done,
)

LAZY = (
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "torch._dynamo",
)
"""What a run imports late, seconds of it: kills are to hit the run."""
FAULTS, DISK_FAULTS, KILLS = 120, 40, 20
REACH = (12, 60)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Children that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.faults.crashes", *LAZY])
    with pytest.MonkeyPatch.context() as patch:  # the server imports by its environment
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


def bombs(seed: int, **kind: Any) -> Iterator[Bomb]:
    """Bombs at random upcoming points, near ones and far ones, reproducible from the seed.

    A stage passes up to 30 points before it is marked done, so near ones alone would never let it.
    """
    draw = random.Random(seed)
    while True:
        yield Bomb(draw.randrange(draw.choice(REACH)), **kind)


# -- injected faults ----------------------------------------------------------------------------


def test_a_second_run_of_the_same_job_writes_the_same_bytes(
    job: Job, target: Target, expected: dict[str, Any], tmp_path: Path
) -> None:
    job.run(target, tmp_path / "run")
    assert differences(tmp_path / "run", expected) == []
    assert {"draft/redraft.json", "adapter/adapter.json", "checkpoints/checkpoint.safetensors"} < (
        set(expected)
    )


def test_crashes_everywhere_resume_to_the_same_bytes(
    job: Job, target: Target, expected: dict[str, Any], other: Path, tmp_path: Path
) -> None:
    names: set[str] = set()
    with armed(names.add):
        job.run(target, Path(shutil.copytree(other, tmp_path / "names")))
    hits: Counter[str] = Counter()
    chains = 0
    left = sorted(names)
    while left or hits.total() < FAULTS:
        out = tmp_path / str(chains)
        tries = bombs(chains)
        if left:  # one bomb for each place, in a folder where there is something to remove
            shutil.copytree(other, out)
            place = left.pop()
            tries = chain([Bomb(0, counts=place.__eq__)], tries)
        hits.update(until_done(partial(job.run, target, out), tries, Crash))
        assert differences(out, expected) == [], f"chain {chains}"
        chains += 1
    assert set(hits) == names
    assert len(names) > 15
    record(hits, chains)


def test_a_full_disk_is_one_sentence_and_resumes_to_the_same_bytes(
    job: Job, target: Target, expected: dict[str, Any], other: Path, tmp_path: Path
) -> None:
    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    count = chains = 0
    while count < DISK_FAULTS:
        out = tmp_path / str(chains)
        if chains % 2:
            shutil.copytree(other, out)
        said: list[str] = []

        def run(out: Path = out, said: list[str] = said) -> None:
            try:
                job.run(target, out)
            except UserError as problem:
                said.append(str(problem))
                raise

        tries = bombs(1000 + chains, error=full, counts=lambda name: name.startswith(WRITES))
        count += len(until_done(run, tries, UserError))
        for sentence in said:
            assert "No space left on device; everything finished so far is kept" in sentence
            assert "free space on the disk and run the same command again" in sentence
            assert str(out) in sentence
        assert differences(out, expected) == []
        chains += 1


def test_a_crash_leaves_no_temporary_of_a_full_disk(tmp_path: Path) -> None:
    def full(name: str) -> None:
        if name == "text: half":
            raise OSError(errno.ENOSPC, "No space left on device")

    with armed(full), pytest.raises(UserError, match="cannot be written: No space left"):
        files.write_text(tmp_path / "a.txt", "words")
    assert list(tmp_path.iterdir()) == []


# -- the comparison can fail ---------------------------------------------------------------------


def problem_of(
    job: Job, target: Target, expected: dict[str, Any], out: Path, tries: Iterator[Bomb]
) -> str:
    """What a chain of crashes ends in; nothing when it ends in the same bytes."""
    try:
        until_done(lambda: job.run(target, out), tries, Crash)
    except Exception as error:  # noqa: BLE001
        return repr(error)
    return ", ".join(differences(out, expected))


def test_a_writer_that_names_files_too_early_is_caught(
    job: Job,
    target: Target,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(seed: int) -> Iterator[Bomb]:
        yield from bombs(seed, counts=lambda name: name.endswith("half"))

    assert not problem_of(job, target, expected, tmp_path / "right", half(3))
    monkeypatch.setattr(files, "_write_whole", careless_write)
    assert problem_of(job, target, expected, tmp_path / "wrong", half(3))


def test_a_checkpoint_that_forgets_the_optimizer_is_caught(
    job: Job,
    target: Target,
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def in_training() -> Iterator[Bomb]:
        yield Bomb(after=2, counts=lambda name: name.startswith("training"))
        yield Bomb(after=10**9)

    assert not problem_of(job, target, expected, tmp_path / "right", in_training())
    monkeypatch.setattr(train_module, "load_checkpoint", forgetful_load)
    found = problem_of(job, target, expected, tmp_path / "wrong", in_training())
    assert "draft/model.safetensors" in found


def test_an_error_that_is_swallowed_is_caught(
    job: Job, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallows(path: Path, lines: list[str]) -> None:
        try:
            append(path, lines)
        except UserError:
            return

    append = files.append_lines
    monkeypatch.setattr("redraft.generation.regenerate.append_lines", swallows)
    tries = iter([Bomb(0, lambda: OSError(errno.ENOSPC, "full"), lambda n: n == "lines: half")])
    with pytest.raises((AssertionError, UserError)):
        until_done(lambda: job.run(target, tmp_path / "run"), tries, Crash)


# -- real kills ---------------------------------------------------------------------------------


def start(
    processes: ForkServerContext, body: Callable[..., None], *arguments: Any
) -> tuple[Any, Any]:
    """A child process that has begun, and the pipe on which it says more."""
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(
        target=body, args=[theirs if a is PIPE else a for a in arguments], daemon=True
    )
    child.start()
    theirs.close()
    return child, ours


PIPE = object()


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    job: Job, expected: dict[str, Any], tmp_path: Path, processes: ForkServerContext
) -> None:
    """The child says when it has come some way and goes on; the kill comes while it works."""
    draw = random.Random(7)
    kills = chains = 0
    while kills < KILLS:
        out = tmp_path / str(chains)
        while True:
            signal = Signal("", draw.randrange(1, draw.choice(REACH)), waits=False)
            child, pipe = start(processes, child_adapt, job, out, PIPE, signal)
            assert pipe.recv() == "begins"
            with contextlib.suppress(EOFError):  # it was done before
                pipe.recv()
                time.sleep(draw.uniform(0, 0.02))
            child.kill()
            child.join()
            assert child.exitcode in (0, -9)
            if child.exitcode == 0:
                break
            kills += 1
        assert differences(out, expected) == []
        chains += 1
    print(f"{kills} kills in {chains} chains")


@pytest.mark.parametrize("forgetful", [False, True])
def test_a_kill_between_steps_is_survived_and_a_forgetful_checkpoint_seen(
    job: Job,
    expected: dict[str, Any],
    tmp_path: Path,
    processes: ForkServerContext,
    forgetful: bool,
) -> None:
    out = tmp_path / "run"
    for after in (3, 10**9):
        pause = Signal("training: after a step", after, forgetful=forgetful)
        child, pipe = start(processes, child_adapt, job, out, PIPE, pause)
        assert pipe.recv() == "begins"
        if after == 3:
            assert pipe.recv() == pause.name
            child.kill()
        child.join()
        assert child.exitcode == (-9 if after == 3 else 0)
    assert bool(differences(out, expected)) == forgetful


# -- one process per folder ---------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone(
    job: Job,
    target: Target,
    expected: dict[str, Any],
    tmp_path: Path,
    processes: ForkServerContext,
) -> None:
    out = tmp_path / "run"
    pause = Signal("stage: before work", 2)
    child, pipe = start(processes, child_adapt, job, out, PIPE, pause)
    assert [pipe.recv(), pipe.recv()] == ["begins", pause.name]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(
        UserError, match=rf"run: another redraft process \(pid {child.pid}\) works in this folder"
    ):
        job.run(target, out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    child.kill()
    child.join()
    job.run(target, out)
    assert differences(out, expected) == []


def test_one_process_may_open_a_folder_in_sequence_but_not_twice_at_once(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder.open(tmp_path / "run") as run:
            run.stage("a", {}, ["a.txt"], lambda: files.write_text(tmp_path / "run/a.txt", "a"))
            with pytest.raises(UserError, match="another redraft process"), held(run.path):
                raise AssertionError("two holders")
    assert not run.worked
    with pytest.raises(RuntimeError), RunFolder.open(tmp_path / "run"):
        raise RuntimeError  # released on the way out, as the next line shows
    with RunFolder.open(tmp_path / "run") as again:
        assert again.state["a"]["done"]


# -- what the system refuses ---------------------------------------------------------------------


def command(
    processes: ForkServerContext, argv: list[str], limit: int = 0, interrupt: str = ""
) -> tuple[int, str]:
    """Exit code and stderr of a command in a child process."""
    child, pipe = start(processes, child_command, argv, limit, PIPE, interrupt)
    code, printed = pipe.recv()
    child.join()
    return code, " ".join(printed.split())


def test_files_that_may_not_grow_end_in_one_sentence(
    job: Job, expected: dict[str, Any], tmp_path: Path, processes: ForkServerContext
) -> None:
    out = tmp_path / "run"
    code, printed = command(processes, job.argv(out), limit=30_000)
    assert code == 2
    assert "Traceback" not in printed
    last = printed[printed.rindex("redraft: ") :]
    assert last.startswith(f"redraft: {out}/checkpoints/checkpoint.safetensors cannot be written:")
    assert "File too large; everything finished so far is kept, so raise the limit" in last
    assert not list(out.rglob("*.tmp"))
    assert (out / "selection.jsonl").is_file()
    code, printed = command(processes, job.argv(out))
    assert code == 0, printed
    assert "select: nothing to do, already done" in printed
    assert set(differences(out, expected)) <= {"run.json", "report.json"}  # origin: --set
    code, printed = command(processes, job.argv(out))
    assert code == 0
    # The console wraps long lines, in the middle of a path if it must.
    said = f"nothing to do: every stage was done already; report {out}/report.html"
    assert "".join(printed.split()).endswith("".join(said.split()))


def test_ctrl_c_amid_a_write_is_code_130(
    job: Job, expected: dict[str, Any], tmp_path: Path, processes: ForkServerContext
) -> None:
    out = tmp_path / "run"
    for point in ("lines: half", "tensors: half", "training: after a step"):
        code, printed = command(processes, job.argv(out), interrupt=point)
        assert code == 130, printed
        assert printed.endswith("redraft: interrupted; run the same command again to continue")
        assert "Traceback" not in printed
    assert command(processes, job.argv(out))[0] == 0
    assert set(differences(out, expected)) <= {"run.json", "report.json"}


def test_a_folder_that_cannot_be_made_is_named(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = job.prompts / "run"  # below a file, where not even root can make a folder
    monkeypatch.setattr(sys, "argv", job.argv(out))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert f"--out {out} cannot be created: Not a directory" in capsys.readouterr().err


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write in read-only folders"
)
def test_a_read_only_folder_is_one_sentence(
    job: Job, target: Target, whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / ".lock").unlink()
    out.chmod(0o555)
    try:
        with pytest.raises(UserError, match="Permission denied; .* make the folder writable"):
            job.run(target, out)
    finally:
        out.chmod(0o755)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "make the folder writable"),
        (errno.EDQUOT, "free space in the disk quota"),
        (errno.EACCES, "make the folder writable"),
        (errno.EIO, "fix that"),
    ],
)
def test_each_refusal_has_its_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(UserError) as caught, files.writing(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == (
        f"{tmp_path}/a cannot be written: {os.strerror(number)}; everything finished so far is "
        f"kept, so {remedy} and run the same command again"
    )


# -- the record ------------------------------------------------------------------------------------


def record(hits: Counter[str], chains: int) -> None:
    """Print the faults by place; write them as a page where REDRAFT_RECORD_FAULTS names a file."""
    rows = "".join(f"| `{name}` | {count} | {count} |\n" for name, count in sorted(hits.items()))
    page = (
        "# Injected faults\n\n"
        f"{hits.total()} crashes at random points of a tiny `redraft adapt`, in {chains} run folders; "
        "each folder was run again until it was done, and then every file in it equalled that of an "
        "uninterrupted run (but for the fields that hold seconds and memory). Written by "
        "`REDRAFT_RECORD_FAULTS=docs/results/faults.md pytest -n 0 tests/faults/test_crashes.py`; next to these, "
        f"the same tests fill the disk {DISK_FAULTS} times and kill the process {KILLS} times.\n\n"
        "| place | crashes there | ended with the same bytes |\n|---|---|---|\n" + rows
    )
    print(page)
    if destination := os.environ.get("REDRAFT_RECORD_FAULTS"):
        Path(destination).write_text(page, encoding="utf-8")
