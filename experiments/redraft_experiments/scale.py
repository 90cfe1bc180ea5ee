"""`redraft bench scale`: a draft trained in several processes, and on long rows: speed and memory.

    OUT/rows-L-N.jsonl   N rows of running text of L tokens each, as answers to their first tokens
    OUT/trained/...      `redraft train` on them, in processes that share the cores

Every part is a stage of a run folder, so only what is missing is run. The text is no answer of the target, which changes nothing of
time and memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import typer

from redraft.checkpoints.adapter_folder import read_training
from redraft.core.console import say
from redraft.core.errors import UserError
from redraft.core.files import write_text
from redraft.core.folders import read_json
from redraft.core.records import Answer, versions
from redraft.models.loading import read_tokenizer
from redraft.pipeline.run_folder import RunFolder

from .datasets import novel_tokens

PROMPT, LOOKAHEAD = 8, 4
"""Tokens before the answer of a row, and after the answer of a held-out one."""
HELDOUT, HELDOUT_TOKENS = 2, 64
SHORT, SHORT_ROWS, STEPS = 512, 8, 4
"""The rows on which numbers of processes are compared: their tokens, how many a step has, and steps."""
LONG_STEPS = 2


@dataclass(frozen=True)
class ScaleCell:
    """One training: `rows` rows of `tokens` tokens a step, in `processes` processes of `threads` threads.

    `tokens_per_second` are those of whole steps. Peaks are MB of one process: measured, and predicted before the first step.
    """

    target: str
    tokens: int
    rows: int
    steps: int
    processes: int
    threads: int
    run: int
    tokens_per_second: float
    peak_mb: float
    predicted_peak_mb: float
    trained_parameters: int
    precision: str
    versions: dict[str, str]


def bench_scale(
    target: Path,
    draft: Path,
    out: Path,
    data: str | None,
    lengths: Sequence[int],
    processes: Sequence[int],
    repeats: int,
) -> list[ScaleCell]:
    """A cell for each number of processes on short rows, and for each length of a row in one process.

    Raises UserError for rows that the target's context does not hold, where there is no folder of data, and where a training
    fails.
    """
    context = read_json(target / "config.json").get("max_position_embeddings")
    if context and max(lengths) > context:
        raise UserError(
            f"--lengths {max(lengths)}: {target} reads rows of at most {context} tokens; name shorter ones"
        )
    shapes = [(SHORT, SHORT_ROWS, STEPS, count) for count in processes]
    shapes += [(length, 1, LONG_STEPS, 1) for length in lengths]
    cells = []
    with RunFolder.open(out) as run:
        for tokens, rows, steps, count in shapes:
            name = f"rows-{tokens}-{rows * steps}"
            files = [f"{name}.jsonl", f"{name}-heldout.jsonl"]
            key = run.stage(
                name,
                {"tokenizer": read_tokenizer(str(target)).backend_tokenizer.to_str()},
                files,
                partial(_write, target, data, tokens, rows * steps, [out / f for f in files]),
            )
            for at in range(1, repeats + 1):
                made = f"trained/{tokens}x{rows}-p{count}-{at}"
                command = _command(target, draft, [out / f for f in files], tokens * rows)
                run.stage(
                    made,
                    {"rows": key, "target": str(target), "draft": str(draft)},
                    [f"{made}/training.json"],
                    partial(_train, command, out / made, count),
                )
                found = read_training(out / made)
                cells.append(_cell(found, target.name, tokens, rows, count, at))
    return cells


def _write(target: Path, data: str | None, tokens: int, rows: int, files: Sequence[Path]) -> None:
    """Rows to train on, and short ones that are held out."""
    stream = novel_tokens(data, read_tokenizer(str(target)))
    for file, count, length, ahead in zip(
        files, (rows, HELDOUT), (tokens, HELDOUT_TOKENS), (0, LOOKAHEAD), strict=True
    ):
        lines = []
        for at in range(count):
            row = list(islice(stream, length + ahead))
            if len(row) < length + ahead:
                raise UserError(f"the novels are too short for {rows} rows of {tokens}")
            lines.append(
                Answer(f"{at}", row[:PROMPT], row[PROMPT:], length - PROMPT, "length").to_line()
            )
        write_text(file, "".join(line + "\n" for line in lines))


def _command(target: Path, draft: Path, files: Sequence[Path], batch: int) -> list[str]:
    words = ["redraft", "train", "--target", target, "--draft", draft, "--quiet"]
    words += ["--answers", files[0], "--heldout", files[1], "--k", LOOKAHEAD]
    words += ["--epochs", 1, "--evaluations", 1, "--batch-tokens", batch, "--precision", "bf16"]
    return list(map(str, words))


def _train(command: Sequence[str], out: Path, processes: int) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    whole = [sys.executable, "-m", *(launcher if processes > 1 else []), *command]
    say(f"training in {processes} process{'es' if processes > 1 else ''}: {out}")
    threads = {"OMP_NUM_THREADS": str(_threads(processes))}
    ended = subprocess.run(
        [*whole, "--out", str(out)], env={**os.environ, **threads}, capture_output=True, text=True
    )
    if ended.returncode:
        log = out.with_suffix(".log")
        write_text(log, ended.stdout + ended.stderr)
        raise UserError(
            f"training failed with exit code {ended.returncode}; what it said is in {log}"
        )


def _threads(processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _cell(
    found: dict[str, Any], target: str, tokens: int, rows: int, processes: int, run: int
) -> ScaleCell:
    same = ("steps", "tokens_per_second", "peak_mb", "predicted_peak_mb", "precision")
    return ScaleCell(
        target=target,
        tokens=tokens,
        rows=rows,
        processes=processes,
        threads=_threads(processes),
        run=run,
        trained_parameters=found["trained_parameters"],
        versions=versions(),
        **{name: found[name] for name in same},
    )


def print_cells(cells: Sequence[ScaleCell]) -> None:
    """A line for each training."""
    for c in cells:
        typer.echo(
            f"{c.rows} x {c.tokens:,} tokens a step, processes {c.processes}, threads of each {c.threads}: "
            f"{c.tokens_per_second:,.0f} tokens/s, peak {c.peak_mb:,.0f} MB each ({c.predicted_peak_mb:,.0f} predicted)"
        )
