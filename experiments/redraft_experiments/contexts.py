"""`redraft bench contexts`: a draft's acceptance by how much its target has read before it answers.

    OUT/answers-L.jsonl   the target's greedy answers to questions about texts, of about L tokens with the question
    OUT/cells/NAME-L.json a draft on these answers

The texts of all lengths end at the same places of the same novels, so what is asked about is the same and only what lies before it
grows. Every part is a stage of a run folder, so only what is missing is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import typer

from redraft.checkpoints.load import load_draft, read_draft
from redraft.config import RegenerateConfig
from redraft.core.errors import UserError
from redraft.core.records import Prompt, to_json, versions
from redraft.generation.answer_file import prompts_hash, read_answers
from redraft.generation.regenerate import regenerate
from redraft.metrics.measure import measure_answers
from redraft.models.loading import load_target
from redraft.models.target import Target
from redraft.pipeline.run_folder import RunFolder

from .datasets import novel_tokens

QUESTION = "Tell in a few sentences what happens at the end of this text."
AROUND = 64
"""Tokens of a context that are kept for the question and the chat template."""
WINDOW = 8192
"""Tokens from the end of a text to the end of the next: of lengths up to this, none sees another's."""
ANSWERS = RegenerateConfig(max_new_tokens=96, batch_size=8)


@dataclass(frozen=True)
class ContextCell:
    """A draft after contexts of about `length` tokens (`tokens`: their mean), greedily. `tau` is (value, low, high)."""

    target: str
    draft: str
    length: int
    tokens: float
    k: int
    tau: tuple[float, float, float]
    prompts: int
    answer_tokens: int
    versions: dict[str, str]

    @staticmethod
    def from_json(row: dict[str, Any]) -> ContextCell:
        return ContextCell(**{**row, "tau": tuple(row["tau"])})


def bench_contexts(
    target_folder: str,
    draft_folder: str,
    name: str,
    out: Path,
    data: str | None,
    lengths: Sequence[int],
    prompts: int,
    k: int,
) -> list[ContextCell]:
    """A cell for each length. `name` is what the draft is called.

    Raises UserError for lengths that a question alone takes or that the target does not read, and where there is no folder of data.
    """
    target = load_target(target_folder)
    context = getattr(target.model.config.get_text_config(), "max_position_embeddings", None)
    most = min(WINDOW, (context or WINDOW) - ANSWERS.max_new_tokens - k)
    if min(lengths) <= AROUND or max(lengths) > most:
        raise UserError(
            f"--lengths {','.join(map(str, lengths))}: expected more than {AROUND} tokens, which the question takes, and at most "
            f"{most} for {target_folder}"
        )
    draft = read_draft(draft_folder).hash()
    with RunFolder.open(out) as run:
        for length in lengths:
            asked = questions(target, data, length, prompts)
            answers, cell = out / f"answers-{length}.jsonl", f"cells/{name}-{length}.json"
            key = run.stage(
                answers.name,
                {"target": target.fingerprint(), "prompts": prompts_hash(asked)},
                [answers.name],
                partial(_answer, target, asked, answers, k),
                keeps=[answers.name],
            )
            run.stage(
                cell,
                {"answers": key, "draft": draft, "k": k},
                [cell],
                partial(_measure, run, cell, target, draft_folder, answers, name, length, k),
            )
    return [_read(out / "cells" / f"{name}-{length}.json") for length in lengths]


def read_cells(out: Path) -> list[ContextCell]:
    """Every cell of a folder."""
    return sorted(map(_read, out.glob("cells/*.json")), key=lambda cell: (cell.draft, cell.length))


def _read(path: Path) -> ContextCell:
    return ContextCell.from_json(json.loads(path.read_text(encoding="utf-8")))


def questions(target: Target, data: str | None, length: int, count: int) -> list[Prompt]:
    """Questions about texts, each with it about `length` tokens, that end where those of any other length do."""
    tokenizer = target.tokenizer
    stream = novel_tokens(data, tokenizer)
    found = []
    for at in range(count):
        window = list(islice(stream, WINDOW))
        if len(window) < WINDOW:
            raise UserError(f"the novels are too short for {count} times {WINDOW} tokens")
        text = tokenizer.decode(window[-(length - AROUND) :])
        messages = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
        found.append(Prompt(str(at), tuple(target.render(messages))))
    return found


def _answer(target: Target, asked: Sequence[Prompt], out: Path, k: int) -> None:
    regenerate(target, asked, out, ANSWERS, k)


def _measure(
    run: RunFolder,
    file: str,
    target: Target,
    folder: str,
    answers: Path,
    name: str,
    length: int,
    k: int,
) -> None:
    every = read_answers(answers)
    measured = measure_answers(target, load_draft(folder, target), every, k=k).acceptance
    cell = ContextCell(
        target=Path(target.name).name,
        draft=name,
        length=length,
        tokens=sum(len(answer.prompt) for answer in every) / len(every),
        k=k,
        tau=(measured.tau, *measured.ci),
        prompts=measured.prompts,
        answer_tokens=sum(answer.length for answer in every),
        versions=versions(),
    )
    run.write_json(file, to_json(cell))


def print_cells(cells: Sequence[ContextCell]) -> None:
    """A line for each length."""
    for c in cells:
        tau, low, high = c.tau
        typer.echo(
            f"{c.target}, {c.draft}, after {c.tokens:,.0f} tokens: tau {tau:.2f} [{low:.2f}, {high:.2f}] at K={c.k}, "
            f"{c.prompts} prompts, answers of {c.answer_tokens / c.prompts:.0f} tokens"
        )
