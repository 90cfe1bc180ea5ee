"""A draft tried in a real serving engine."""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from ..config import MeasureConfig
from ..core.console import say
from ..core.errors import UserError
from ..core.records import Acceptance, Prompt, Verification, to_json
from ..core.remote import fetched
from ..core.report_record import AdaptReport
from .bundles import MaybeTargetFlags, OutputFlags, TargetFlags, print_json

if TYPE_CHECKING:
    from ..serving.verify import Request

NOT_GOOD = 3
"""Exit code of a verification that went through and found the draft not fit to serve."""


@dataclass(frozen=True)
class Run:
    """What a run folder of `redraft adapt` records of its draft."""

    folder: Path
    target: str
    adapter: str | None
    draft: str
    after: Acceptance
    k: int
    max_new_tokens: int

    def target_of(self, models: MaybeTargetFlags) -> TargetFlags:
        """Its target, loaded as the flags want it."""
        adapter = models.target_adapter or self.adapter
        return dataclasses.replace(
            TargetFlags(self.target, adapter),
            chat_template=models.chat_template,
            template_arg=models.template_arg,
            dtype=models.dtype,
        )

    def prompts(self, limit: int) -> list[Prompt]:
        """The prompts its record was measured on."""
        from ..generation.answer_file import read_answers

        answers = read_answers(self.folder / "answers" / "eval.jsonl")
        return [Prompt(a.id, a.prompt) for a in answers[:limit]]


@dataclass(frozen=True)
class EngineFlags:
    """The engine, and what it is asked."""

    engine: str = "vllm"
    python: str | None = None
    k: int | None = None
    limit: int = 32
    max_new_tokens: int | None = None
    concurrency: str = "1,4,16"
    repeats: int = 3
    port: int | None = None
    start_timeout: float = 900.0
    engine_args: str = ""
    outtype: str | None = None
    converted: str | None = None

    def request(self, run: Run | None) -> Request:
        """What to try, of the run's settings where it is not named. Raises UserError for flags that make no sense."""
        from ..serving.engines import engine_named
        from ..serving.verify import Request

        row = engine_named(self.engine)
        levels, flags = _levels(self.concurrency), engine_flags(self.engine_args)
        row.check_flags(flags)
        row.check_outtype(self.outtype)
        return Request(
            engine=row,
            logs=run.folder / "verify" if run else Path(tempfile.mkdtemp(prefix="redraft-verify-")),
            k=self.k or (run.k if run else MeasureConfig.k),
            max_new_tokens=self.max_new_tokens or (run.max_new_tokens if run else 128),
            concurrencies=levels,
            repeats=self.repeats,
            port=self.port,
            patience=self.start_timeout,
            converted=Path(self.converted) if self.converted else None,
            engine_args=flags,
            outtype=self.outtype,
        )


def verify(
    models: MaybeTargetFlags,
    how: EngineFlags,
    output: OutputFlags,
    draft: str | None = None,
    prompts: str | None = None,
    run: str | None = None,
) -> None:
    """Try a draft in a real engine: same outputs, same tau as redraft counts, how fast.

    Exit codes: 0 serve it (where it gains), 3 tried and not fit to serve, 2 a mistake in the command, 1 our fault.

    Example: redraft verify --run run --python .venv-vllm/bin/python
    """
    finished = read_run(run) if run else None
    found = tried(models, how, output, finished, draft, prompts)
    output.show(to_json(found), lambda: print_tried(found))
    if not found.good:
        raise typer.Exit(NOT_GOOD)


def tried(
    models: MaybeTargetFlags,
    how: EngineFlags,
    output: OutputFlags,
    finished: Run | None,
    draft: str | None = None,
    prompts: str | None = None,
) -> Verification:
    """The draft in the engine; kept with the run where it is that run's. Ends the command for files that an engine refuses."""
    request = how.request(finished)
    named = models.named()
    if finished:
        named, draft = named or finished.target_of(models), draft or finished.draft
    if named is None or draft is None or not (prompts or finished):
        raise UserError("name --target, --draft and --prompts, or a finished run with --run")
    from ..checkpoints.inspect import REFUSED, inspect_draft
    from ..checkpoints.load import read_draft
    from ..report.page import keep_verification
    from ..serving.verify import verify as work

    environment = request.engine.find(how.python)
    loaded = named.load(device="cpu")
    files = inspect_draft(draft, loaded)
    findings = [f.says for f in files.engines if f.engine == how.engine and f.level != "note"]
    if files.unreadable is not None or files.serves(how.engine) == REFUSED:
        _refuse(files.unreadable or f"{how.engine} {REFUSED}", findings, output.as_json)
    asked = _prompts(prompts, finished, loaded, how.limit)
    recorded = finished.after if finished else None
    found = work(
        *(environment, loaded, read_draft(draft), asked, request),
        recorded=recorded,
        findings=findings,
    )
    if finished and draft == finished.draft:
        keep_verification(finished.folder, found)
    return found


def print_tried(found: Verification) -> None:
    """On the terminal."""
    from ..report.terminal import print_verification

    print_verification(found)


def _prompts(file: str | None, run: Run | None, target: Any, limit: int) -> Sequence[Prompt]:
    """The prompts of a file, else those that the run's record was measured on."""
    from ..prompts.prompts import read_prompts

    if file:
        found = read_prompts(file, target, limit)
        say(found.summary())
        return found.prompts
    return run.prompts(limit) if run else ()


def _refuse(why: str, findings: list[str], as_json: bool) -> NoReturn:
    """The judgement of files that are wrong themselves: the engine is not even started."""
    conclusion = f"do not serve it: {why}"
    if as_json:
        print_json({"good": False, "conclusion": conclusion, "findings": findings})
    else:
        for finding in findings:
            typer.echo(f"in the engine: {finding}")
        typer.echo(conclusion)
    raise typer.Exit(NOT_GOOD)


def _levels(text: str) -> tuple[int, ...]:
    try:
        levels = tuple(int(word) for word in text.split(","))
    except ValueError:
        levels = ()
    if not levels or min(levels) < 1:
        raise UserError(
            f"--concurrency takes counts of at least 1, for example 1,4,16; got '{text}'"
        )
    return levels


def engine_flags(text: str) -> tuple[str, ...]:
    """The flags that --engine-args holds."""
    try:
        return tuple(shlex.split(text))
    except ValueError as problem:
        raise UserError(
            f"--engine-args takes flags as a shell does, in one argument; got '{text}' ({problem})"
        ) from None


def read_run(run: str) -> Run:
    """A finished run, by its folder."""
    from ..core.folders import read_json

    report = AdaptReport.from_json(read_json(Path(run) / "report.json"))
    measured: dict[str, Any] = report.config["measure"]
    source, _, adapter = report.target.partition("+")
    if Path(report.target).exists():
        source, adapter = report.target, ""
    return Run(
        folder=Path(run),
        target=fetched(source),
        adapter=fetched(adapter) if adapter else None,
        draft=str(Path(run) / "draft"),
        after=report.after,
        k=int(measured["k"]),
        max_new_tokens=int(measured["eval_new_tokens"]),
    )
